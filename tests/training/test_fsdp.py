"""Sharded players: two processes train what unsharded ones train, save whole tensors, and leave plain modules."""

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from torch import nn

from sublimate.pipelines.memory_format import channels_last
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.distill import OBJECTIVES
from sublimate.training.fsdp import shard_players, sharding_asked
from sublimate.training.gradients import clip_gradients
from sublimate.training.objective import Objective
from sublimate.training.objectives.denoising import Denoising

# Every objective of the list, unsharded and sharded, from the same start and at a rate at which weights move; then the
# second of two steps again from the first one's checkpoint, and of the first objective with all players whole.
MATRIX = """
import os, sys
from pathlib import Path
from accelerate import Accelerator
sys.path[:0] = sys.argv[3:5]
Accelerator()
import torch
import test_objectives as kit
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from sublimate.pipelines.model import open_model

folder, model = Path(sys.argv[1]), open_model(sys.argv[2])
os.environ["FSDP_VERSION"] = "2"


def train(case, name, sharded, **options):
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded)
    trainer = kit.make_trainer(model, case, folder / case / name, max_grad_norm=0.1, validation_steps=1, **options)
    for group in (g for optimizer in trainer.optimizers.values() for g in optimizer.param_groups):
        group["initial_lr"], group["betas"], group["eps"] = 1e-2, (0.0, 0.9), 1e-1
    kinds = {id(m): type(m) for p in trainer.players.values() for m in p.module.modules()}
    assert sharded == any("FSDP" in kind.__name__ for kind in kinds.values()), case

    def between_steps(step):
        full = [p for p in trainer.players.values() if p.config.kind == "full"]
        assert all(isinstance(w, DTensor) == sharded for p in full for w in p.trainable().values())

    trainer.validate = between_steps
    trainer.run()
    for player in trainer.players.values():
        for module in player.module.modules():
            assert "FSDP" not in type(module).__name__ and not any("fsdp" in name for name in vars(module))
            assert not any(vars(module)[name] for name in ("_forward_pre_hooks", "_forward_hooks")), type(module)
        assert all(type(p) is torch.nn.Parameter for p in player.module.parameters())
    found = {name: value.detach().contiguous() for name, value in kit.weights(trainer).items()}
    (folder / case).mkdir(exist_ok=True)
    save_file(found, folder / case / f"{name}.{os.environ['RANK']}.safetensors")


for case in sys.argv[5:]:
    saving = {"gradient_checkpointing": "checkpointing" in case, "checkpointing_steps": 1}
    case = case.removesuffix("-checkpointing")
    train(case, "whole", False)
    train(case, "sharded", True, **saving)
    first = str(folder / case / "sharded" / "checkpoint-1")
    train(case, "resumed", True, resume_from_checkpoint=first)
    if case in sys.argv[5]:
        train(case, "resumed-whole", False, resume_from_checkpoint=first)
"""
# A critic and a discriminator, gradients through a network and a second call of it, players that train a part of
# their weights.
CASES = ("f_distill-checkpointing", "score_identity-adversarial", "speedupnet")


@pytest.fixture(scope="module")
def trained(tiny_sd_v, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    here = __file__.rsplit("/", 1)[0]
    launch(MATRIX, folder, tiny_sd_v, here, here + "/../support", *CASES, processes=2, timeout=900)
    return folder


NAMES = [case.removesuffix("-checkpointing") for case in CASES]


def read(folder, case, name, rank=0):
    return load_file(folder / case / f"{name}.{rank}.safetensors")


@pytest.mark.slow
def test_whole_players_resume_checkpoints_of_sharded_ones(trained):
    straight, resumed = (read(trained, NAMES[0], name) for name in ("sharded", "resumed-whole"))
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
class TestSharded:
    def test_it_trains_what_whole_players_train(self, trained, case):
        whole, sharded = (read(trained, case, name) for name in ("whole", "sharded"))
        assert whole.keys() == sharded.keys()
        for name, value in whole.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-6, msg=name)

    def test_every_process_ends_with_the_same_weights(self, trained, case):
        one, other = (read(trained, case, "sharded", rank) for rank in range(2))
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_it_resumes_bit_for_bit(self, trained, case):
        straight, resumed = (read(trained, case, name) for name in ("sharded", "resumed"))
        assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_sharding_is_asked_for_by_the_launcher_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not sharding_asked()  # there is one process, and no group
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert sharding_asked()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="FSDP_VERSION=1: write fsdp_version: 2"):
        sharding_asked()


UNMASKED = {"student": {"adam_weight_decay": 0.0}}


@pytest.mark.parametrize(
    ("method", "options", "masked", "sentence"),
    [
        (
            "consistency_distillation",
            {"guidance_input": False, "guidance_range": None},
            False,
            "reads a full player's",
        ),
        ("consistency_trajectory", {}, False, "reads a full player's weights beside calling it"),
        ("denoising", {"student": {"use_8bit_adam": True}}, False, "8-bit moments of student"),
        ("denoising", UNMASKED, True, "Masked weights of student cannot be sharded"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny_sd_v, method, options, masked, sentence):
    cls = registry.load(OBJECTIVES, method, Objective)
    objective = cls(open_model(str(tiny_sd_v)), cls.Config(**options))
    for player in objective.players().values() if masked else ():
        name, parameter = next(iter(player.trainable().items()))
        player.restrict({name: torch.zeros_like(parameter, dtype=torch.bool)})
    with pytest.raises(ValueError, match=sentence):
        shard_players(objective, torch.device("cpu"))


def test_strided_weights_are_refused(tiny_sd_v):
    model = open_model(tiny_sd_v)
    with channels_last(model), pytest.raises(ValueError, match="student with channels last cannot be sharded"):
        shard_players(Denoising(model, Denoising.Config()), torch.device("cpu"))


def test_clipping_is_by_the_norm_of_all_gradients():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (1, 1)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    assert clip_gradients(parameters, 2.5) == 5.0
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor([1.5, 2.0]))
