"""Which weights an eraser may change: name rules per architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from torch import nn

Rule = Literal["x", "x-strict", "u", "self", "encoder", "full"]
"""Which weights train; see `select`."""

# Parts of a network's parameter names, dots included, for networks with cross-attention (UNets, PixArt, Sana): text
# enters through attn2. The paper's "u" leaves out cross-attention, the output convolution and the embedding of time;
# for transformers that is also what modulates by time, and what prepares the text.
_OUTSIDE = re.compile(
    r"conv_(norm_)?out\.|(time|add)_embedding\.|proj_out\.|scale_shift_table|adaln_single\.|time_embed\.|caption_"
)
_CROSS: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "x": lambda name: ".attn2.to_" in name,
        "x-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
        "u": lambda name: not (".attn2." in name or _OUTSIDE.match(name)),
        "self": lambda name: ".attn1.to_" in name,
        "encoder": lambda name: name.startswith(("conv_in.", "down_blocks.", "mid_block.")),
    }
)

# For joint attention (SD3, FLUX) text is a second stream with projections of its own; what SD3 calls attn2 is a second
# self-attention of the image. "u" leaves out the whole text stream, the output layers and the embeddings of time.
_TEXT_PROJECTIONS = re.compile(r"\.(add_[qkv]_proj|to_add_out)\.")
_TEXT_STREAM = re.compile(
    r"\.(add_[qkv]_proj|to_add_out|norm_added_[qk]|norm1_context|ff_context)\.|context_embedder\."
)
_JOINT: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "x": lambda name: bool(_TEXT_PROJECTIONS.search(name)),
        "x-strict": lambda name: ".add_k_proj." in name or ".add_v_proj." in name,
        "u": lambda name: not (_TEXT_STREAM.search(name) or re.match(r"(norm|proj)_out\.|time_text_embed\.", name)),
        "self": lambda name: bool(re.search(r"\.attn[12]?\.to_(q|k|v|out)\b", name)),
        "encoder": lambda name: False,
    }
)

# Told classes and no text: a class enters through its table, and is added to the time, with which it modulates the
# blocks by the projections of the sum.
_TABLE = re.compile(r"class_embed(ding|der)\.")
_MODULATION = re.compile(r"class_embed(ding|der)\.|\.norm1\.linear\.|\.time_emb_proj\.")
_CLASSES: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "x": lambda name: bool(_MODULATION.search(name)),
        "x-strict": lambda name: bool(_TABLE.search(name)),
        "u": lambda name: (
            not (
                _MODULATION.search(name)
                or re.search(r"timestep_embedder\.", name)
                or re.match(r"conv_(norm_)?out\.|proj_out_\d\.|time_embedding\.", name)
            )
        ),
        "self": lambda name: bool(re.search(r"\.(attn1|attentions\.\d+)\.to_", name)),
        "encoder": _CROSS["encoder"],
    }
)


def select(network: nn.Module, rule: Rule) -> frozenset[str]:
    """Names of the parameters that a rule lets train.

    - "x": the linear layers of cross-attention (q, k, v, out; no norms), for what is asked for by name: styles,
      persons. With joint attention: the text stream's projections. Where there are classes and no text: their tables
      and the projections of class and time that modulate the blocks.
    - "x-strict": its keys and values alone, the only layers that see text; the tables of classes alone.
    - "u": everything but cross-attention, the output layers and the time embedding, for what must go whatever the
      prompt: objects, nudity (the paper's rule; the authors' rewrite of 2025 also trains the layers left out here).
    - "self": self-attention.
    - "encoder": a UNet's way down and its middle. The embedding of time, which the way up reads too, is not of it.
    - "full": everything.

    Args:
        network: a denoising network of diffusers.
        rule: the rule's name.

    Raises:
        ValueError: for an unknown rule, or when the network has no such weights.
    """
    names = [name for name, _ in network.named_parameters()]
    if rule == "full":
        chosen = frozenset(names)
    elif rule not in _CROSS:
        raise ValueError(f"There is no weights rule {rule!r}: use x, x-strict, u, self, encoder or full.")
    else:
        takes, roles = _rules(names)[rule], _roles(network, names)
        chosen = frozenset(name for name in names if takes(roles[name]))
    if not chosen:
        raise ValueError(
            f"{type(network).__name__} has no weights of the rule {rule!r}: use 'full', or 'u' where there is no text."
        )
    return chosen


def _roles(network: nn.Module, names: Sequence[str]) -> Mapping[str, str]:
    """Names as the rules read them: an attn2 that attends to the picture itself, as in AudioLDM2, is an attn1."""
    layers = {name: module for name, module in network.named_modules() if name.endswith(".attn2")}
    itself = {name for name, layer in layers.items() if not getattr(layer, "is_cross_attention", True)}
    owners = {name: f"{name.partition('.attn2.')[0]}.attn2" for name in names}
    return {name: name.replace(".attn2.", ".attn1.") if owners[name] in itself else name for name in names}


def _rules(names: Sequence[str]) -> Mapping[str, Callable[[str], bool]]:
    """The rules of an architecture, told by its parameters' names."""
    if any(".add_k_proj." in name for name in names):
        return _JOINT
    # Some UNets are told a class (the level of noise on a picture) beside the text.
    without_text = not any(".attn2." in name for name in names)
    return _CLASSES if without_text and any(map(_TABLE.search, names)) else _CROSS
