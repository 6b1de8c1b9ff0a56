"""The trainer: exact under accumulation and restarts, strict about what fits."""

import copy
import json
import math
import os
import shutil
import signal
import threading

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.training import checkpoints
from sublimate.training.objective import Artefact, Batch, Loss, Objective, ObjectiveConfig, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.randomness import SampleRandom
from sublimate.training.trainer import Diverged, Interrupted, Trainer, TrainerConfig


class Noise:
    """Images are pure noise; enough to exercise the loop."""

    provides = frozenset({"images"})

    def batch(self, random):
        return Batch(Condition(), random, {"images": random.normal((3,))})


class Duel(Objective):
    """Two networks that chase each other; its state counts steps."""

    Config, paper = ObjectiveConfig, "0000.00000"
    needs = frozenset({"images"})

    def __init__(self, on_step=None):
        super().__init__(None, None)
        torch.manual_seed(0)
        config = PlayerConfig(learning_rate=0.01)
        self._players = {
            "student": make_player(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 3)), config, ema=True),
            "critic": make_player(nn.Linear(3, 3), config),
        }
        self.count, self.on_step = torch.zeros(1), on_step

    def players(self):
        return self._players

    def turns(self, step):
        return (Turn("critic", ("critic",)), Turn("student", ("student",)))

    def prepare(self, turn, batch, step):
        centre = self.mean_over_processes(batch["images"].mean(0))
        return batch.adding(centre=centre.expand(len(batch), -1), u=batch.random.uniform()[:, None].float())

    def loss(self, turn, batch, step):
        student, critic = (self._players[n].module for n in ("student", "critic"))
        x = student(batch["images"]) + batch.random.normal((3,))
        if turn.name == "critic":
            return Loss((critic(x.detach()) - batch["images"]).square().mean())
        return Loss((x - critic(x) + batch["centre"] * batch["u"]).square().mean())

    def after_step(self, step):
        self.count += 1
        if self.on_step:
            self.on_step(step)

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"].clone()

    def exports(self):
        return Artefact("weights", self._players["student"].module)


def train(folder, objective=None, **options):
    objective = objective or Duel()
    defaults = {"max_train_steps": 6, "train_batch_size": 4, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    trainer = Trainer(objective, Noise(), TrainerConfig(output_dir=folder, **{**defaults, **options}), progress=False)
    trainer.run()
    return trainer


def weights(trainer):
    live = {f"{n}.{k}": p.detach().clone() for n, q in trainer.players.items() for k, p in q.trainable().items()}
    return {**live, **{f"average.{k}": v.clone() for k, v in trainer.averages["student"].values.items()}}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def without_dropout(objective):
    objective._players["student"].module[1].p = 0.0
    return objective


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    whole = train(tmp_path / "a", without_dropout(Duel()), train_batch_size=4)
    parts = train(tmp_path / "b", without_dropout(Duel()), train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(weights(whole), weights(parts), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    straight, handler = train(tmp_path / "a"), signal.getsignal(signal.SIGTERM)

    def interrupt(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="resumes"):
        train(tmp_path / "b", Duel(interrupt))
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "b")] == ["checkpoint-3"]
    resumed = train(tmp_path / "b")
    assert_same(weights(straight), weights(resumed))
    assert float(resumed.objective.count) == 6
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_seed_matters_and_runs_repeat(tmp_path):
    first, again, other = train(tmp_path / "a"), train(tmp_path / "b"), train(tmp_path / "c", seed=1)
    assert_same(weights(first), weights(again))
    assert any(not torch.equal(weights(first)[k], weights(other)[k]) for k in weights(first))


def test_the_average_is_the_recurrence_over_steps(tmp_path):
    history = []
    objective = Duel()
    student = objective.players()["student"]
    start = {k: p.detach().clone() for k, p in student.trainable().items()}
    objective.on_step = lambda step: history.append({k: p.detach().clone() for k, p in student.trainable().items()})
    trainer = train(tmp_path, objective)
    for name, average in start.items():
        for count, values in enumerate(history, 1):
            decay = min(0.9, count / (count + 9))
            average = decay * average + (1 - decay) * values[name]
        torch.testing.assert_close(trainer.averages["student"].values[name], average)
    live = weights(trainer)
    with trainer.averaged():
        assert torch.equal(student.trainable()["0.weight"], trainer.averages["student"].values["0.weight"])
    assert_same(weights(trainer), live)


def test_checkpoints_are_limited_and_the_last_step_is_saved(tmp_path):
    train(tmp_path, checkpointing_steps=4, checkpoints_total_limit=1)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-6"]
    assert not list(tmp_path.glob(".*partial"))


def test_a_start_before_what_a_folder_holds_is_refused_and_deletes_nothing(tmp_path):
    train(tmp_path, checkpointing_steps=3)
    for options in ({"resume_from_checkpoint": None}, {"resume_from_checkpoint": "checkpoint-3"}):
        with pytest.raises(ValueError, match=r"holds .*checkpoint-6 of a run that went beyond step"):
            train(tmp_path, **options)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


def test_validation_drops_nothing_out(tmp_path):
    objective, seen = Duel(), []
    student = objective.players()["student"].module

    def validate(step):
        x = torch.ones(8, 3)
        seen.append(torch.equal(student(x), student(x)))

    config = TrainerConfig(output_dir=tmp_path, max_train_steps=2, train_batch_size=4, validation_steps=1)
    Trainer(objective, Noise(), config, validate=validate, progress=False).run()
    assert seen == [True, True]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path, checkpointing_steps=6)
    with pytest.raises(ValueError, match="made with seed = 0, this run has 5"):
        train(tmp_path, seed=5)
    with pytest.raises(ValueError, match="global_batch"):
        train(tmp_path, train_batch_size=2)


