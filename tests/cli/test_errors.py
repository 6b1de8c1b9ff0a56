"""Every kind of failure has its sentence and its exit status."""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal

import pytest
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sublimate.cli import distill, erase, generate
from sublimate.cli.app import run
from sublimate.cli.errors import Terminated, explain, one_sentence
from sublimate.erasure.methods.esd import ESD
from sublimate.training.config import Config, ConfigError, load_config, parse_overrides, validate_section
from sublimate.training.distill import DistillConfig


class Stopped(Exception):
    signal = signal.SIGTERM


class Options(Config):
    rate: float = 1.0


def failure(function, *arguments) -> BaseException:
    """The exception as it is caught, with its traceback."""
    with pytest.raises(BaseException) as caught:
        function(*arguments)
    return caught.value


FULL = "The disk is full{}: free some space and run the same command again; nothing already there was changed."


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (KeyboardInterrupt(), "Interrupted.", 130),
        (Terminated(), "Terminated.", 143),
        (Stopped("Saved x; the same command again resumes."), "Saved x; the same command again resumes.", 143),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), FULL.format(" while writing a/b"), 1),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            FULL.format(""),
            1,
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b does not exist.", 1),
        (FileNotFoundError("There is no checkpoint 7."), "There is no checkpoint 7.", 1),
        (PermissionError(errno.EACCES, "Permission denied", b"a/b"), "a/b: permission denied.", 1),
        (
            OSError("a/b is no local folder\n  and no model\non the hub."),
            "a/b is no local folder and no model on the hub.",
            1,
        ),
        (
            ModuleNotFoundError("No module named 'datasets'", name="datasets"),
            "The package 'datasets' is needed for this and is not installed: pip install it.",
            1,
        ),
        (
            RuntimeError("shapes differ."),
            "RuntimeError: shapes differ; this was not expected, run again with --debug to see where it comes from.",
            1,
        ),
        (
            ValueError(),
            "ValueError: no message; this was not expected, run again with --debug to see where it comes from.",
            1,
        ),
        (MemoryError(), "Out of memory: free some, or take less at once (MemoryError).", 1),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "Out of memory: free some, or take less at once (CUDA out of memory).",
            1,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_sentence(error: BaseException, sentence: str, status: int) -> None:
    assert explain(error) == (sentence, status)


@pytest.mark.parametrize("name", ["audit", "distill", "erase", "evaluate", "generate", "remove"])
def test_out_of_memory_names_options_that_the_command_has(name, capsys):
    advice = importlib.import_module(f"sublimate.cli.{name}").SAVING_MEMORY
    with pytest.raises(SystemExit, match="0"):
        run([name, "--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in re.findall(r"--[a-z-]+", advice))


def test_out_of_memory_names_keys_that_configurations_have():
    assigned = re.findall(r"[a-z_.]+=[a-z0-9]+", distill.SAVING_MEMORY)
    config = load_config(DistillConfig, "ink_f_distill", assigned, kind="distill")
    assert config.dtype == "bfloat16" and config.trainer.gradient_checkpointing and len(assigned) == 3
    assert config.objective["student"]["kind"] == "lora"
    named = re.findall(r"trainer\.([a-z_]+)", distill.SAVING_MEMORY)
    assert named[:2] == ["train_batch_size", "gradient_accumulation_steps"]
    assert all(hasattr(config.trainer, name) for name in named)
    assert ESD(**parse_overrides(re.findall(r"--set ([^;, ]+)", erase.SAVING_MEMORY))).config.gradient_checkpointing


def test_what_a_command_says_of_memory_is_its_own(monkeypatch, capsys):
    monkeypatch.setattr(generate, "command", _greedy)
    with pytest.raises(SystemExit, match="1"):
        run(["generate"])
    assert f"Out of memory: {generate.SAVING_MEMORY} (CUDA out of memory)" in capsys.readouterr().err


def _greedy():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_disk_full_is_found_in_the_cause() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "x.safetensors")
    assert explain(error)[0] == FULL.format(" while writing x.safetensors")


def test_our_messages_stand_as_they_are_and_others_get_a_hint() -> None:
    ours = failure(validate_section, Options, {"rat": 1})
    assert isinstance(ours, ConfigError)
    assert explain(ours) == ("Unknown key 'objective.rat'; did you mean 'objective.rate'?", 1)
    others = failure(torch.zeros(2).reshape, 3)
    assert isinstance(others, RuntimeError)
    assert "--debug" in explain(failure(int, "x"))[0]


def test_pydantic_errors_become_one_sentence() -> None:
    error = failure(lambda: Options(rate="fast"))
    assert isinstance(error, ValidationError)
    assert explain(error) == ("'rate' must be a valid number, not 'fast'.", 1)


def test_damaged_safetensors_file(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no tensors in here")
    sentence, status = explain(failure(load_file, path))
    assert sentence.startswith("A safetensors file is damaged or is none (") and status == 1


def test_notes_follow_the_sentence() -> None:
    error = KeyboardInterrupt()
    error.add_note("The same command\nagain resumes.")
    assert explain(error) == ("Interrupted. The same command again resumes.", 130)


def test_one_sentence_exits_and_leaves_passing_exceptions_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"), one_sentence():
        raise OSError("gone.")
    assert capsys.readouterr().err == "Error: gone.\n"
    with pytest.raises(LookupError), one_sentence(passing=(LookupError,)):
        raise LookupError
    with pytest.raises(SystemExit, match="7"), one_sentence():
        raise SystemExit(7)
