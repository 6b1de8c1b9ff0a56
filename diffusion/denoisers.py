"""The denoiser: a network together with what it is told and what its output stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.noise import as_double
from sublimate.diffusion.predictions import Activations, Parametrization, Prediction, scaled
from sublimate.diffusion.schedules import Schedule


class Only(tuple[str, ...]):
    """Names of features that are all that is wanted of a network: with the last of them its call may raise `Ended`."""


class Ended(Exception):
    """A network's call stopped because it had the features it was asked for.

    Attributes:
        features: by name.
    """

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        super().__init__("The network's pass ended with its last feature.")
        self.features = features


NetworkCall = Callable[[nn.Module, Tensor, Tensor, Condition, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]
"""How a family's network is called: (network, input (batch, ...), time (batch,) float32, condition, feature names) ->
(output shaped like the input, features by name)."""


class Denoiser(nn.Module):
    """(x_t, t, condition) -> Prediction, whatever the network predicts.

    A deep copy copies the network and shares the rest; a memo that maps parameters to themselves is respected.

    Args:
        network: the weights.
        call: how to call it.
        schedule: what t means.
        parametrization: what the output means.
        reads_guidance: the network is told the guidance scale, as the condition's "guidance", instead of being guided;
            1 where it is not told.

    Raises:
        ValueError: if the output does not determine x0 and eps at every time of the schedule.
    """

    def __init__(
        self,
        network: nn.Module,
        call: NetworkCall,
        schedule: Schedule,
        parametrization: Parametrization,
        *,
        reads_guidance: bool = False,
    ) -> None:
        super().__init__()
        parametrization.check(schedule)
        self.network = network
        self.call = call
        self.schedule = schedule
        self.parametrization = parametrization
        self.reads_guidance = reads_guidance

    def forward(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | None = None, *, features: Sequence[str] = ()
    ) -> Prediction:
        """The network's prediction, differentiable in x_t and t.

        Args:
            x_t: (batch, ...), the noised data.
            t: schedule time; a number, () or (batch,).
            condition: of batch size 1 or batch; None is unconditional. What it tells a teacher is not read.
            features: names of inner activations to return.

        Returns:
            the prediction, with the named features.

        Raises:
            ValueError: for a condition of another batch size.
        """
        batch = len(x_t)
        t = as_double(t, x_t.device)
        c = self.schedule.at(t)
        told = self.schedule.network_time(t).to(torch.float32).expand(batch)
        x_in = scaled(self.parametrization.input_scale(c), x_t) if self.parametrization.scales_input else x_t
        condition = (Condition() if condition is None else condition.for_student()).expand(batch)
        output, taps = self.call(self.network, x_in, told, condition, features)
        return Prediction(x_t, output, c, self.parametrization, taps)

    def activations(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | None = None, *, features: Sequence[str]
    ) -> Activations:
        """The named features alone: the network's pass, and one back to its input, end with the last of them.

        Arguments and errors are `forward`'s.
        """
        try:
            prediction = self(x_t, t, condition, features=Only(features))
        except Ended as ended:
            return Activations(x_t, ended.features)
        return Activations(x_t, prediction.features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        # `call` is often a method of a backbone, which must not be copied along.
        for shared in (self.call, self.schedule, self.parametrization):
            memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        return twin
