"""Adversaries: what brings a concept back by searching the words a model reads, for robust erasers and for attacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure.trajectories import noised
from sublimate.pipelines.model import Model
from sublimate.training.losses import denoising_loss
from sublimate.training.randomness import SampleRandom


class SoftWords:
    """Learned word embeddings: wherever a prompt says `words`, the text encoders read these vectors instead.

    Within `spoken()` everything that encodes prompts with the model does so, differentiably in the vectors.

    Args:
        model: whose text encoders read prompts; its weights stay as they are.
        words: what stands for the vectors in prompts, "the the": as many vectors per encoder as it has tokens there.
            They start as the embeddings of `start`.
        start: words whose embeddings, repeated as often as it takes, the vectors start from; `words` unless given.
        encoders: read in the place of the model's text encoders of the same names, such as a student's.

    Attributes:
        values: by text encoder, (tokens, width) float32 for all prompts, or (prompts, tokens, width) for the prompts
            of one call, each its own.

    Raises:
        ValueError: when the model has no text encoder, or the words have no tokens.
    """

    def __init__(
        self, model: Model, words: str, *, start: str = "", encoders: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.words = words
        self._tables: dict[str, list[nn.Embedding]] = {}
        self._ids: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        present = {**model.components(), **(encoders or {})}
        for name in (name for name in model.backbone.text_components if name in present):
            tokenizer = getattr(model.pipeline, name.replace("text_encoder", "tokenizer"))
            ids, first = (tokenizer(said, add_special_tokens=False).input_ids for said in (words, start or words))
            if not (ids and first):
                raise ValueError(f"The words {words!r} have no tokens: give at least one word.")
            encoder: Any = present[name]
            table = encoder.get_input_embeddings().weight
            # T5 reads its table through a second module over the same weight.
            self._tables[name] = [
                module for module in encoder.modules() if isinstance(module, nn.Embedding) and module.weight is table
            ]
            self._ids[name] = torch.tensor(ids)
            rows = [first[i % len(first)] for i in range(len(ids))]
            self.values[name] = table.detach()[rows].float().clone().requires_grad_(True)
        if not self.values:
            raise ValueError(f"{model.source} has no text encoder, so there are no words to learn.")

    def tables(self) -> dict[str, Tensor]:
        """All embeddings of each text encoder, (vocabulary, width)."""
        return {name: modules[0].weight for name, modules in self._tables.items()}

    @contextlib.contextmanager
    def spoken(self) -> Iterator[None]:
        """Within this context the vectors stand in the words' places."""
        hooks = [
            module.register_forward_hook(self._placed(name))
            for name, modules in self._tables.items()
            for module in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _placed(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(table: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            own, (ids, *_) = self._ids[name], inputs
            if len(own) > ids.shape[1]:
                return output
            found = (ids.unfold(1, len(own), 1) == own.to(ids.device)).all(dim=-1)
            rows = found.any(dim=1).nonzero()
            # A prompt's first mention counts, as everywhere.
            places = found.int().argmax(dim=1)[rows] + torch.arange(len(own), device=ids.device)
            values = self.values[name].to(output)
            own_values = values[rows[:, 0]] if values.ndim == 3 else values.expand(len(rows), -1, -1)
            return output.index_put((rows, places), own_values)

        return hook


def denoising_error(
    denoiser: Denoiser, random: SampleRandom, latents: Tensor, condition: Callable[[Tensor], Condition]
) -> Tensor:
    """The diffusion loss on a random batch of pictures: low where the model knows what it is told they show.

    Args:
        denoiser: the model's, or one that trains.
        random: one stream per sample of the batch.
        latents: (count, *latent_shape) clean pictures, drawn from with replacement.
        condition: what the denoiser is told, from the chosen rows (batch,).

    Returns:
        the batch's mean.
    """
    rows = random.integers(len(latents))
    x0 = latents[rows.to(latents.device)]
    eps, u = random.normal(latents.shape[1:], x0.device), random.uniform(x0.device)
    x_t, t = noised(denoiser.schedule, x0, eps, u)
    return denoising_loss(denoiser(x_t, t, condition(rows)), x0, eps).mean()


def minimise(
    loss: Callable[[SampleRandom], Tensor],
    parameters: Sequence[Tensor],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    name: str,
    start: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool = False,
) -> torch.optim.Optimizer:
    """Adam on a few tensors.

    Args:
        loss: of a batch's random numbers; a scalar.
        parameters: what moves; nothing else gets a gradient.
        steps: how many updates.
        learning_rate: of Adam.
        batch_size: samples per update.
        seed: keys the random numbers, together with `name` and the step.
        name: of the search, for its random numbers and its bar.
        start, optimizer: continue an earlier call after its `start` updates.
        progress: show a bar.

    Returns:
        The optimiser, to continue with.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate) if optimizer is None else optimizer
    for step in tqdm(range(start, start + steps), desc=name, leave=False, disable=not progress):
        with torch.enable_grad():
            value = loss(SampleRandom(seed, step, name, range(batch_size)))
        gradients = torch.autograd.grad(value, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
