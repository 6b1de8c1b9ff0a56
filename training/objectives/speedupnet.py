"""SpeedUpNet: an adapter that distils guidance by a negative prompt, then several steps in one (Chai et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.pipelines.negative_attention import NEGATIVE
from sublimate.pipelines.speedupnet import NAME, SpeedUpAttention, install_speedupnet
from sublimate.training.losses import squared_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player, shared_copy
from sublimate.training.teacher import Teacher, frozen


class SpeedUpNetConfig(ObjectiveConfig):
    """Options of SpeedUpNet. The paper's training settings are not public; these are ours.

    Attributes:
        guidance_scale: the teacher's guidance away from the negative prompt, which the adapter distils.
        guidance_steps: training steps of stage 1, guidance distillation alone; stage 2 adds consistency.
        sampling_steps: steps the adapter is trained to be sampled in, from noise to data.
        solver_steps: the teacher's guided steps that one of those shall equal.
        no_negative: fraction of samples whose negative prompt is no text.
        consistency_weight: of stage 2's term.
        adapter: how the adapter is optimised.
    """

    guidance_scale: float = Field(default=7.5, ge=1)
    guidance_steps: int = Field(default=10_000, ge=0)
    sampling_steps: int = Field(default=4, ge=1)
    solver_steps: int = Field(default=5, ge=1)
    no_negative: float = Field(default=0.1, ge=0, le=1)
    consistency_weight: float = Field(default=1.0, gt=0)
    adapter: PlayerConfig = PlayerConfig(learning_rate=1e-4)

    def passes(self, step: int = 0) -> float:
        # The adapted network forward and backward, the guided teacher once or as often as it steps.
        return 3 + 2 * (1 if step < self.guidance_steps else self.solver_steps)


class SpeedUpNet(SoloObjective):
    """Teaches an adapter what guidance does, so that one pass takes the place of two, and of several steps.

    With c- the negative prompt and y the network's own prediction (eps, v), stage 1 descends

        |y_SUN(x_t, c, c-) - [y(c-) + w (y(c) - y(c-))]|^2                                          (arXiv 2312.08887)

    on noised images. Stage 2, multi-step consistency, keeps that and adds |x_s^SUN - x_s|^2: from x_t at a time of the
    sampler's grid, one DDIM step of the adapted network ends where k guided steps of the teacher do. The paper's exact
    form and weights of stage 2 are not public, this one is ours; both terms share the teacher's first step.

    Only the adapter trains; the base's weights are shared, not copied.

    Args:
        model: the teacher; stays frozen.
        config: options.

    Raises:
        ValueError: for a family without cross-attention.
    """

    Config = SpeedUpNetConfig
    paper: ClassVar[str] = "2312.08887"

    def __init__(self, model: Teacher, config: SpeedUpNetConfig) -> None:
        self.teacher = frozen(model)
        self.schedule, self.null, self.shape = self.teacher.schedule, model.null_condition(), tuple(model.latent_shape)
        adapted = shared_copy(self.teacher)
        install_speedupnet(cast(Denoiser, adapted).network)
        names = [name for name, _ in adapted.named_parameters() if ".processor." in name]
        super().__init__(model, config, "adapter", make_player(adapted, config.adapter, names=names, ema=True))
        self.grid = self.schedule.grid(config.sampling_steps * config.solver_steps)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images", "prompts", "negatives"})

    @property
    def student(self) -> Denoiser:
        return cast(Denoiser, self.player.module)

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        c, device = self.config, batch["images"].device
        if step < c.guidance_steps:
            t = self.schedule.uniform_time(batch.random.uniform(device))
            place = torch.zeros(len(batch), dtype=torch.long, device=device)
        else:
            place = c.solver_steps * batch.random.integers(c.sampling_steps, device)
            t = self.grid.to(device)[place]
        dropped = batch.random.uniform(device) < c.no_negative
        negative = torch.where(dropped[:, None, None], self.null["text"], batch.condition[NEGATIVE])
        rest = Condition({name: value for name, value in batch.condition.items() if name != NEGATIVE})
        eps = batch.random.normal(self.shape, device)
        return replace(batch.adding(t=t, place=place, eps=eps, negative=negative), condition=rest)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        x_t = add_noise(self.schedule, batch["images"], batch["eps"], batch["t"])
        student = self.student(x_t, batch["t"], batch.condition.replace(**{NEGATIVE: batch["negative"]}))
        with torch.no_grad():
            teacher = self._teach(x_t, batch["t"], batch)
        guidance = squared_loss(student.output, teacher.output).mean()
        if step < self.config.guidance_steps:
            return Loss(guidance)
        end, x_s = self._solved(teacher, batch)
        c = self.schedule.at(end)
        consistency = squared_loss(student.combine(c.alpha, c.sigma), x_s).mean()
        logs = {"adapter/guidance": guidance, "adapter/consistency": consistency}
        return Loss(guidance + self.config.consistency_weight * consistency, logs)

    def _teach(self, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
        null = Condition(text=batch["negative"])
        return guided(self.teacher, x_t, t, batch.condition, null, self.config.guidance_scale)

    @torch.no_grad()
    def _solved(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, Tensor]:
        """The time a sampler's step ends at, and x there after the teacher's small steps; its first is given."""
        grid, place = self.grid.to(batch["t"].device), batch["place"]
        for small in range(1, self.config.solver_steps + 1):
            to = grid[place + small]
            c = self.schedule.at(to)
            x = prediction.combine(c.alpha, c.sigma)
            if small < self.config.solver_steps:
                prediction = self._teach(x, to, batch)
        return to, x

    def exports(self) -> Artefact:
        adapters = [m for m in self.student.network.modules() if isinstance(m, SpeedUpAttention)]
        usage = (
            "from sublimate.pipelines.generate import generate\n"
            "from sublimate.pipelines.model import open_model\n"
            "from sublimate.pipelines.speedupnet import attach_speedupnet\n\n"
            'model = open_model("path/to/the/base/model/or/a/fine-tune")\n'
            'attach_speedupnet(model, "path/to/this/folder")\n'
            f'images = generate(model, ["..."], steps={self.config.sampling_steps}, guidance_scale=1.0, '
            'negative_prompt="...")'
        )
        summary = "Reads a negative prompt inside cross-attention, in place of guidance and of many steps."
        options = {"guidance_scale": self.config.guidance_scale, "sampling_steps": self.config.sampling_steps}
        card = {"name": NAME, "options": options, "usage": usage, "summary": summary}
        return Artefact("attachment", nn.ModuleList(adapters), attachment=card)
