"""Which attention kernel the denoiser uses: chosen, and then proven by watching it run."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.models import attention_processor as stock
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sublimate.pipelines.model import Model
from sublimate.pipelines.negative_attention import attention_layers, reads_negatives

log = logging.getLogger(__name__)

_SDPA_KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

Kernel = Literal["auto", "sdpa", "math", "flash", "efficient", "cudnn", "eager", "xformers"]
"""What can be asked for.

"auto" is what diffusers chooses; "sdpa" torch's scaled_dot_product_attention with whichever kernel fits; "math",
"flash", "efficient" and "cudnn" that function with this kernel and no other; "eager" softmax written out, which has
forward-mode and higher derivatives; "xformers" its memory-efficient attention.
"""

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

# Processors that have a counterpart in xformers.
_XFORMERS: dict[str, type] = {
    "AttnProcessor2_0": stock.XFormersAttnProcessor,
    "JointAttnProcessor2_0": stock.XFormersJointAttnProcessor,
}

# Linear attention is two products of matrices: it has no softmax, and no kernel to choose.
_LINEAR = frozenset({"SanaLinearAttnProcessor2_0"})

# How the kernels show among the operators that run; the longest match counts.
_TRACES = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_safe_softmax": "math",
    "_softmax": "eager",
}


@dataclass(frozen=True)
class AttentionReport:
    """What really ran.

    Attributes:
        requested: what was asked for.
        kernels: by class of the attention processor, the kernels that ran in it; none in linear attention.
    """

    requested: str
    kernels: Mapping[str, tuple[str, ...]]

    @property
    def kernel(self) -> str:
        """The kernels of all processors, "none" for a network without attention."""
        return "+".join(sorted({kernel for found in self.kernels.values() for kernel in found})) or "none"

    def __str__(self) -> str:
        return f"attention: {self.kernel} ran, {self.requested} was asked for"


class ChosenProcessor:
    """An attention processor that runs with one kernel, and remembers which processor was there before."""

    def __init__(self, run: Any, original: Any, kernel: str) -> None:
        self.run, self.original, self.kernel = run, original, kernel

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Any = None,
        **kwargs: Any,
    ) -> Any:
        # The parameters are spelled out because diffusers drops what it does not find in this signature. The fifth is
        # a rotary embedding where a network has that; not every processor has one.
        others = () if temb is None else (temb,)
        with self._context():
            result = self.run(attn, hidden_states, encoder_hidden_states, attention_mask, *others, **kwargs)
        # The forward-mode derivative of the group norms that follow fails on the transposed result.
        return result.contiguous() if self.kernel == "eager" and isinstance(result, Tensor) else result

    def _context(self) -> AbstractContextManager[Any]:
        if self.kernel in _SDPA_KERNELS:
            return sdpa_kernel(_SDPA_KERNELS[self.kernel])
        return _WrittenOut() if self.kernel == "eager" else nullcontext()


class _WrittenOut(TorchFunctionMode):
    """Replaces torch's fused attention by its formula, which has derivatives of every kind and order."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), on the last two dimensions."""
    if is_causal or any(others.values()):
        raise NotImplementedError("eager attention has no causal mask and no grouped queries")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        hidden = float("-inf")
        scores = scores.masked_fill(~attn_mask, hidden) if attn_mask.dtype == torch.bool else scores + attn_mask
    return functional.dropout(scores.softmax(dim=-1), dropout_p) @ value


