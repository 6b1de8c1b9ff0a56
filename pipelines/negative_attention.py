"""NASA: steering away from a negative prompt inside cross-attention, for students that cannot be guided (SNOOPI)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition

NEGATIVE, MASK, STRENGTH = "negative", "negative.mask", "extra.negative_strength"
"""The condition's keys: the negative prompt's states (batch, tokens, width), which of them are tokens (batch, tokens)
for families whose text has a mask, and how far to steer away (batch,)."""

_TEXT = {NEGATIVE: "text", MASK: "text.mask"}


def as_negative(encoded: Condition) -> Condition:
    """An encoded prompt under the keys of a negative one; what does not reach attention is left out."""
    return Condition({key: encoded[text] for key, text in _TEXT.items() if text in encoded})


def negative_part(told: Mapping[str, Tensor]) -> Condition:
    """The entries that are a negative prompt."""
    return Condition({key: told[key] for key in _TEXT if key in told})


def without_negative(condition: Condition) -> Condition:
    """The other entries."""
    return Condition({key: value for key, value in condition.items() if key not in _TEXT})


def as_text(negative: Condition) -> Condition:
    """A negative prompt under the keys of a prompt: what `as_negative` was given."""
    return Condition({_TEXT[key]: value for key, value in negative.items()})


class NegativeAttention:
    """An attention processor that takes off what the negative prompt would contribute (arXiv 2412.02687, eqs. 7-9).

        Z = softmax(Q K+^T / sqrt(d)) V+ - strength softmax(Q K-^T / sqrt(d)) V-

    with the layer's own projections for both prompts. The output projection is affine, so that with its bias b

        W Z + b = out(c+) - strength (out(c-) - b),

    and both terms come from the processor that was there before, whatever kernel it runs. Strength 0 changes nothing.
    Self-attention passes through. The negative states arrive as arguments of the call, so a pass that is recomputed in
    the backward pass sees its own.
    """

    reads_negatives = True

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative: Tensor | None = None,
        strength: Tensor | None = None,
        negative_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # The parameters are spelled out because diffusers drops what it does not find in this signature.
        output = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        if negative is None or strength is None or encoder_hidden_states is None:
            return output
        away = _without_bias(attn, self.original(attn, hidden_states, negative, negative_mask, temb, **kwargs))
        return output - strength.to(output.dtype)[:, None, None] * away


class NegativeJointAttention:
    """The same for joint attention, whose text tokens are a stream of their own.

    The negative prompt's tokens follow the prompt's in that stream. Each prompt's tokens attend to the image and to
    themselves, as the other did not exist, and image queries take off what they would read from the negative tokens,

        Z = softmax(Q [K_image, K+]^T / sqrt(d)) [V_image, V+] - strength softmax(Q [K_image, K-]^T / sqrt(d)) [0, V-].

    The image stream is one, so that strength 0 is the plain network. Every term comes from the processor that was
    there before: it is affine in the values, and the one taken off is its output for image values of zero, less its
    bias. Both prompts' tokens are modulated by the prompt's pooled embedding; the negative one has none of its own.

    A layer of one stream, as of FLUX's single blocks, gets text and image as one sequence: `text` tokens, of which the
    first `tokens` are the prompt's, and then the image's. Rotary embeddings have a row for each token of all.
    """

    reads_negatives = True

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        tokens: int | None = None,
        text: int | None = None,
        strength: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # The parameters are spelled out because diffusers drops what it does not find in this signature.
        if tokens is None or strength is None or (encoder_hidden_states is None and text is None):
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        single = encoder_hidden_states is None
        if encoder_hidden_states is None:
            words, image = hidden_states[:, :text], hidden_states[:, text:]
        else:
            words, image = encoder_hidden_states, hidden_states

        def attend(layer: Any, part: slice) -> tuple[Tensor, Tensor]:
            """The image's output and that of a part of the text, for which the rest of the text is not there."""
            rotary = _rows_of(image_rotary_emb, part, words.shape[1])
            chosen = words[:, part]
            if not single:
                return self.original(layer, image, chosen, attention_mask, rotary, **kwargs)
            joined = self.original(layer, torch.cat([chosen, image], 1), None, attention_mask, rotary, **kwargs)
            return joined[:, chosen.shape[1] :], joined[:, : chosen.shape[1]]

        positive, negative = slice(0, tokens), slice(tokens, words.shape[1])
        seen, own = attend(attn, positive)
        _, other = attend(attn, negative)
        away, _ = attend(_ImageWithoutValues(attn, image.shape[1]), negative)
        seen = seen - strength.to(seen.dtype)[:, None, None] * _without_bias(attn, away)
        if single:
            return torch.cat([own, other, seen], dim=1)
        return seen, torch.cat([own, other], dim=1)


