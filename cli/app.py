"""The dispatcher: finds subcommands by their file names, and imports only the one that is asked for."""

from __future__ import annotations

import ast
import difflib
import importlib
import logging
import os
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import metadata
from typing import Any, NoReturn

from sublimate.cli.errors import SAVING_MEMORY, one_sentence, raise_on_sigterm
from sublimate.training.registry import first_sentence, read_source

PACKAGE = "sublimate.cli"
SUMMARY = "Distil diffusion models to one step, erase concepts from them, and measure both."
OPTIONS = {
    "--debug": "show the traceback of an error (may stand anywhere)",
    "--version": "show the version and exit",
    "--help": "show this help and exit; COMMAND --help shows the command's own",
}
USAGE_ERROR = 2
SHARED = frozenset({"distill", "evaluate", "methods"})
"""What several processes do together; any other command would do all of its work, and write, in each of them."""


def subcommands() -> dict[str, str]:
    """Each subcommand's name and one-line description; none is imported.

    A file of this package is a subcommand when it defines a function `command`, whose parameters are typer's. Its
    name is the command's, and the first paragraph of its docstring the description.
    """
    found = {}
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__):
        tree = read_source(f"{PACKAGE}.{module.name}")
        if any(isinstance(node, ast.FunctionDef) and node.name == "command" for node in tree.body):
            found[module.name] = first_sentence(tree)
    return dict(sorted(found.items()))


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs one command line and exits: 0 done, 1 failed, 2 used wrongly, 128 + n stopped by signal n.

    Args:
        arguments: what follows the program's name.
    """
    arguments, debug = _take_debug(arguments)
    with one_sentence(debug):
        raise_on_sigterm()
        if not arguments:
            print(_help(), file=sys.stderr)
            raise SystemExit(USAGE_ERROR)
        name, *rest = arguments
        if name in ("--help", "-h"):
            print(_help())
        elif name == "--version":
            print(f"sublimate {metadata.version('sublimate')}")
        else:
            _check_name(name)
            if name not in SHARED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(f"sublimate {name} works in one process: start it without a launcher, or with one.")
            _invoke(name, rest, debug)
    raise SystemExit(0)


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out wherever it stands before `--`, because it is added at the end of a command that failed."""
    ours = list(arguments)
    end = ours.index("--") if "--" in ours else len(ours)
    kept = [argument for argument in ours[:end] if argument != "--debug"]
    return kept + ours[end:], len(kept) < end


def _check_name(name: str) -> None:
    """Exits with status 2 when there is no such subcommand."""
    names = subcommands()
    if name in names:
        return
    if name.startswith("-"):
        sentence = f"No such option '{name}'; options of a command follow its name."
    else:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        suggestion = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}."
        sentence = f"No such command '{name}'; {suggestion}"
    print(f"Error: {sentence}\nTry 'sublimate --help' for help.", file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def _invoke(name: str, arguments: list[str], debug: bool) -> None:
    import typer

    # What the library notes on its way reaches the terminal, as its warnings do.
    logging.getLogger("sublimate").setLevel(logging.INFO)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)
    module = importlib.import_module(f"{PACKAGE}.{name}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    passing = (typer.Exit, typer.Abort, typer.BadParameter)
    app.command()(_guarded(module.command, debug, passing, getattr(module, "SAVING_MEMORY", SAVING_MEMORY)))
    app(arguments, prog_name=f"sublimate {name}")


def _guarded(
    function: Callable[..., Any], debug: bool, passing: tuple[type[BaseException], ...], saving_memory: str
) -> Callable[..., Any]:
    """The function with its errors explained before typer sees them: typer would swallow what Ctrl-C says."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with one_sentence(debug, passing, saving_memory):
            return function(*args, **kwargs)

    return guarded


def _help() -> str:
    commands = subcommands()
    width = max(map(len, [*commands, *OPTIONS])) + 2
    lines = ["Usage: sublimate [--debug] COMMAND [ARGUMENTS]...", "", SUMMARY]
    for title, rows in (("Commands:", commands), ("Options:", OPTIONS)):
        lines += ["", title]
        for name, text in rows.items():
            lines += textwrap.wrap(text, 100, initial_indent=f"  {name:{width}}", subsequent_indent=" " * (width + 2))
    return "\n".join(lines)