def test_a_half_written_checkpoint_is_named(tmp_path):
    train(tmp_path, checkpointing_steps=6)
    path = tmp_path / "checkpoint-6" / "player.student.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-6 is damaged .* delete it"):
        train(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint nowhere"):
        train(tmp_path, resume_from_checkpoint="nowhere")


def test_a_full_disk_leaves_earlier_checkpoints_alone(tmp_path, monkeypatch):
    train(tmp_path, checkpointing_steps=6)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoint-6").iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_checkpoint(tmp_path, 6, [("x", {"w": torch.zeros(1)})], {}, None)
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoint-6").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "log.jsonl"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    objective = Duel()
    with torch.no_grad():
        objective.players()["critic"].module.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="turn 'critic' is not finite at step 0"):
        train(tmp_path, objective)


def test_what_comes_of_a_gradient_that_is_not_finite_does_not_hide_it(tmp_path):
    class Strict(Duel):
        def prepare(self, turn, batch, step):
            if not all(p.isfinite().all() for p in self.players()["critic"].trainable().values()):
                raise RuntimeError("an encoder refuses it")
            return super().prepare(turn, batch, step)

        def loss(self, turn, batch, step):
            loss = super().loss(turn, batch, step)
            return Loss(loss.total * math.nan) if turn.name == "critic" else loss

    with pytest.raises(Diverged, match="turn 'critic' is not finite at step 0"):
        train(tmp_path, Strict())