class _ImageWithoutValues:
    """A joint attention layer whose image tokens, the last of its stream, are attended to and contribute nothing."""

    def __init__(self, attn: Any, image: int) -> None:
        self.attn, self.image = attn, image

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)

    def to_v(self, stream: Tensor) -> Tensor:
        values = self.attn.to_v(stream)
        words = values.shape[1] - self.image
        return torch.cat([values[:, :words], torch.zeros_like(values[:, words:])], dim=1)


def _rows_of(rotary: tuple[Tensor, Tensor] | None, part: slice, text: int) -> tuple[Tensor, Tensor] | None:
    """The rotary embedding's rows of a part of the text's tokens and of the image's, which come after all `text`."""
    if rotary is None:
        return None
    cos, sin = (torch.cat([rows[part], rows[text:]]) for rows in rotary)
    return cos, sin


def _without_bias(attn: Any, output: Tensor) -> Tensor:
    """The linear part of an attention's output; an adapter on the output projection is part of it."""
    # Where a block projects what attention returns together with something else, the layer does not.
    projections = getattr(attn, "to_out", None)
    bias = None if projections is None else projections[0].bias
    return output if bias is None else output - bias / getattr(attn, "rescale_output_factor", 1.0)


_PROCESSORS = (NegativeAttention, NegativeJointAttention)


def takes_negatives(network: nn.Module) -> bool:
    """Whether negative attention is installed in a network."""
    return any(isinstance(layer.processor, _PROCESSORS) for layer in attention_layers(network).values())


def reads_negatives(network: nn.Module) -> bool:
    """Whether a network reads negative prompts by whatever processors it has."""
    return any(getattr(layer.processor, "reads_negatives", False) for layer in attention_layers(network).values())


def install_negative_attention(network: nn.Module) -> None:
    """Lets a network read the condition's "negative" and "extra.negative_strength"; without them it works as before.

    Choose an attention kernel first: `set_attention` acts on the processors that are there.

    Raises:
        ValueError: when it is installed already, or the network has no attention to text that it fits.
    """
    layers = attention_layers(network).values()
    if reads_negatives(network):
        raise ValueError(f"This {type(network).__name__} reads negative prompts already: remove what does so first.")
    joint = any(getattr(layer, "add_k_proj", None) is not None for layer in layers)
    if joint and any(getattr(layer, "fused_projections", False) for layer in layers):
        raise ValueError("Negative attention does not fit fused projections: call unfuse_qkv_projections first.")
    crossed = [layer for layer in layers if getattr(layer, "is_cross_attention", False)]
    if not joint and not crossed:
        raise ValueError(f"A {type(network).__name__} has no cross-attention and so no negative prompts.")
    told = signature(type(network).forward).parameters.keys()
    if "encoder_hidden_states_1" in told:
        raise ValueError(f"A {type(network).__name__} reads two texts: negative attention fits one.")
    if not told & {"cross_attention_kwargs", "joint_attention_kwargs"}:
        raise ValueError(f"A {type(network).__name__} tells its attention nothing but the text: no negative prompt.")
    if not joint and any(layer.residual_connection for layer in crossed):
        raise ValueError("Negative attention does not fit cross-attention that adds its own input.")
    for layer in layers:
        layer.set_processor((NegativeJointAttention if joint else NegativeAttention)(layer.processor))


def remove_negative_attention(network: nn.Module) -> None:
    """Puts back the processors that were there before."""
    for layer in attention_layers(network).values():
        if isinstance(layer.processor, _PROCESSORS):
            layer.set_processor(layer.processor.original)


@contextmanager
def negative_attention(network: nn.Module) -> Iterator[None]:
    """Within this context negative attention is installed; where it is already, nothing changes."""
    if takes_negatives(network):
        yield
        return
    install_negative_attention(network)
    try:
        yield
    finally:
        remove_negative_attention(network)


def negative_arguments(network: nn.Module, condition: Condition) -> dict[str, Tensor] | None:
    """What attention processors are told of a condition's negative prompt; None for nothing.

    "negative_mask" is the mask as a bias of the scores, (batch, 1, tokens), as diffusers' transformers make it.

    Raises:
        ValueError: when nothing in the network reads negative prompts, or prompt and strength do not come together.
    """
    if NEGATIVE not in condition and STRENGTH not in condition:
        return None
    if not reads_negatives(network):
        raise ValueError(
            f"This {type(network).__name__} cannot read a negative prompt: call install_negative_attention first."
        )
    if NEGATIVE not in condition or STRENGTH not in condition or condition[STRENGTH].ndim != 1:
        raise ValueError(f"Give {NEGATIVE!r} and {STRENGTH!r} together, the strength as one number per sample.")
    told = {"negative": condition[NEGATIVE], "strength": condition[STRENGTH]}
    if MASK in condition:
        told["negative_mask"] = (1 - condition[MASK].to(condition[NEGATIVE]))[:, None] * -10000.0
    return told


def attention_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that delegate to an attention processor, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "set_processor")}
