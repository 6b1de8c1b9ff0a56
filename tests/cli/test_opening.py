"""Where commands open models."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from accelerate import Accelerator
from commands import failed, sublimate

from sublimate.cli.opening import device_as_asked
from sublimate.pipelines.pictures import to_png


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch):
    """Says which device accelerate finds."""

    def found(name: str) -> None:
        monkeypatch.setattr(Accelerator, "device", property(lambda _: torch.device(name)))

    return found


@pytest.mark.parametrize(("found", "taken"), [("cuda:1", "cuda:1"), ("cpu", "cpu"), ("mps", "cpu")])
def test_a_gpu_is_taken_and_named_where_there_is_one(capsys, own, found, taken):
    own(found)
    assert device_as_asked("auto") == torch.device(taken)
    assert capsys.readouterr().out == ("" if taken == "cpu" else f"device: {taken}\n")


def test_a_device_that_was_named_is_taken(capsys, own):
    own("cuda:1")
    assert device_as_asked("cpu") == torch.device("cpu")
    assert capsys.readouterr().out == ""
    assert device_as_asked("meta") == torch.device("meta")
    assert capsys.readouterr().out == "device: meta\n"


@pytest.mark.parametrize("name", ["generate", "evaluate", "audit", "remove", "erase"])
def test_commands_take_the_gpu_unless_told_otherwise(name):
    command = importlib.import_module(f"sublimate.cli.{name}").command
    assert inspect.signature(command).parameters["device"].default == "auto"


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "picture.png").write_bytes(to_png(torch.zeros(3, 16, 16)))
    return tmp_path / "picture.png"


@pytest.mark.slow
def test_a_device_that_is_not_there(capsys, tiny_sd, tmp_path, picture):
    for name, more in {
        "generate": ["cat"],
        "evaluate": [],
        "audit": [tiny_sd, "--concept", "seven"],
        "remove": [picture, picture],
        "erase": ["cat"],
    }.items():
        command = [name, tiny_sd, *more, "--device", "gpu"]
        assert "There is no device 'gpu' here" in failed(capsys, *command), name
    draw = ["generate", tiny_sd, "cat", "--steps", 1, "--guidance-scale", 1, "--out", tmp_path, "--device"]
    status, out, _ = sublimate(capsys, *draw, "cpu")
    assert status == 0 and "device:" not in out