def test_everything_of_a_batch_is_sent_to_the_device(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr("sublimate.training.trainer.sent", lambda x, device: moved.append(x) or x)

    class Told(Noise):
        def batch(self, random):
            return Batch(Condition(text=torch.zeros(len(random), 2)), random, {"images": random.normal((3,))})

    trainer = Trainer(Duel(), Told(), TrainerConfig(output_dir=tmp_path), progress=False)
    trainer.accumulate(trainer.objective.turns(0)[0])
    assert [tuple(x.shape[1:]) for x in moved] == [(3,), (2,)]


def test_missing_data_is_named(tmp_path):
    class Nothing(Noise):
        provides = frozenset()

    with pytest.raises(ValueError, match="needs \\['images'\\]"):
        Trainer(Duel(), Nothing(), TrainerConfig(output_dir=tmp_path))


def test_only_the_turns_players_move(tmp_path):
    objective = Duel()
    before = copy.deepcopy({n: p.module.state_dict() for n, p in objective.players().items()})
    trainer = Trainer(objective, Noise(), TrainerConfig(output_dir=tmp_path), progress=False)
    trainer._take(Turn("critic", ("critic",)))
    same = {
        n: all(torch.equal(v, before[n][k]) for k, v in p.module.state_dict().items())
        for n, p in objective.players().items()
    }
    assert same == {"student": True, "critic": False}


def test_what_frozen_encoders_make_of_data_is_not_autocast(tmp_path):
    seen = []

    class Watching(Noise):
        def batch(self, random):
            seen.append(("batch", torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().batch(random)

    class Watched(Duel):
        def prepare(self, turn, batch, step):
            seen.append(("prepare", torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().prepare(turn, batch, step)

    config = TrainerConfig(output_dir=tmp_path, mixed_precision="bf16")
    trainer = Trainer(Watched(), Watching(), config, progress=False)
    trainer.accumulate(trainer.objective.turns(0)[0])
    assert seen == [("batch", False, False), ("prepare", True, False)]


def test_learning_rates_follow_their_schedule(tmp_path):
    rates = []

    def note(_step):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers.values()])

    options = {"max_train_steps": 6, "train_batch_size": 4, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    trainer = Trainer(Duel(note), Noise(), TrainerConfig(output_dir=tmp_path, **options), progress=False)
    trainer.run()
    expected = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    torch.testing.assert_close(torch.tensor(rates), 0.01 * torch.tensor(expected)[:, None].expand(6, 2))


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_gradients_are_clipped_by_their_norm_over_all_weights(tmp_path, monkeypatch, most):
    trainer = Trainer(Duel(), Noise(), TrainerConfig(output_dir=tmp_path, max_grad_norm=most), progress=False)
    turn = trainer.objective.turns(0)[0]
    trainer.accumulate(turn)
    weights = trainer.players["critic"].trainable().values()
    whole = torch.cat([p.grad.flatten() for p in weights])
    for weight in weights:
        weight.grad = None
    seen = []
    monkeypatch.setattr(trainer, "update", lambda turn: seen.extend(p.grad.flatten() for p in weights))
    logs = trainer._take(turn)
    torch.testing.assert_close(torch.cat(seen), whole * min(1.0, most / float(whole.norm())), rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["critic/gradient_norm"], whole.norm())


def test_a_run_in_another_thread_takes_no_signals(tmp_path):
    handler, failed = signal.getsignal(signal.SIGTERM), []

    def work():
        try:
            train(tmp_path / "thread")
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGTERM) is handler
    train(tmp_path / "main")
    assert (tmp_path / "thread" / "log.jsonl").read_text() == (tmp_path / "main" / "log.jsonl").read_text()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'no-such-tracker' is none of the trackers that are installed"):
        TrainerConfig(output_dir=tmp_path, report_to="no-such-tracker")


def test_the_log_is_json_lines(tmp_path):
    train(tmp_path, logging_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    told = ("loss", "gradient_norm", "learning_rate")
    assert {f"{name}/{what}" for name in ("critic", "student") for what in told} <= lines[0].keys()
    assert lines[0]["student/learning_rate"] > lines[1]["student/learning_rate"]  # a cosine's


def test_a_resumed_runs_log_is_that_of_an_uninterrupted_one(tmp_path):
    options = {"logging_steps": 1, "checkpointing_steps": 2, "lr_scheduler": "constant"}
    train(tmp_path / "whole", **options)
    train(tmp_path / "resumed", **options, max_train_steps=5)
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5")
    log = tmp_path / "resumed" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "cri')  # killed while it wrote
    train(tmp_path / "resumed", **options)
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_report_that_is_not_finite_stops_the_run_and_is_not_logged(tmp_path):
    class Odd(Duel):
        def loss(self, turn, batch, step):
            return Loss(super().loss(turn, batch, step).total, {"ratio": torch.tensor(1.0 if step < 2 else math.inf)})

    with pytest.raises(Diverged, match=r"not finite at step 3: .*'ratio': inf"):
        train(tmp_path, Odd(), logging_steps=1)
    assert [json.loads(line)["ratio"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1.0, 1.0]


def test_what_several_turns_log_under_one_name_is_averaged(tmp_path):
    class Twice(Duel):
        def turns(self, step):
            return (Turn("student0", ("student",)), Turn("student1", ("student",)))

        def loss(self, turn, batch, step):
            return Loss(super().loss(turn, batch, step).total, {"size": torch.tensor(float(turn.name[-1]))})

    train(tmp_path, Twice(), max_train_steps=1, logging_steps=1)
    (line,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["size"] == 0.5 and line["student0/loss"] != line["student1/loss"]


def test_random_numbers_belong_to_samples():
    whole = SampleRandom(1, 2, "turn", range(4))
    parts = [SampleRandom(1, 2, "turn", [i]) for i in range(4)]
    assert torch.equal(whole.normal((2, 3)), torch.cat([p.normal((2, 3)) for p in parts]))
    assert torch.equal(whole[2:].uniform(), torch.cat([p.uniform() for p in parts[2:]]))
    assert not torch.equal(SampleRandom(1, 3, "turn", [0]).uniform(), SampleRandom(1, 2, "turn", [0]).uniform())
