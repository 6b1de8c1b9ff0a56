"""DiT: a transformer on latents that is told a class instead of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.backbones.base import (
    Backbone,
    EntryPoint,
    Network,
    Pipeline,
    StockSampling,
    refuse_other_sizes,
    refuse_unknown,
)
from sublimate.pipelines.classes import class_names, find_class, read_classes
from sublimate.pipelines.features import block_taps, tapped
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.one_step import ddim_at
from sublimate.pipelines.stock_few_steps import steps_alone, table_sampling
from sublimate.pipelines.tokens import TokenSpan

STOCK_NULL = 1000
"""What `DiTPipeline` takes for no class, however many classes its transformer has."""


class ClassToImage(Backbone):
    """`DiTPipeline`. "text" is the class's number, (batch,) int64; the one after the last class stands for none.

    Every block has a table of the classes of its own, so a class enters through all of them.
    """

    pipeline_classes = ("DiTPipeline",)
    network_attribute = "transformer"
    guidance_scale = 4.0
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    discriminator_taps = 4

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "text" not in condition:
            raise ValueError("DiT needs a text condition: encode a class, '' for none.")
        refuse_unknown(condition, ("text",), network)
        for block in network.transformer_blocks:
            # Where it trains, the stock network drops classes at random, in each block others: objectives do that.
            block.norm1.emb.class_embedder.eval()
        with tapped(network, features) as taps:
            y = network(x_in, timestep=t_net, class_labels=condition["text"]).sample
        # A network that also predicts its variance does so in the second half of the channels.
        return y[:, : x_in.shape[1]], taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        size, factor = pipe.transformer.config.sample_size, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        refuse_other_sizes((size * factor, size * factor), height, width)
        return (pipe.transformer.config.in_channels, size, size)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        """Prompts are names or numbers of classes, '' for none; see `pipelines/classes.py`."""
        count = _classes(pipe)
        numbers = read_classes(prompts, class_names(pipe), count, null=count)
        return Condition({"text": torch.tensor(numbers, device=pipe.transformer.device)})

    def prompt_argument(self, pipe: Pipeline) -> str:
        return "class_labels=[0]"

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        call = {"num_inference_steps": 1, **self.no_guidance}
        return StockSampling("DiTPipeline", ddim_at(pipe.scheduler, t), call)

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call = table_sampling(pipe.scheduler, self.schedule(pipe), few)
        call = {**steps_alone("DiTPipeline", call), "guidance_scale": few.guidance_scale}
        if few.guidance_scale != 1 and _classes(pipe) != STOCK_NULL:
            raise ValueError(
                f"DiTPipeline takes {STOCK_NULL} for no class and this model {_classes(pipe)}, so it cannot guide it: "
                "train the student for a guidance_scale of 1."
            )
        return StockSampling("DiTPipeline", scheduler, call, few)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return block_taps(network.transformer_blocks, self.discriminator_taps)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        return [
            EntryPoint("transformer", name, "text", slice(0, module.num_embeddings), bias=False)
            for name, module in pipe.transformer.named_modules()
            if name.endswith("class_embedder.embedding_table")
        ]

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return find_class(self.encode_prompts(pipe, [prompt, concept]), prompt, concept)


def _classes(pipe: Pipeline) -> int:
    """How many classes there are, without the one that stands for none."""
    return int(pipe.transformer.config.num_embeds_ada_norm)
