"""The command line as its user sees it: real processes, their output and exit status."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sublimate.cli.app import subcommands
from sublimate.training import registry

BROKEN = '''"""A subcommand for the tests: fails in a chosen way."""

import os, signal
from typing import Annotated
import typer

def command(how: Annotated[str, typer.Argument(help="the way")], times: int = 1) -> None:
    """Fail in a chosen way."""
    if how == "value":
        raise ValueError(f"The value {times} is bad:\\ngive another.")
    if how == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "ctrl-c":
        raise KeyboardInterrupt("Stopped; the same command again resumes.")
    if how == "usage":
        raise typer.BadParameter("not so")
    if how == "exit":
        raise typer.Exit(5)
    if how == "bug":
        {}["key"]
    print("done", how, times)
'''


def start(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, after `code`."""
    program = f"{code}\nfrom sublimate.cli.__main__ import main\nmain()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def broken(tmp_path: Path):
    """Starts the command with one more subcommand, `broken`, in its package."""
    (tmp_path / "broken.py").write_text(BROKEN)
    code = f"import sublimate.cli; sublimate.cli.__path__.append({str(tmp_path)!r})"
    return lambda *arguments: start(*arguments, code=code)


def test_help_lists_every_subcommand_without_importing_it() -> None:
    done = start("--help", code="import sys, atexit; atexit.register(lambda: print('torch' in sys.modules))")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: sublimate ")
    assert all(f"\n  {name} " in done.stdout for name in subcommands())
    assert done.stdout.endswith("\nFalse\n")


def test_no_subcommand_imports_torch_before_it_runs() -> None:
    code = f"import sys, importlib\nfor name in {[*subcommands()]}: importlib.import_module('sublimate.cli.' + name)\n"
    done = subprocess.run([sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", subcommands())
def test_subcommand_help(name: str) -> None:
    done = start(name, "--help")
    assert done.returncode == 0
    assert f"Usage: sublimate {name} " in done.stdout


def test_version() -> None:
    assert start("--version").stdout == f"sublimate {metadata.version('sublimate')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metods"], "Error: No such command 'metods'; did you mean 'methods'?"),
        (["zzz"], "Error: No such command 'zzz'; there are "),
        (["app"], "Error: No such command 'app'; "),
        (["--quiet"], "Error: No such option '--quiet'"),
        ([], "Usage: sublimate "),
        (["methods", "--quiet"], "Error: No such option: --quiet"),
    ],
)
def test_wrong_use_exits_with_2(arguments: list[str], message: str) -> None:
    done = start(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_methods_names_every_method() -> None:
    done = start("methods")
    assert done.returncode == 0
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("  ")]
    for package in ("sublimate.training.objectives", "sublimate.erasure.methods"):
        for name in registry.available(package):
            card = registry.card(package, name)
            assert [card.name, card.paper, card.summary] in lines


def test_every_method_says_what_it_is() -> None:
    for package in ("sublimate.training.objectives", "sublimate.erasure.methods"):
        for card in (registry.card(package, name) for name in registry.available(package)):
            assert card.paper and card.summary, card


@pytest.mark.slow
def test_a_file_is_all_it_takes(broken) -> None:
    assert "\n  broken     A subcommand for the tests: fails in a chosen way.\n" in broken("--help").stdout
    assert "\n  Fail in a chosen way.\n" in broken("broken", "--help").stdout
    done = broken("broken", "not", "--times", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done not 3\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "stderr"),
    [
        ("value", 1, "Error: The value 1 is bad: give another.\n"),
        ("term", 128 + signal.SIGTERM, "Terminated.\n"),
        ("ctrl-c", 128 + signal.SIGINT, "Stopped; the same command again resumes.\n"),
        ("exit", 5, ""),
        (
            "bug",
            1,
            "Error: KeyError: 'key'; this was not expected, run again with --debug to see where it comes from.\n",
        ),
    ],
)
def test_errors_are_one_sentence(broken, how: str, status: int, stderr: str) -> None:
    done = broken("broken", how)
    assert (done.returncode, done.stderr) == (status, stderr)


@pytest.mark.slow
def test_typers_own_errors_pass(broken) -> None:
    done = broken("broken", "usage")
    assert done.returncode == 2
    assert "not so" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--debug", "broken", "bug"], ["broken", "bug", "--debug"]])
def test_debug_shows_the_traceback(broken, arguments: list[str]) -> None:
    done = broken(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert 'broken.py", line' in done.stderr


@pytest.mark.slow
def test_debug_after_two_dashes_is_an_argument(broken) -> None:
    assert broken("broken", "--", "--debug").stdout == "done --debug 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("buffered", ["", "1"])
def test_losing_the_reader_is_no_error(buffered: str) -> None:
    command = f"PYTHONUNBUFFERED={buffered} {sys.executable} -m sublimate.cli methods | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 128 + signal.SIGPIPE)  # 0 when all was written before the reader left


def test_subcommand_files_start_with_a_short_docstring() -> None:
    for name, summary in subcommands().items():
        assert summary.endswith("."), name
        assert len(summary) <= 112, name
        source = Path(registry.__file__).parents[1].joinpath("cli", f"{name}.py").read_text()
        assert ast.get_docstring(ast.parse(source)), name
