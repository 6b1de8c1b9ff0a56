"""DisBack: one-step distillation back along the recorded path on which the teacher degrades (Zhang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.pipelines.edit_attachment import attached_kinds, strip
from sublimate.pipelines.placement import placed
from sublimate.training.checkpoints import load_exactly
from sublimate.training.losses import pseudo_target_loss, score_difference
from sublimate.training.matching import Matching, MatchingConfig
from sublimate.training.objective import Batch, Loss, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Teacher


class DisBackConfig(MatchingConfig):
    """Options of DisBack; learning rates, guidance and updates are those published for SDXL.

    Attributes:
        degradation_steps: steps of stage 1, in which the critic alone trains; 0 makes plain variational score
            distillation.
        record_every: steps of stage 1 between recorded nodes of the path.
        backtrack_every: steps of stage 2 after which the target moves one node towards the teacher.
        sample_normalization: divide each sample's gradient by mean|x0 - mu_p|, DMD's weight.
        critic: a LoRA, whose snapshots are the path: small, and exact.

    The others are `MatchingConfig`'s.
    """

    guidance_scale: float = Field(default=8.0, ge=1)
    critic_updates: int = Field(default=5, ge=1)
    degradation_steps: int = Field(default=500, ge=0)
    record_every: int = Field(default=100, ge=1)
    backtrack_every: int = Field(default=1000, ge=1)
    sample_normalization: bool = True
    student: PlayerConfig = PlayerConfig(learning_rate=5e-7)
    critic: PlayerConfig = PlayerConfig(kind="lora", learning_rate=5e-5)

    @property
    def nodes(self) -> int:
        """Recorded nodes, the teacher not counted."""
        return self.degradation_steps // self.record_every

    def target(self, step: int) -> int:
        """The node that stage 2 aims at: 0 is the teacher, larger is more degraded."""
        behind = (step - self.degradation_steps) // self.backtrack_every
        # The last node is where the critic starts: as a target it would pull nowhere.
        return max(0, self.nodes - 1 - behind)

    def phases(self) -> tuple[int, ...]:
        # The critic alone; the walk back; the teacher itself.
        walk = self.backtrack_every * max(0, self.nodes - 1)
        return tuple(sorted({0, self.degradation_steps, self.degradation_steps + walk}))

    def passes(self, step: int = 0) -> float:
        return 1 + 3 + self.place(step, "critic0") if step < self.degradation_steps else super().passes(step)

    def student_passes(self, step: int = 0) -> float:
        return 3 + 1 + self.teacher_passes


class DisBack(Matching):
    """Two stages (arXiv 2408.15991, algorithms 1 and 2), because the teacher's score is far from a fresh student's.

    Stage 1 follows the teacher's degradation: the critic learns the samples of the untrained student, and
    snapshots of it are the path s_1, ..., s_N from the teacher s_0 to that student's own score (eq. 7).

    Stage 2 walks back: from the critic s_q = s_N on, the student descends

        grad_theta E_t[(sigma^2/alpha^2) KL(q_t || p'_t)] = E_{z,eps}[(mu_q - mu'_i)(x_t) dx0/dtheta]           (eq. 8)

    where the target mu'_i is that of s_{N-1}, then s_{N-2}, ..., and at last the teacher's for good. Every target is
    guided like the teacher. With a path of the teacher alone this is plain variational score distillation.

    Args:
        model: the teacher; stays frozen.
        config: options.

    Raises:
        ValueError: when the critic is no LoRA: nodes that are full copies are not what a path is stored as.
    """

    Config = DisBackConfig
    paper: ClassVar[str] = "2408.15991"

    def __init__(self, model: Teacher, config: DisBackConfig) -> None:
        super().__init__(model, config)
        if config.critic.kind != "lora":
            raise ValueError("DisBack stores its path as LoRA snapshots of its critic: set objective.critic.kind=lora")
        self.path: list[dict[str, Tensor]] = []
        # A tree of its own that holds one node at a time; adapters are not switched within the critic's.
        self._node = make_player(self.teacher, config.critic)
        self._held: int | None = None

    def turns(self, step: int) -> tuple[Turn, ...]:
        turns = super().turns(step)
        return turns[:1] if step < self.config.degradation_steps else turns

    def student_loss(self, batch: Batch, step: int) -> Loss:
        x0 = self.sample(batch)
        with torch.no_grad():
            x_t = self.noised(x0, batch)
            q = self.critic(x_t, batch["t"], batch.condition)
            target = self._target(self.config.target(step))
            p = guided(target, x_t, batch["t"], batch.condition, self.null, self.config.guidance_scale)
            direction = score_difference(x0, p, q, normalized=self.config.sample_normalization)
        return Loss(pseudo_target_loss(x0, direction).mean())

    def _target(self, node: int) -> Denoiser:
        if node == 0:
            return self.teacher
        if node != self._held:
            load_exactly(self._node.trainable(), self.path[node - 1], f"The checkpoint's node {node} of the path")
            if not attached_kinds(self.critic):  # taken out of the players, of which the node is none
                strip(self._node.module)
            self._held = node
        return placed(cast(Denoiser, self._node.module), next(self.teacher.parameters()).device).eval()

    def after_step(self, step: int) -> None:
        done = step + 1
        if done <= self.config.degradation_steps and done % self.config.record_every == 0:
            critic = self._players["critic"].trainable()
            self.path.append({name: parameter.detach().clone() for name, parameter in critic.items()})

    def state(self) -> dict[str, Tensor]:
        return {f"{i}/{name}": tensor for i, node in enumerate(self.path) for name, tensor in node.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        path: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            index, _, name = key.partition("/")
            path.setdefault(int(index), {})[name] = tensor.clone()
        self.path, self._held = [path[i] for i in range(len(path))], None
