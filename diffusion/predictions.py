"""What a network's output stands for: one linear system turns it into x0, eps, v, a velocity or a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sublimate.diffusion.noise import Coefficients, Schedule, as_double

Kind = Literal["epsilon", "sample", "v_prediction", "flow", "edm", "trigflow"]
KINDS: tuple[str, ...] = get_args(Kind)


def per_sample(scalars: Tensor, x: Tensor) -> Tensor:
    """Scalars () or (batch,) with trailing dimensions added, so that they multiply x (batch, ...)."""
    return scalars.to(x.device).reshape(scalars.shape + (1,) * (x.ndim - scalars.ndim) if scalars.ndim else ())


def scaled(a: Tensor, x: Tensor) -> Tensor:
    """a x with one scalar per sample.

    Args:
        a: float64, () or (batch,).
        x: (batch, ...).

    Returns:
        shaped like x, in x's dtype; half precision is multiplied in float32, since a rounded scalar would shift the
        whole image.
    """
    return (per_sample(a, x).to(torch.promote_types(x.dtype, torch.float32)) * x).to(x.dtype)


def weighted_sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y with scalars per sample; arguments and precision as in `scaled`, the result in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (per_sample(a, x).to(dtype) * x + per_sample(b, y).to(dtype) * y).to(x.dtype)


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) eps.

    Args:
        schedule: gives alpha and sigma.
        x0, eps: (batch, ...), clean data and N(0, I).
        t: schedule time, a number, () or (batch,).

    Returns:
        x_t, shaped like x0, in its dtype.
    """
    c = schedule.at(as_double(t, x0.device))
    return weighted_sum(c.alpha, x0, c.sigma, eps)


