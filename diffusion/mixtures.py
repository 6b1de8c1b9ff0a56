"""Gaussian mixtures: distributions whose noised densities, scores and denoisers are known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.noise import as_double
from sublimate.diffusion.predictions import Parametrization, Prediction
from sublimate.diffusion.schedules import Schedule


class GaussianMixture(nn.Module):
    """sum_k weights_k N(means_k, stds_k^2 I).

    The tensors are buffers: gradients reach whatever they were computed from.

    Args:
        weights: (K,) positive; normalised to sum 1.
        means: (K, d), or (batch, K, d) for one mixture per sample.
        stds: (K,) or (batch, K), positive; 0 is a point mass, fine once noise is added.

    Raises:
        ValueError: for shapes that do not fit together.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        super().__init__()
        if weights.ndim != 1 or means.ndim < 2 or means.shape[-2] != len(weights) or stds.shape != means.shape[:-1]:
            shapes = [tuple(value.shape) for value in (weights, means, stds)]
            raise ValueError(f"A mixture needs weights (K,), means (..., K, d) and stds (..., K), but got {shapes}.")
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def log_components(self, x: Tensor) -> Tensor:
        """log(weights_k N(x; means_k, stds_k^2 I)) of each x (batch, d); (batch, K)."""
        squared = (x.unsqueeze(-2) - self.means).square().sum(-1) / self.stds.square()
        d = self.means.shape[-1]
        return self.weights.log() - 0.5 * squared - d * self.stds.log() - 0.5 * d * math.log(2 * math.pi)

    def log_prob(self, x: Tensor) -> Tensor:
        """log density at x (batch, d); (batch,)."""
        return self.log_components(x).logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """grad_x log p at x (batch, d); (batch, d)."""
        share = self.log_components(x).softmax(-1)
        pull = (self.means - x.unsqueeze(-2)) / self.stds.square().unsqueeze(-1)
        return (share.unsqueeze(-1) * pull).sum(-2)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, (n, d), of one mixture (not one per sample)."""
        return self.sample_labelled(n, generator)[0]

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n draws (n, d) and the component each came from (n,)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(
            n, self.means.shape[-1], dtype=self.means.dtype, device=self.means.device, generator=generator
        )
        return self.means[k] + self.stds[k].unsqueeze(-1) * noise, k

    def marginal(self, alpha: Tensor | float, sigma: Tensor | float) -> GaussianMixture:
        """The distribution of alpha x0 + sigma eps.

        Args:
            alpha, sigma: numbers or (), or (batch,) for one mixture per sample.
        """
        like = self.means
        a, s = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (alpha, sigma))
        # (..., 1) beside the components; expanded, so that one of the two may be a number.
        a, s = (value.unsqueeze(-1) for value in torch.broadcast_tensors(a, s))
        return GaussianMixture(self.weights, a.unsqueeze(-1) * like, ((a * self.stds).square() + s.square()).sqrt())


class MixtureDenoiser(Denoiser):
    """The perfect denoiser of a Gaussian mixture, in a denoiser's place.

    With "text" in the condition, labels (batch,) choose a class: x0 is then known to come from the components of that
    class; the label after the last class is the null, the whole mixture.

    Args:
        mixture: the clean data; images are flattened to its d.
        schedule: what t means.
        labels: (K,) the class 0, 1, ... of each component; each its own unless given.
        parametrization: what the output stands for.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        schedule: Schedule,
        labels: Tensor | None = None,
        parametrization: Parametrization | None = None,
    ) -> None:
        parametrization = Parametrization("sample") if parametrization is None else parametrization
        super().__init__(mixture, _no_call, schedule, parametrization)
        components = torch.arange(len(mixture.weights)) if labels is None else labels
        classes = torch.arange(int(components.max()) + 1)
        member = torch.cat([components == classes[:, None], torch.ones(1, len(components), dtype=torch.bool)])
        self.member: Tensor
        self.register_buffer("member", member)

    def forward(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | None = None, *, features: Sequence[str] = ()
    ) -> Prediction:
        """The exact prediction; arguments as in `Denoiser`, computed in float64.

        Raises:
            ValueError: for features, of which there are none.
        """
        if features:
            raise ValueError(f"A mixture has no features, but {list(features)} were asked for.")
        c = self.schedule.at(as_double(t, x_t.device))
        x = x_t.flatten(1).to(torch.float64)
        x0 = self._posterior_mean(x, c.alpha, c.sigma, condition)
        eps = (x - c.alpha.unsqueeze(-1) * x0) / c.sigma.unsqueeze(-1)
        output = x0 if self.parametrization.kind == "sample" else self.parametrization.target(x0, eps, c)
        return Prediction(x_t, output.reshape(x_t.shape).to(x_t.dtype), c, self.parametrization)

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Condition | None) -> Tensor:
        """E[x0 | x_t], (batch, d)."""
        clean: GaussianMixture = self.network  # type: ignore[assignment]
        means, stds = clean.means.double(), clean.stds.double()
        noised = GaussianMixture(clean.weights.double(), means, stds).marginal(alpha, sigma)
        logits = noised.log_components(x)
        if condition is not None and "text" in condition:
            logits = logits.masked_fill(~self.member[condition["text"]], -torch.inf)
        # Within a component: m_k + alpha s_k^2 / (alpha^2 s_k^2 + sigma^2) (x_t - alpha m_k).
        gain = alpha.unsqueeze(-1) * stds.square() / noised.stds.square()
        each = means + gain.unsqueeze(-1) * (x.unsqueeze(-2) - noised.means)
        return (logits.softmax(-1).unsqueeze(-1) * each).sum(-2)


def _no_call(*arguments: object) -> tuple[Tensor, dict[str, Tensor]]:
    raise TypeError("A mixture is no network: call the MixtureDenoiser itself.")
