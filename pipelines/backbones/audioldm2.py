"""AudioLDM 2: a cross-attention UNet on latents of log-mel spectrograms, with a vocoder after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.autoencoders import decode_media, encode_media
from sublimate.pipelines.backbones.base import Backbone, EntryPoint, Network, Pipeline, StockSampling, refuse_unknown
from sublimate.pipelines.features import tapped, unet_taps
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.one_step import ddim_at
from sublimate.pipelines.stock_few_steps import table_sampling
from sublimate.pipelines.tokens import TokenSpan, prompt_span, tokenize

T5_LENGTH = 512
"""T5 tokens per prompt, unless the tokenizer's limit is lower."""


class AudioLDM2(Backbone):
    """`AudioLDM2Pipeline` for sound and music (Liu et al. 2023, arXiv 2308.05734).

    Media are spectrograms (batch, 1, frames, mel bins): natural logarithms of mel magnitudes, without bounds. `height`
    is their number of frames, `width` the vocoder's number of bins.

    "text" holds the states that a language model appends to what CLAP and T5 make of the prompt, "text.t5" T5's own
    states and "text.mask" which of those are tokens. The stock pipeline pads the prompts of a call to the longest, and
    the language model counts its positions from the padding on, so that there a prompt's condition depends on the
    prompts beside it. Here every prompt is encoded as if alone.
    """

    pipeline_classes = ("AudioLDM2Pipeline",)
    network_attribute = "unet"
    text_components = ("text_encoder", "text_encoder_2", "projection_model", "language_model")
    guidance_scale = 3.5
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    medium = "audio"
    media_range = None

    def components(self, pipe: Pipeline) -> dict[str, nn.Module]:
        return {**super().components(pipe), "vocoder": pipe.vocoder}

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys = ("text", "text.t5", "text.mask")
        if not set(keys) <= condition.keys():
            raise ValueError("AudioLDM 2 needs a text condition: encode a prompt, '' for none.")
        refuse_unknown(condition, keys, network)
        if network.is_gradient_checkpointing:
            network.enable_gradient_checkpointing(_checkpoint)
        with tapped(network, features) as taps:
            y = network(
                x_in,
                t_net,
                encoder_hidden_states=condition["text"],
                encoder_hidden_states_1=condition["text.t5"],
                encoder_attention_mask_1=condition["text.mask"],
            ).sample
        return y, taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        factor, bins = pipe.vae_scale_factor, pipe.vocoder.config.model_in_dim
        frames = pipe.unet.config.sample_size * factor if height is None else height
        if frames <= 0 or frames % factor:
            raise ValueError(f"Spectrograms must have a multiple of {factor} frames, not {frames}.")
        if width not in (None, bins):
            raise ValueError(f"This model's spectrograms have {bins} mel bins, not {width}.")
        return (pipe.unet.config.in_channels, frames // factor, bins // factor)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        if pipe.text_encoder_2.config.model_type == "vits":
            raise ValueError("This AudioLDM 2 speaks transcriptions, not prompts: use a checkpoint with a T5 encoder.")
        clap_ids, clap_mask = tokenize(pipe.tokenizer, prompts)
        t5_ids, t5_mask = tokenize(pipe.tokenizer_2, prompts, _t5_length(pipe))
        device = pipe.unet.device
        clap = pipe.text_encoder.get_text_features(clap_ids.to(device), attention_mask=clap_mask.to(device))
        # transformers 5 returns the feature as one of several outputs, transformers 4 alone.
        clap = getattr(clap, "pooler_output", clap)[:, None]
        # Prompts of one length need no padding among themselves.
        lengths = t5_mask.sum(1)
        rows, generated, states = [], [], []
        for length in lengths.unique().tolist():
            same = (lengths == length).nonzero()[:, 0]
            t5 = pipe.text_encoder_2(t5_ids[same, :length].to(device)).last_hidden_state
            both = pipe.projection_model(hidden_states=clap[same], hidden_states_1=t5).hidden_states
            rows.append(same)
            generated.append(_continued(pipe.language_model, both))
            states.append(F.pad(t5, (0, 0, 0, t5_ids.shape[1] - length)))
        order = torch.cat(rows).argsort()
        t5 = torch.cat(states)[order]
        return Condition({"text": torch.cat(generated)[order], "text.t5": t5, "text.mask": t5_mask.to(t5)})

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        if images.shape[1] != 1:
            raise ValueError(f"AudioLDM 2 encodes spectrograms (batch, 1, frames, bins), not {tuple(images.shape)}.")
        return encode_media(pipe.vae, images)

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        return decode_media(pipe.vae, latents)

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        return StockSampling(
            "AudioLDM2Pipeline", ddim_at(pipe.scheduler, t), {"num_inference_steps": 1, **self.no_guidance}
        )

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call = table_sampling(pipe.scheduler, self.schedule(pipe), few)
        if "timesteps" in call:
            raise ValueError("AudioLDM2Pipeline cannot be told timesteps: sample at times of the table's own grid.")
        if few.guidance_scale != 1:
            raise ValueError("AudioLDM2Pipeline pads its null prompt to each call's longest: set guidance_scale to 1.")
        return StockSampling("AudioLDM2Pipeline", scheduler, {**call, **self.no_guidance}, few)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return unet_taps(network)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        points = []
        for block_name, block in pipe.unet.named_modules():
            if not hasattr(block, "attentions"):
                continue
            # A block goes through one attention per entry, again and again; None attends to the sound itself.
            for i, attention in enumerate(block.attentions):
                place = i % len(block.cross_attention_dim)
                if block.cross_attention_dim[place] is None:
                    continue
                key = "text" if place < 2 else "text.t5"
                points += [
                    EntryPoint(
                        "unet",
                        f"{block_name}.attentions.{i}.{name}",
                        key,
                        slice(0, layer.in_features),
                        layer.bias is not None,
                    )
                    for name, layer in attention.named_modules()
                    if name.endswith(("attn2.to_k", "attn2.to_v"))
                ]
        return points

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        return (prompt_span(pipe.tokenizer_2, prompt, _t5_length(pipe), key="text.t5"),)

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        raise ValueError(
            "No row of AudioLDM 2's text belongs to one concept, since its language model mixes them: choose a method "
            "that edits by whole prompts."
        )


def _t5_length(pipe: Pipeline) -> int:
    return min(pipe.tokenizer_2.model_max_length, T5_LENGTH)


def _continued(language_model: Any, states: Tensor) -> Tensor:
    """The states that a language model appends to some, (batch, max_new_tokens, width)."""
    new, past, appended = states, None, []
    for _ in range(getattr(language_model.config, "max_new_tokens", 8)):
        output = language_model(inputs_embeds=new, past_key_values=past, use_cache=True, output_hidden_states=True)
        new, past = output.hidden_states[-1][:, -1:], output.past_key_values
        appended.append(new)
    return torch.cat(appended, dim=1)


def _checkpoint(module: nn.Module, *inputs: Any) -> Any:
    """Recomputes a module in the backward pass.

    diffusers 0.42 hands an attention its arguments in an order that it does not have, which makes the text's mask
    that of the sound.
    """
    if isinstance(module, Transformer2DModel):
        x, text, timestep, labels, options, mask, text_mask = inputs
        inputs = (x, text, timestep, None, labels, options, mask, text_mask, False)
    return checkpoint(module, *inputs, use_reentrant=False)
