"""The trainer: one loop for every objective, exact under accumulation, processes and restarts."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.gradient_checkpointing import enable_gradient_checkpointing
from sublimate.pipelines.placement import placed, sent, without_storage
from sublimate.training import checkpoints
from sublimate.training.config import Config
from sublimate.training.data import Placed, Source
from sublimate.training.ema import Average
from sublimate.training.fsdp import shard_players, sharding_asked
from sublimate.training.gradients import Diverged, average_gradients, clip_gradients, refuse_diverged
from sublimate.training.interrupts import stop_requests
from sublimate.training.log import Log
from sublimate.training.objective import Batch, Objective, Turn
from sublimate.training.precision import autocast, warn_of_launchers_precision, warn_of_slow_bf16
from sublimate.training.randomness import SampleRandom, key
from sublimate.training.together import accelerator
from sublimate.training.whole import gathered


class TrainerConfig(Config):
    """Options of a training run, named as in diffusers' training scripts.

    Attributes:
        output_dir: where checkpoints, logs and samples go.
        seed: all randomness derives from it.
        max_train_steps: training steps; one step is every turn of the objective once.
        train_batch_size: samples per process and micro-batch.
        gradient_accumulation_steps: micro-batches per optimiser step.
        max_grad_norm: gradients of a turn are clipped to this L2 norm.
        mixed_precision: "bf16" runs networks under autocast; weights and losses stay float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        lr_scheduler, lr_warmup_steps: learning-rate schedule by training step, as in diffusers.
        ema_decay: decay per step of the moving average of players that ask for one, which after n steps is at most
            n/(n + 9), as in diffusers' EMAModel; None keeps none.
        checkpointing_steps: steps between checkpoints, the last step included; None saves only when stopped early.
        checkpoints_total_limit: how many checkpoints to keep.
        resume_from_checkpoint: "latest", a checkpoint's folder, or None to start afresh.
        report_to: an accelerate tracker ("tensorboard", "wandb", ...); `log.jsonl` is always written.
        tracker_project_name: the tracker's project.
        logging_steps: steps between log lines.
        validation_steps: steps between sample pictures; None makes none.
    """

    output_dir: Path = Path("runs/untitled")
    seed: int = Field(default=0, ge=0)
    max_train_steps: int = Field(default=1000, ge=1)
    train_batch_size: int = Field(default=16, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_grad_norm: float = Field(default=10.0, gt=0)
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    lr_warmup_steps: int = Field(default=0, ge=0)
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    checkpointing_steps: int | None = Field(default=500, ge=1)
    checkpoints_total_limit: int | None = Field(default=2, ge=1)
    resume_from_checkpoint: str | None = "latest"
    report_to: str | None = None
    tracker_project_name: str = "sublimate"
    logging_steps: int = Field(default=10, ge=1)
    validation_steps: int | None = Field(default=None, ge=1)

    @field_validator("report_to")
    @classmethod
    def _tracks(cls, name: str | None) -> str | None:
        known = sorted(map(str, get_available_trackers()))
        if name not in (None, *known):
            raise ValueError(
                f"{name!r} is none of the trackers that are installed ({', '.join(known) or 'none'}): install its "
                "package, or leave it out."
            )
        return name

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError("A constant lr_scheduler has no warm-up: set it to constant_with_warmup.")
        return self

    @property
    def local_batch(self) -> int:
        """Samples per process and optimiser step."""
        return self.train_batch_size * self.gradient_accumulation_steps


class Interrupted(Exception):
    """Training stopped early at the user's wish, after saving.

    Attributes:
        signal: the signal's number, for the exit status.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"Stopped and saved {checkpoint}; the same command again resumes from there.")
        self.signal = number


