"""A student whose trained weights are text encoders', while the denoiser that it speaks to stays frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure.eraser import Changes
from sublimate.erasure.fine_tuning import StudentConfig, StudentObjective
from sublimate.erasure.prompt_bank import PromptBank, concept_groups, with_guidance
from sublimate.erasure.request import Concept
from sublimate.erasure.targets import squared_error
from sublimate.pipelines.gradient_checkpointing import enable_gradient_checkpointing
from sublimate.pipelines.model import Model
from sublimate.training.players import Player, PlayerConfig, make_player, shared_copy

TextRule = Literal["mlp-final-attn", "mlp", "attn", "mlp-attn", "all"]
"""Which weights of a text encoder train; see `select_text`."""

_RULES: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "mlp": lambda name: ".mlp." in name,
        "attn": lambda name: ".self_attn." in name,
        "mlp-attn": lambda name: ".mlp." in name or ".self_attn." in name,
        "all": lambda name: True,
    }
)


def text_encoders(model: Model) -> dict[str, Any]:
    """The text encoders that can be moved, by component: all CLIPs of the model.

    T5 stays as it is: its states serve many words at once, and the published methods say nothing of it. What a model
    with a T5 (SD3) reads there of a concept, it still reads.

    Raises:
        ValueError: when the model has no CLIP text encoder, or is shown pictures beside the text.
    """
    named = {name: model.components().get(name) for name in model.backbone.text_components}
    clips = {n: m for n, m in named.items() if isinstance(m, CLIPTextModel | CLIPTextModelWithProjection)}
    if model.backbone.shown:
        raise ValueError(f"{model.source} sees pictures beside the text: use an eraser that needs none, such as uce.")
    if not clips:
        raise ValueError(f"{model.source} has no CLIP text encoder to move: use an eraser that moves the denoiser.")
    return clips


def select_text(encoders: Mapping[str, Any], rule: TextRule) -> frozenset[str]:
    """Names, component first ("text_encoder.encoder.layers.0.…"), of the parameters that a rule lets train.

    - "mlp": the two linear layers of every block's MLP.
    - "mlp-final-attn": these and the self-attention of each encoder's last block (few-shot erasing).
    - "attn": every block's self-attention.
    - "mlp-attn": both.
    - "all": everything, embeddings, norms and projections too.

    Args:
        encoders: by component.
        rule: the rule's name.

    Raises:
        ValueError: for an unknown rule, or when there are no such weights.
    """
    if rule != "mlp-final-attn" and rule not in _RULES:
        raise ValueError(f"There is no text rule {rule!r}: use mlp-final-attn, {', '.join(_RULES)}.")
    chosen = set()
    for component, encoder in encoders.items():
        names = [name for name, _ in encoder.named_parameters()]
        last = f".layers.{encoder.config.num_hidden_layers - 1}.self_attn."
        matches = _RULES["mlp" if rule == "mlp-final-attn" else rule]
        chosen |= {
            f"{component}.{name}" for name in names if matches(name) or (rule == "mlp-final-attn" and last in name)
        }
    if not chosen:
        raise ValueError(f"The text encoders have no weights of the rule {rule!r}: use 'all'.")
    return frozenset(chosen)


class TextStudent:
    """Copies of a model's CLIP text encoders in which selected weights train; all others share the model's storage.

    Args:
        model: where training starts; stays as it is.
        names: which weights, as `select_text` names them.
        player: its optimiser's options.

    Raises:
        ValueError: when the model has no such encoder, or is not in float32.
    """

    def __init__(self, model: Model, names: frozenset[str], player: PlayerConfig) -> None:
        if model.dtype != torch.float32:
            raise ValueError(
                f"{model.source} is open in {model.dtype}: to train its text encoders, open it in float32."
            )
        self.player: Player = make_player(nn.ModuleDict(text_encoders(model)), player, names=names)
        self.backbone = model.backbone
        # A stock pipeline like the model's, but with these encoders; everything else is the very same.
        self.pipeline = copy.copy(model.pipeline)
        for component, encoder in self.encoders.items():
            setattr(self.pipeline, component, encoder)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The copies, by component."""
        return dict(self.player.module.named_children())

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told for each prompt, differentiable in the trained weights.

        Raises:
            ValueError: for a prompt longer than the tokenizer's limit, naming it.
        """
        return self.backbone.encode_prompts(self.pipeline, prompts)

    def keyed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of trained weights under their full parameter keys ("text_encoder/…")."""
        return {name.replace(".", "/", 1): value.detach() for name, value in values.items()}


class TextBank(PromptBank):
    """Prompts in groups that a student's encoders read anew each time, with gradients; drawn as in `PromptBank`.

    Args:
        model: the student's base.
        student: encodes the prompts.
        groups, guidance: as in `PromptBank`.
    """

    def __init__(
        self,
        model: Model,
        student: TextStudent,
        groups: Sequence[Sequence[str]],
        guidance: float | None = None,
    ) -> None:
        super().__init__(model, groups, guidance)
        self.student, self.prompts = student, [prompt for group in groups for prompt in group]

    def condition(self, rows: Tensor, device: torch.device | str) -> Condition:
        told = self.student.encode_prompts([self.prompts[row] for row in rows.tolist()])
        return with_guidance(told, self.guidance).to(device)

    def unmoved(self, rows: Tensor, device: torch.device | str) -> Condition:
        """What the model's own encoders say of these rows."""
        return super().condition(rows, device)


class TextStudentObjective(StudentObjective):
    """Predicts with the frozen denoiser, told what the student's encoders say: gradients reach them alone.

    `student` is the frozen network over the same weights, and every bank that `bank` makes is read by the student's
    encoders, so that a subclass predicts `student(x_t, t, bank.condition(rows))` as one that trains the denoiser does.
    What `frozen` is to be told is `bank.unmoved(rows)`.
    """

    text: TextStudent
    erased: TextBank
    kept: TextBank | None

    def make_player(self, model: Model, config: Any) -> Player:
        names = select_text(text_encoders(model), config.weights)
        self.text = TextStudent(model, names, self.optimiser(config))
        self._denoiser = shared_copy(model.denoiser)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self._denoiser)
        return self.text.player

    def unread(self, model: Model) -> list[str]:
        return [name for name in super().unread(model) if name not in model.backbone.text_components]

    @staticmethod
    def optimiser(config: Any) -> PlayerConfig:
        """Options of Adam, without weight decay unless a subclass says otherwise."""
        return PlayerConfig(learning_rate=config.learning_rate, adam_weight_decay=0.0)

    @property
    def student(self) -> Denoiser:
        return self._denoiser  # type: ignore[return-value]

    def bank(
        self, model: Model, concepts: Sequence[Concept], templates: Sequence[str], *, anchored: bool = False
    ) -> TextBank:
        return TextBank(model, self.text, concept_groups(concepts, templates, anchored=anchored), self.guidance)

    def moved(self, bank: TextBank, rows: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """|y(x_t, t, T_phi(c)) - y(x_t, t, T(c))|^2 per sample: what the encoders' move does for a bank's rows."""
        with torch.no_grad():
            before = self.frozen(x_t, t, bank.unmoved(rows, x_t.device))
        return squared_error(self.student(x_t, t, bank.condition(rows, x_t.device)), before)

    def changes(self, model: Model) -> Changes:
        return Changes(values=self.text.keyed(self.player.trainable()))


class TextStudentConfig(StudentConfig):
    """Options of a run that trains text encoders.

    Attributes:
        weights: which of their weights train; see `select_text`.

    The others are `StudentConfig`'s and `RunConfig`'s.
    """

    weights: TextRule = "mlp-final-attn"
