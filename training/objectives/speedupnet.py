"""SpeedUpNet: an adapter that distils guidance by a negative prompt, then several steps in one (Chai et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import extrapolated
from sublimate.diffusion.predictions import add_noise
from sublimate.pipelines.negative_attention import NEGATIVE, STRENGTH
from sublimate.pipelines.speedupnet import (
    NAME,
    SpeedUpAttention,
    check_text,
    install_speedupnet,
    negative_strength,
)
from sublimate.training.consistency import GuidedSolver, jump
from sublimate.training.losses import squared_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player, shared_copy
from sublimate.training.teacher import Teacher


class SpeedUpNetConfig(ObjectiveConfig):
    """Options of SpeedUpNet. The paper's training settings are not public; these are ours.

    Attributes:
        guidance_scale: the teacher's guidance away from the negative prompt, which the adapter distils; also how the
            trained adapter is sampled unless another is asked for.
        guidance_range: from which the guidance is drawn for each sample, so that the adapter can be told any of it;
            None is always `guidance_scale`.
        stage1_steps: training steps of stage 1, guidance distillation alone.
        sampling_steps: steps the adapter is made to be sampled in, from noise to data.
        solver_steps: the teacher's guided steps that one of those shall equal.
        original_weight: of stage 1's loss in stage 2, so that the adapter can still be sampled in many steps; 0 leaves
            it out.
        no_negative: fraction of samples whose negative prompt is no text.
        positive: have a second branch, for the prompt itself.
        initial_scale: where the branches' scales start (see `SpeedUpAttention`): 0 is the teacher without guidance.
        adapter: how the adapter is optimised.
    """

    guidance_scale: float = Field(default=7.5, gt=1)
    guidance_range: tuple[float, float] | None = None
    stage1_steps: int = Field(default=10_000, ge=0)
    sampling_steps: int = Field(default=4, ge=1)
    solver_steps: int = Field(default=5, ge=1)
    original_weight: float = Field(default=1.0, ge=0)
    no_negative: float = Field(default=0.1, ge=0, le=1)
    positive: bool = False
    initial_scale: float = 0.0
    adapter: PlayerConfig = PlayerConfig(learning_rate=1e-4)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        low, high = self.guidance_range or (self.guidance_scale,) * 2
        if not 1 <= low <= self.guidance_scale <= high:
            raise ValueError(
                f"guidance_range starts at 1, which is no guidance, or above, and has guidance_scale "
                f"{self.guidance_scale:g} in it, unlike {(low, high)}."
            )
        if self.adapter.kind != "full":
            raise ValueError("SpeedUpNet's adapter is small as it is: set adapter.kind to full.")
        return self

    def phases(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.stage1_steps}))

    def passes(self, step: int = 0) -> float:
        # The adapted network forward and backward and the guided teacher, once or as often as it steps.
        stage1, stage2 = 3 + 2, 3 + 2 * self.solver_steps
        return stage1 if step < self.stage1_steps else stage2 + stage1 * (self.original_weight > 0)


class SpeedUpNet(SoloObjective):
    """Teaches an adapter what guidance does, so that one pass takes the place of two, and of several steps.

    With c- the negative prompt, w the guidance and y the network's own prediction (eps, v), stage 1 descends

        |y_SUN(x_t, c, c-, w) - [y(c-) + w (y(c) - y(c-))]|^2                                       (arXiv 2312.08887)

    on noised images at uniform times. Stage 2, multi-step consistency, descends

        |x_s^SUN - x_s|^2 + original_weight * stage 1

    from noised images at a time t of the sampler's grid: one DDIM step of the adapted network to the next time s ends
    where the guided teacher's `solver_steps` do. The paper's form and weights of stage 2 are not public; these are
    ours. Its first term is compared at x_s, which is what the sampler goes on with: in eps, an error in x0 near pure
    noise would hardly count. The network is not told how far it goes, and its output cannot be both the teacher's at t
    (the trajectory's tangent) and that of the long step (its chord), so stage 1 is kept at times and noised images of
    its own, not at the sampler's.

    The adapter is told g = (w - 1) / w. Only it trains; the base's weights are shared, not copied.

    Args:
        model: the teacher; stays frozen.
        config: options.

    Raises:
        ValueError: for a family without cross-attention, or with more to its text than the tokens that it reads.
    """

    Config = SpeedUpNetConfig
    paper: ClassVar[str] = "2312.08887"

    def __init__(self, model: Teacher, config: SpeedUpNetConfig) -> None:
        self.solver = GuidedSolver(model, config.sampling_steps * config.solver_steps)
        self.teacher, self.schedule = self.solver.teacher, self.solver.schedule
        self.null, self.shape = self.solver.null, tuple(model.latent_shape)
        check_text(self.null)
        adapted = cast(Denoiser, shared_copy(self.teacher))
        install_speedupnet(adapted.network, positive=config.positive, initial_scale=config.initial_scale)
        if besides := [key for key in self.null.text_keys if key != "text"]:
            raise ValueError(
                f"SpeedUpNet cannot be told a negative prompt's {', '.join(besides)}, by which this teacher is guided "
                "too: distil its guidance with another objective."
            )
        names = [name for name, _ in adapted.named_parameters() if ".processor." in name]
        super().__init__(model, config, "adapter", make_player(adapted, config.adapter, names=names, ema=True))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images", "prompts", "negatives"})

    @property
    def student(self) -> Denoiser:
        return cast(Denoiser, self.player.module)

    def stages(self, step: int) -> tuple[bool, bool]:
        """Whether a training step distils guidance at the original step, and whether it distils long steps."""
        first = step < self.config.stage1_steps
        return first or self.config.original_weight > 0, not first

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        c, device = self.config, batch["images"].device
        low, high = c.guidance_range or (c.guidance_scale,) * 2
        draws = {"scale": low + (high - low) * batch.random.uniform(device)}
        dropped = batch.random.uniform(device) < c.no_negative
        negative = Condition(text=batch.condition[NEGATIVE]).dropping(dropped, self.null.to(device))
        original, long = self.stages(step)
        if original:
            draws["t"] = self.schedule.uniform_time(batch.random.uniform(device))
            draws["eps"] = batch.random.normal(self.shape, device)
        if long:
            draws["place"] = c.solver_steps * batch.random.integers(c.sampling_steps, device)
            draws["eps_long"] = batch.random.normal(self.shape, device)
        # Only the adapted network is told of negatives, the teacher sees them as its null text.
        rest = Condition({name: value for name, value in batch.condition.items() if name != NEGATIVE})
        return replace(batch.adding(negative=negative["text"], **draws), condition=rest)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        original, long = self.stages(step)
        if not long:
            return Loss(self._original(batch))
        consistency = self._consistency(batch)
        if not original:
            return Loss(consistency)
        guidance = self._original(batch)
        logs = {"adapter/guidance": guidance, "adapter/consistency": consistency}
        return Loss(consistency + self.config.original_weight * guidance, logs)

    def told(self, batch: Batch) -> Condition:
        """What the adapted network is told."""
        strength = cast(Tensor, negative_strength(batch["scale"])).float()
        return batch.condition.replace(**{NEGATIVE: batch["negative"], STRENGTH: strength})

    def _original(self, batch: Batch) -> Tensor:
        """Stage 1's loss."""
        t = batch["t"]
        x_t = add_noise(self.schedule, batch["images"], batch["eps"], t)
        with torch.no_grad():
            null = Condition(text=batch["negative"])
            target = extrapolated(self.teacher, x_t, t, batch.condition, null, batch["scale"]).output
        return squared_loss(self.student(x_t, t, self.told(batch)).output, target).mean()

    def _consistency(self, batch: Batch) -> Tensor:
        """Stage 2's own loss."""
        grid, place, steps = self.solver.grid_on(batch["place"].device), batch["place"], self.config.solver_steps
        x_t = x = add_noise(self.schedule, batch["images"], batch["eps_long"], grid[place])
        null = Condition(text=batch["negative"])
        for small in range(steps):
            t, to = grid[place + small], grid[place + small + 1]
            x = self.solver.step(x, t, to, batch.condition, batch["scale"], null)
        reached = jump(self.student, self.schedule, x_t, grid[place], grid[place + steps], self.told(batch))
        return squared_loss(reached, x).mean()

    def exports(self) -> Artefact:
        c = self.config
        adapters = [m for m in self.student.network.modules() if isinstance(m, SpeedUpAttention)]
        options = {"positive": c.positive, "guidance_scale": c.guidance_scale, "steps": c.sampling_steps}
        return Artefact("attachment", nn.ModuleList(adapters), attachment={"name": NAME, "options": options, **_CARD})


_CARD = {
    "summary": "Reads a negative prompt inside cross-attention, in place of guidance and of many steps; for its base "
    "and other fine-tunes of it.",
    "usage": "from sublimate.pipelines.generate import generate\n"
    "from sublimate.pipelines.model import open_model\n"
    "from sublimate.pipelines.speedupnet import attach_speedupnet\n\n"
    'model = open_model("path/to/the/base/model/or/a/fine-tune")\n'
    'attach_speedupnet(model, "path/to/this/folder")\n'
    'images = generate(model, ["..."], negative_prompt="...")',
}