class Trainer:
    """Runs an objective's turns over a data source.

    One step: for every turn draw a batch keyed by (seed, step, turn, sample), let the objective prepare it, add up
    the gradients of its micro-batches, average them over processes, clip, step the turn's players.

    Args:
        objective: what to train.
        source: where conditions and images come from.
        config: options.
        validate: called in every process with the step every `validation_steps`, with averaged weights in place; what
            it returns, a picture (3, H, W) in [0, 1], trackers show.
        fingerprint: of all else that a checkpoint must agree with to be resumed from (`checkpoints.fingerprint`).
        about: what a tracker shows of the run beside its method; None shows `config`.
        progress: show a progress bar.
    """

    def __init__(
        self,
        objective: Objective,
        source: Source,
        config: TrainerConfig,
        *,
        validate: Callable[[int], Tensor | None] | None = None,
        fingerprint: str = "",
        about: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        if missing := objective.needs - source.provides:
            raise ValueError(f"The objective needs {sorted(missing)}, which the data does not provide.")
        self.objective, self.source, self.config = objective, source, config
        self.validate, self.fingerprint, self.progress = validate, fingerprint, progress
        # Autocast is torch's own: accelerate's belongs to the whole Python process, which may hold several runs.
        self.accelerator = accelerator(log_with=config.report_to, project_dir=config.output_dir)
        objective.mean_over_processes = lambda tensor: self.accelerator.reduce(tensor, "mean")
        objective.micro_batch = config.train_batch_size
        warn_of_launchers_precision(self.accelerator.mixed_precision, config.mixed_precision)
        self.players = objective.players()
        trees = [player.module for player in self.players.values()]
        # What has no storage cannot be moved: it is only counted, where it is.
        self.device = torch.device("cpu") if any(map(without_storage, trees)) else self.accelerator.device
        for player in self.players.values():
            placed(player.module, self.device)
            if config.gradient_checkpointing:
                enable_gradient_checkpointing(player.module)
        self.sharded = shard_players(objective, self.device) if sharding_asked() else []
        self.optimizers = {name: player.optimizer() for name, player in self.players.items()}
        self.multipliers = {name: self._multiplier(optimizer) for name, optimizer in self.optimizers.items()}
        self.averages = {
            name: Average(player.trainable, config.ema_decay)
            for name, player in self.players.items()
            if player.ema and config.ema_decay is not None
        }
        self.about = config.model_dump(mode="json") if about is None else about
        self.log, self.step = Log(config.output_dir, self.accelerator), 0

    def run(self) -> None:
        """Trains up to `max_train_steps`, resuming if asked, and leaves players (and averages) in their final state.

        Raises:
            Interrupted: on SIGINT or SIGTERM, once the current step is finished and saved.
            Diverged: when a loss or gradient is not finite; the last checkpoint stays.
            ValueError: when the checkpoint to resume from does not fit, or the folder holds later ones.
        """
        config = self.config
        if config.mixed_precision == "bf16":
            warn_of_slow_bf16(self.device)
        if found := checkpoints.find_checkpoint(config.output_dir, config.resume_from_checkpoint):
            self.load(found)
        checkpoints.refuse_later(config.output_dir, self.step)
        method = self.objective.describe()["method"]
        self.log.start(self.step, config.tracker_project_name, {"method": method, **self.about})
        shown = self.progress and self.accelerator.is_main_process
        bar = tqdm(total=config.max_train_steps, initial=self.step, disable=not shown, desc=method)
        with contextlib.closing(self.log), bar, stop_requests() as stop:
            while self.step < config.max_train_steps:
                taken: list[dict[str, Tensor]] = []
                try:
                    for turn in self.objective.turns(self.step):
                        taken.append(self._take(turn))
                finally:  # what a later turn makes of broken weights says less
                    refuse_diverged(taken, self.step)
                # What several turns log under one name is averaged.
                named = {name: [logs[name] for logs in taken if name in logs] for logs in taken for name in logs}
                logs = {name: torch.stack(values).mean() for name, values in named.items()}
                self.objective.after_step(self.step)
                self.step += 1
                for average in self.averages.values():
                    average.update(self.step)
                bar.update()
                self._report(logs, bar)
                finished, every = self.step == config.max_train_steps, config.checkpointing_steps
                stopping = not finished and self._anywhere(bool(stop))
                if stopping or (every and (finished or self.step % every == 0)):
                    path = self.save()
                    if stopping:
                        raise Interrupted(stop[0] if stop else signal.SIGTERM, path)
        for tree in self.sharded:
            tree.end()
        for average in self.averages.values():
            average.gather()

    def _take(self, turn: Turn) -> dict[str, Tensor]:
        """One optimiser step of the players that `turn` trains."""
        logs = self.accumulate(turn)
        norm = clip_gradients(self._training(turn), self.config.max_grad_norm)
        self.update(turn)
        return {**logs, f"{turn.name}/gradient_norm": norm}

    def accumulate(self, turn: Turn) -> dict[str, Tensor]:
        """Gives the turn's players the gradients of its loss, over micro-batches and processes; returns the logs."""
        for name, player in self.players.items():
            player.take_part(name in turn.trains)
        torch.manual_seed(key(self.config.seed, self.step, turn.name, "preparing", self._first_index))
        with torch.no_grad():
            drawn = self._batch(turn)  # frozen encoders make it, in their own precision
            with self.autocast():
                batch = self.objective.prepare(turn, drawn, self.step)

        size = self.config.train_batch_size
        logs: dict[str, Tensor] = {}
        for start in range(0, len(batch), size):
            part = batch.part(start, start + size)
            torch.manual_seed(key(self.config.seed, self.step, turn.name, "network", self._first_index + start))
            with self.autocast():
                loss = self.objective.loss(turn, part, self.step)
            share = len(part) / len(batch)
            (share * loss.total).backward()
            for name, value in {f"{turn.name}/loss": loss.total, **loss.logs}.items():
                part_of_mean = share * value.detach()
                logs[name] = logs[name] + part_of_mean if name in logs else part_of_mean

        average_gradients(self._training(turn), self.accelerator)
        return logs

    def update(self, turn: Turn) -> None:
        """Moves the turn's players along their gradients, which are then gone."""
        for name in turn.trains:
            optimizer, multiplier = self.optimizers[name], self.multipliers[name](self.step)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _training(self, turn: Turn) -> list[torch.nn.Parameter]:
        return [p for name in turn.trains for p in self.players[name].trainable().values()]

    def autocast(self) -> torch.autocast:
        """What networks run under."""
        return autocast(self.device, self.config.mixed_precision)

    @property
    def _first_index(self) -> int:
        return self.accelerator.process_index * self.config.local_batch

    def _batch(self, turn: Turn) -> Batch:
        indices = range(self._first_index, self._first_index + self.config.local_batch)
        random = SampleRandom(self.config.seed, self.step, turn.name, indices)
        batch = self.source.batch(random)
        tensors = {name: sent(value, self.device) for name, value in batch.tensors.items()}
        condition = Condition({name: sent(value, self.device) for name, value in batch.condition.items()})
        return Batch(condition, random, tensors)

    def _anywhere(self, asked: bool) -> bool:
        """Whether it is so in any process: they must all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        votes = torch.tensor(float(asked), device=self.device)
        return bool(self.accelerator.reduce(votes, "sum"))

    def _multiplier(self, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
        """The schedule as a plain function of the step, so that it has no state to save."""
        c = self.config
        schedule = get_scheduler(
            c.lr_scheduler, optimizer, num_warmup_steps=c.lr_warmup_steps, num_training_steps=c.max_train_steps
        )
        return schedule.lr_lambdas[0]

    def _report(self, logs: dict[str, Tensor], bar: tqdm) -> None:
        config = self.config
        if self.step % config.logging_steps == 0 or self.step == config.max_train_steps:
            values = {name: float(self.accelerator.reduce(v.float(), "mean")) for name, v in logs.items()}
            bar.set_postfix({name.split("/")[-1]: f"{v:.3g}" for name, v in list(values.items())[:4]})
            if any(not math.isfinite(v) for v in values.values()):
                raise Diverged(f"A logged value is not finite at step {self.step}: {values}.")
            rates = {f"{name}/learning_rate": o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
            self.log.write(self.step, {**values, **rates})
        if self.validate is not None and config.validation_steps and self.step % config.validation_steps == 0:
            with torch.no_grad(), self.averaged():
                self.log.show(self.step, self.validate(self.step))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context, for validation and export, players hold their averages, and nothing is dropped out."""
        for player in self.players.values():
            player.module.eval()
        with contextlib.ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.applied())
            yield

    def save(self) -> Path:
        """Writes a checkpoint of the current step; only the main process writes."""
        path = self.config.output_dir / f"{checkpoints.PREFIX}{self.step}"
        place = self._place()
        sections: dict[str, Mapping[str, Tensor]] = {"objective": self.objective.state()}
        for name, player in self.players.items():
            sections[f"player.{name}"] = player.trainable()
            sections[f"optimizer.{name}"] = checkpoints.optimizer_tensors(self.optimizers[name])
        for name, average in self.averages.items():
            sections[f"average.{name}"] = average.values
        main = self.accelerator.is_main_process
        tensors = gathered(sections, keep=main)
        if main:
            facts = {
                "sections": sorted(sections),
                **self._identity(),
                "fingerprint": self.fingerprint,
                "step": self.step,
                "place": place,
            }
            limit = self.config.checkpoints_total_limit
            checkpoints.write_checkpoint(self.config.output_dir, self.step, tensors, facts, limit)
        for _ in tensors:  # what is sharded is gathered by all processes together
            pass
        self.accelerator.wait_for_everyone()
        return path

    def load(self, path: Path) -> None:
        """Restores everything a checkpoint holds.

        Raises:
            ValueError: when it is damaged or belongs to another run.
        """
        sections, facts = checkpoints.read_checkpoint(path)
        for name, value in self._identity().items():
            if facts.get(name) != value:
                raise ValueError(
                    f"The checkpoint {path} was made with {name} = {facts.get(name)}, this run has {value}: "
                    "resume with the same options or choose another output_dir."
                )
        if facts.get("fingerprint", "") != self.fingerprint:
            raise ValueError(
                f"The checkpoint {path} was made for another model, data or options: choose another output_dir, or "
                "delete it."
            )
        if (step := int(facts["step"])) > self.config.max_train_steps:
            raise ValueError(
                f"The checkpoint {path} is at step {step}, beyond max_train_steps = {self.config.max_train_steps}: "
                "choose another output_dir, or train for longer."
            )
        for name, player in self.players.items():
            checkpoints.load_exactly(player.trainable(), sections[f"player.{name}"], f"The checkpoint's player {name}")
            checkpoints.load_optimizer_tensors(self.optimizers[name], sections[f"optimizer.{name}"])
        for name, average in self.averages.items():
            average.load(sections[f"average.{name}"])
        self.objective.load_state(sections["objective"])
        if isinstance(self.source, Placed):
            self.source.seek(facts["place"])
        self.step = step

    def _place(self) -> dict[str, Any]:
        """Where all processes are in the data; nothing where that depends on the step alone."""
        if not isinstance(self.source, Placed):
            return {}
        places: list[dict[str, Any]] = gather_object([self.source.place()])
        return {name: value for place in places for name, value in place.items()}

    def _identity(self) -> dict[str, Any]:
        """What must agree for a resumed run to equal an uninterrupted one."""
        return {
            "method": self.objective.describe()["method"],
            "seed": self.config.seed,
            "global_batch": self.config.local_batch * self.accelerator.num_processes,
            "averages": sorted(self.averages),
        }
