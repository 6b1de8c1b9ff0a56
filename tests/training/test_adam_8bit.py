"""AdamW in 8 bits: without its library, its state in checkpoints, and what plans count of it."""

import importlib.util

import pytest
import torch
from torch import nn

from sublimate.pipelines.shapes import open_shapes
from sublimate.training import checkpoints
from sublimate.training.adam_8bit import BLOCK, SMALLEST
from sublimate.training.plan import Meter
from sublimate.training.players import PlayerConfig, make_player

EIGHT = PlayerConfig(use_8bit_adam=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_its_library_it_is_refused():
    with pytest.raises(ValueError, match=r"use_8bit_adam needs bitsandbytes .*pip install 'sublimate\[8bit\]'"):
        make_player(nn.Linear(2, 2), EIGHT).optimizer()


class RoundedMomentum(torch.optim.Optimizer):
    """State as bitsandbytes keeps it: codes of 8 bits, scales, and steps as a plain number."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("step", 0)
            state["step"] += 1
            old = (state["codes"].float() - 128) * state["scale"] if "codes" in state else torch.zeros(())
            moment = 0.9 * old + parameter.grad
            state["scale"] = moment.abs().max() / 127
            state["codes"] = (moment / state["scale"] + 128).round().to(torch.uint8)
            parameter -= 0.1 / state["step"] * moment


def trained(layer, optimizer, steps):
    for _ in range(steps):
        (layer(torch.arange(3.0)) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_state_of_integers_and_numbers_resumes_exactly(tmp_path):
    def started():
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, RoundedMomentum(layer.parameters())

    whole, optimizer = started()
    trained(whole, optimizer, 5)
    half, optimizer = started()
    trained(half, optimizer, 3)
    sections = {"weights": half.state_dict(), "optimizer": checkpoints.optimizer_tensors(optimizer)}
    path = checkpoints.write_checkpoint(tmp_path, 3, sections.items(), {"sections": list(sections)}, None)
    found, _ = checkpoints.read_checkpoint(path)
    again, optimizer = started()
    trained(again, optimizer, 1)
    optimizer.state[again.weight]["other"] = 1  # what was there before is gone
    again.load_state_dict(found["weights"])
    checkpoints.load_optimizer_tensors(optimizer, found["optimizer"])
    state = optimizer.state[again.weight]
    assert state.keys() == {"codes", "scale", "step"} and state["codes"].dtype == torch.uint8
    assert state["step"] == 3 and isinstance(state["step"], int)
    trained(again, optimizer, 2)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)


@pytest.mark.slow
def test_its_moments_are_counted_with_a_byte_each(tiny_sd_v):
    model = open_shapes(tiny_sd_v)
    player = make_player(model.denoiser, EIGHT)
    sizes = [p.numel() for p in player.trainable().values()]
    with Meter() as meter:
        optimizer = player.optimizer()
        for parameter in player.trainable().values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.zero_grad(set_to_none=True)
        for parameter in player.trainable().values():
            parameter.grad = torch.zeros_like(parameter)
        before = meter.now
        optimizer.step()
        optimizer.step()
    large = [n for n in sizes if n >= SMALLEST]
    assert large and meter.now - before == 2 * (
        sum(large) + sum(4 * -(-n // BLOCK) for n in large) + 4 * sum(n for n in sizes if n < SMALLEST)
    )