def set_attention(model: Model, kernel: str = "auto") -> AttentionReport:
    """Chooses the denoiser's attention kernel and proves the choice with one forward pass.

    Text encoders and autoencoder keep theirs, and linear attention stays as it is. Players made afterwards inherit the
    choice.

    Args:
        model: changed in place, or left as it was when the choice cannot be honoured.
        kernel: one of `KERNELS`.

    Returns:
        Which kernels ran.

    Raises:
        ValueError: for an unknown kernel, or one that this family, device or installation cannot run.
    """
    if kernel not in KERNELS:
        raise ValueError(f"There is no attention kernel {kernel!r}; use one of {', '.join(KERNELS)}.")
    if kernel == "xformers":
        _check_xformers(model.device)
    if reads_negatives(model.denoiser.network):
        raise ValueError("Choose the attention kernel before what reads negative prompts is installed: remove that.")
    layers = attention_layers(model.denoiser.network)
    before = [layer.processor for layer in layers.values()]
    chosen = [_processor(layer.processor, kernel, type(model.denoiser.network).__name__) for layer in layers.values()]
    try:
        _install(layers, chosen)
        report = AttentionReport(kernel, _watch(model, layers))
        _verify(report)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        _install(layers, before)
        if isinstance(error, ValueError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The attention kernel {kernel!r} does not run here on {model.device} ({reason})") from error
    return report


@contextmanager
def attention_chosen(
    model: Model, kernel: Kernel | None, *, autocast: bool = False
) -> Iterator[AttentionReport | None]:
    """`set_attention` for a while: afterwards every layer has the processor that it had.

    What ran is yielded, and logged at level INFO.

    Args:
        model: where it will run: kernels are proven on its device.
        kernel: None leaves everything as it is.
        autocast: prove it under bf16 autocast, for what will run so; GPUs' flash kernels know half precision alone.

    Raises:
        ValueError: as `set_attention`.
    """
    if kernel is None:
        yield None
        return
    layers = attention_layers(model.denoiser.network)
    before = [layer.processor for layer in layers.values()]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        report = set_attention(model, kernel)
    log.info("%s", report)
    try:
        yield report
    finally:
        _install(layers, before)


def attention_report(model: Model) -> AttentionReport:
    """Which attention kernels the denoiser uses as it is, from one forward pass."""
    return AttentionReport("as it is", _watch(model, attention_layers(model.denoiser.network)))


def _original(processor: Any) -> Any:
    return processor.original if isinstance(processor, ChosenProcessor) else processor


def _processor(current: Any, kernel: str, network: str) -> Any:
    original = _original(current)
    if kernel == "auto" or type(original).__name__ in _LINEAR:
        return original
    if hasattr(original, "_attention_backend"):
        # It runs whichever of diffusers' backends it was told of, and the kernels of torch through "native" alone.
        run = copy.copy(original)
        run._attention_backend = "xformers" if kernel == "xformers" else "native"
        return ChosenProcessor(run, original, kernel)
    if kernel == "sdpa":
        return original
    if kernel != "xformers":
        return ChosenProcessor(original, original, kernel)
    name = type(original).__name__
    if name not in _XFORMERS:
        raise ValueError(f"{network}'s {name} has no counterpart in xformers: use 'auto'.")
    return ChosenProcessor(_XFORMERS[name](), original, kernel)


def _install(layers: Mapping[str, Any], processors: list[Any]) -> None:
    for layer, processor in zip(layers.values(), processors, strict=True):
        layer.set_processor(processor)


def _check_xformers(device: torch.device) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise ValueError("xformers is not installed: pip install 'sublimate[xformers]', or use 'auto'.")
    if device.type != "cuda":
        raise ValueError(f"xformers has no kernels for {device.type}: move the model to a GPU first, or use 'auto'.")


def _verify(report: AttentionReport) -> None:
    """Makes sure that what ran is what was asked for."""
    allowed = {"auto": None, "sdpa": set(_SDPA_KERNELS)}.get(report.requested, {report.requested})
    for processor, ran in report.kernels.items():
        if allowed is not None and processor not in _LINEAR and not (ran and set(ran) <= allowed):
            found = " and ".join(ran) or "nothing"
            raise ValueError(
                f"{report.requested!r} attention was asked for, but {processor} ran {found}: use 'auto' here."
            )


def _watch(model: Model, layers: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Runs the denoiser once on zeros of its own size and collects the kernels of every processor class."""
    ran: dict[str, set[str]] = {type(_original(layer.processor)).__name__: set() for layer in layers.values()}
    x_t = torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype)
    with torch.no_grad(), _kernels_within(layers, ran):
        model.denoiser(x_t, model.schedule.t_max, model.any_condition())
    return {name: tuple(sorted(kernels)) for name, kernels in ran.items()}


@contextmanager
def _kernels_within(layers: Mapping[str, Any], ran: dict[str, set[str]]) -> Iterator[None]:
    """Notes the attention kernels that run inside each layer, under the class of its processor."""
    inside: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    handles = []
    try:
        for layer in layers.values():
            handles.append(layer.register_forward_pre_hook(enter(type(_original(layer.processor)).__name__)))
            handles.append(layer.register_forward_hook(lambda *_: inside.pop() and None))
        with _OperatorLog(lambda operator: ran[inside[-1]].update(_kernel(operator)) if inside else None):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _OperatorLog(TorchDispatchMode):
    """Tells `seen` the name of every operator that runs."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen(str(func))
        return func(*args, **(kwargs or {}))


def _kernel(operator: str) -> set[str]:
    if operator.startswith("xformers"):
        return {"xformers"}
    name = operator.removeprefix("aten.")
    return {kernel for trace, kernel in _TRACES.items() if name.startswith(trace)}
