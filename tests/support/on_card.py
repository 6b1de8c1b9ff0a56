"""What runs on the card in a process of its own, and says there what it said on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacked import attack_of, case_of
from card import card
from grid import called, matrix
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.training.randomness import SampleRandom


def images(folder: str) -> None:
    """What a model draws."""

    def draw(model: Model) -> dict[str, Tensor]:
        prompts = called(model, "red cat", "a dog") if model.any_condition() else 2
        return {"images": generate(model, prompts, steps=2, shown=_shown(model, 2))}

    same(folder, draw)


def objective(folder: str, case: str) -> None:
    """What an objective's row trains."""
    rows = matrix("training/test_objectives")

    def train(model: Model) -> dict[str, Tensor]:
        trainer = rows.make_trainer(model, case, Path(tempfile.mkdtemp()))
        trainer.run()
        return rows.weights(trainer)

    same(folder, train)


def eraser(folder: str, case: str) -> None:
    """What a model says when an eraser's row has edited it."""
    rows = matrix("erasure/test_erasers")

    def erase(model: Model) -> dict[str, Tensor]:
        edit = rows.fit(model, case)
        path = edit.save(Path(tempfile.mkdtemp()) / "edit.safetensors")
        with Edit.load(path).applied(model), torch.no_grad():
            x_t = torch.ones(1, *model.latent_shape, device=model.device)
            told = model.encode_prompts(called(model, "cat")).replace(**(_shown(model, 1) or {}))
            return {"output": model.denoiser(x_t, model.schedule.t_max / 2, told).output}

    same(folder, erase)


def attack(folder: str, case: str) -> None:
    """What an attack's row makes of a model."""

    def attacked(model: Model) -> dict[str, Tensor]:
        model.defaults |= {"steps": 2, "guidance_scale": 2.0}
        return {"images": attack_of(case).run(model, case_of(model), seed=3).images}

    same(folder, attacked)


def same(folder: str, work: Callable[[Model], dict[str, Tensor]]) -> None:
    """Works on a model of the CPU and on one of the card, and compares; a refusal is the same sentence on both."""
    expected, refusal = _done(work, open_model(folder))
    with card() as device:
        found, said = _done(work, open_model(folder, device=device))
        found = {name: tensor.cpu() for name, tensor in found.items()}
    assert said == refusal and found.keys() == expected.keys() and (found or refusal)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def _done(work: Callable[[Model], dict[str, Tensor]], model: Model) -> tuple[dict[str, Tensor], str]:
    try:
        return work(model), ""
    except (ValueError, pytest.skip.Exception) as refusal:
        return {}, str(refusal)


def _shown(model: Model, count: int) -> Condition | None:
    """Pictures, for models that see some."""
    if not model.backbone.shown:
        return None
    pictures = model.render(torch.ones(count, *model.latent_shape, device=model.device))
    return model.backbone.show_examples(model.pipeline, pictures, SampleRandom(0, 0, "shown", range(count)))