@dataclass(frozen=True)
class Parametrization:
    """What a network predicts: y = p x0 + q eps, with p and q depending on the noise level.

    Attributes:
        kind: "epsilon" (p, q) = (0, 1); "sample" (1, 0); "v_prediction" (-sigma, alpha) (Salimans & Ho 2022,
            arXiv 2202.00512, section 4); "flow" (-1, 1), the velocity of a rectified flow; "edm", the F of Karras et
            al. 2022, arXiv 2206.00364, eq. 7; "trigflow", the F of Lu & Song 2025, arXiv 2410.11081, eq. 5, which is
            minus EDM's. The last two are also given the scaled input x_t / sqrt(sigma^2 + alpha^2 sigma_data^2).
        sigma_data: standard deviation of the data; used by "edm" and "trigflow" only.

    Raises:
        ValueError: for an unknown kind or a sigma_data that is not positive.
    """

    kind: Kind
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"A network cannot predict {self.kind!r}; use one of {list(KINDS)}.")
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, but is {self.sigma_data}.")

    @property
    def scales_input(self) -> bool:
        """Whether `input_scale` is anything but 1."""
        return self.kind in ("edm", "trigflow")

    def coefficients(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        """(p, q) of y = p x0 + q eps, each shaped like c.alpha."""
        if self.scales_input:
            # Karras et al. 2022, eq. 7 and table 1 with x0 = c_skip x + c_out F, for x = x_t/alpha at the noise level
            # sigma/alpha, solved for F; written so that neither alpha = 0 nor sigma = 0 divides by zero.
            sign = 1.0 if self.kind == "edm" else -1.0
            scale = sign * self.input_scale(c)
            return scale * c.sigma / self.sigma_data, -scale * c.alpha * self.sigma_data
        return _combination(self.kind, c)

    def input_scale(self, c: Coefficients) -> Tensor:
        """What x_t is multiplied by before the network sees it, shaped like c.alpha: 1, or EDM's c_in."""
        if self.scales_input:
            # c_in of Karras et al. 2022, table 1, at the noise level sigma/alpha.
            return torch.rsqrt(c.sigma**2 + (c.alpha * self.sigma_data) ** 2)
        return torch.ones_like(c.alpha)

    def target(self, x0: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
        """What a perfect network answers for x_t = alpha x0 + sigma eps.

        Args:
            x0, eps: (batch, ...).
            c: coefficients () or (batch,).

        Returns:
            y, shaped like x0, in its dtype.
        """
        p, q = self.coefficients(c)
        return weighted_sum(p, x0, q, eps)

    def check(self, schedule: Schedule, needs: Sequence[str] = ("x0", "eps")) -> None:
        """Makes sure that a schedule's whole range lets the network's output be converted.

        Args:
            schedule: the times from its t_min to its t_max are looked at.
            needs: the quantities that will be asked for: "x0", "eps", "v", "flow".

        Raises:
            ValueError: if one is undetermined at some time, as x0 is for an eps network where alpha is 0, or unknown.
        """
        unknown = [need for need in needs if need not in _QUANTITIES]
        if unknown:
            raise ValueError(f"There is no quantity {unknown[0]!r}; use some of {list(_QUANTITIES)}.")
        t = torch.linspace(schedule.t_min, schedule.t_max, 1001, dtype=torch.float64)
        c = schedule.at(t)
        p, q = self.coefficients(c)
        determinant = c.alpha * q - c.sigma * p
        # Relative to the lengths of both rows: the sine of the angle between them.
        angle = determinant.abs() / (torch.hypot(c.alpha, c.sigma) * torch.hypot(p, q))
        lost = angle < 1e-12
        for need in needs:
            if _QUANTITIES[need] != self.kind and bool(lost.any()):
                raise ValueError(
                    f"A network that predicts {self.kind!r} does not determine {need} at t={float(t[lost][0]):g} of "
                    f"{type(schedule).__name__}: use 'v_prediction', or a schedule that keeps some signal there."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Parametrization:
        return self


_QUANTITIES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction", "flow": "flow"}


def _combination(kind: str, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(p, q) of p x0 + q eps for the kinds that need no sigma_data."""
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    table = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-c.sigma, c.alpha), "flow": (-one, one)}
    return table[kind]


@dataclass(frozen=True, eq=False)
class Activations:
    """What a network sees in x_t, without what it predicts.

    Attributes:
        x_t: (batch, ...) the noised input.
        features: inner activations, by name.
    """

    x_t: Tensor
    features: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's output at x_t, and everything that follows from it; each quantity is solved when first asked for.

    Attributes:
        x_t: (batch, ...) the noised input.
        output: the network's answer y, shaped like x_t.
        coefficients: of the schedule at the time of the call, () or (batch,).
        parametrization: what y stands for.
        features: the inner activations that were asked for, by name.
    """

    x_t: Tensor
    output: Tensor
    coefficients: Coefficients
    parametrization: Parametrization
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def combine(self, a: Tensor | float, b: Tensor | float) -> Tensor:
        """a x0 + b eps, from one solve of [alpha sigma; p q][x0; eps] = [x_t; y].

        Args:
            a, b: numbers, () or (batch,).

        Returns:
            shaped like x_t, in its dtype; the scalars are solved in float64.
        """
        c = self.coefficients
        p, q = self.parametrization.coefficients(c)
        determinant = c.alpha * q - c.sigma * p
        # a x0 + b eps = A x_t + B y  needs  A alpha + B p = a  and  A sigma + B q = b.
        on_x_t = (a * q - b * p) / determinant
        on_output = (c.alpha * b - c.sigma * a) / determinant
        return weighted_sum(on_x_t, self.x_t, on_output, self.output)

    def shifted(self, delta: Tensor) -> Prediction:
        """The prediction whose eps is larger by `delta` at the same x_t, and whose x0 follows; same parametrization.

        Where alpha is 0, x_t is nothing but noise: no eps but its own fits it, and the prediction stays as it is.

        Args:
            delta: shaped like x_t, finite; -sigma g adds g to the score.
        """
        c = self.coefficients
        p, q = self.parametrization.coefficients(c)
        # y = p x0 + q eps with x0 = (x_t - sigma eps) / alpha.
        slope = torch.where(c.alpha == 0, 0.0, (c.alpha * q - c.sigma * p) / c.alpha)
        return replace(self, output=weighted_sum(torch.ones_like(slope), self.output, slope, delta))

    def _quantity(self, kind: str) -> Tensor:
        # What is predicted directly stays determined where the solve is singular, and stays exact.
        if kind == self.parametrization.kind:
            return self.output
        return self.combine(*_combination(kind, self.coefficients))

    @cached_property
    def x0(self) -> Tensor:
        """The clean data, E[x0 | x_t] for a perfect network."""
        return self._quantity("sample")

    @cached_property
    def eps(self) -> Tensor:
        """The noise, E[eps | x_t] for a perfect network."""
        return self._quantity("epsilon")

    @cached_property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans & Ho 2022, section 4)."""
        return self._quantity("v_prediction")

    @cached_property
    def flow(self) -> Tensor:
        """eps - x0, the velocity of a rectified flow whatever the schedule."""
        return self._quantity("flow")

    @cached_property
    def velocity(self) -> Tensor:
        """dx_t/dt = d_alpha x0 + d_sigma eps, the probability-flow ODE in the schedule's own time."""
        return self.combine(self.coefficients.d_alpha, self.coefficients.d_sigma)

    @cached_property
    def score(self) -> Tensor:
        """grad_x log p_t(x_t) = -eps / sigma."""
        return scaled(-1 / self.coefficients.sigma, self.eps)
