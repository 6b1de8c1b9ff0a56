"""What the command says when something goes wrong: one clear sentence and an exit status, never a bare traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

FAILED = 1
READER_GONE = 128 + 13
SAVING_MEMORY = "free some, or take less at once"
DEBUG_HINT = "run again with --debug to see where it comes from"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; handled like Ctrl-C, so that whatever cleans up after the one cleans up after the other."""


def raise_on_sigterm() -> None:
    """Makes SIGTERM raise `Terminated`."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def one_sentence(
    debug: bool = False, passing: tuple[type[BaseException], ...] = (), saving_memory: str = SAVING_MEMORY
) -> Iterator[None]:
    """Turns an exception into one sentence on stderr and an exit status.

    Args:
        debug: print the traceback first.
        passing: exceptions that are left alone.
        saving_memory: what to do where memory does not suffice.

    Raises:
        SystemExit: in place of the exception.
    """
    try:
        yield
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, passing):
            raise
        if debug:
            traceback.print_exception(error)
        if isinstance(error, BrokenPipeError) and not sys.stdout.isatty():
            _leave_quietly()
        sentence, status = explain(error, saving_memory)
        print(sentence if status > 128 else f"Error: {sentence}", file=sys.stderr)
        raise SystemExit(status) from None


def explain(error: BaseException, saving_memory: str = SAVING_MEMORY) -> tuple[str, int]:
    """The sentence and the exit status for an exception; notes added to the exception (PEP 678) follow the sentence.

    Exceptions with an integer attribute `signal` report a stop by that signal.
    """
    sentence, status = _explain(error, saving_memory)
    # Messages from other libraries run over many lines.
    return " ".join(" ".join([sentence, *getattr(error, "__notes__", [])]).split()), status


def _explain(error: BaseException, saving_memory: str) -> tuple[str, int]:
    text = str(error)
    number = getattr(error, "signal", None)
    if isinstance(number, int):
        return text, 128 + number
    if isinstance(error, Terminated):
        return text or "Terminated.", 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return text or "Interrupted.", 128 + signal.SIGINT
    kind = type(error).__name__
    if (full := _disk_full(error)) is not None:
        where = f" while writing {full}" if full else ""
        return (
            f"The disk is full{where}: free some space and run the same command again; "
            "nothing already there was changed."
        ), FAILED
    if kind in ("OutOfMemoryError", "MemoryError"):
        return f"Out of memory: {saving_memory} ({text.partition('.')[0] or kind}).", FAILED
    if kind == "SafetensorError":
        return f"A safetensors file is damaged or is none ({text}): fetch or save it again.", FAILED
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("sublimate"):
        return f"The package '{error.name}' is needed for this and is not installed: pip install it.", FAILED
    if isinstance(error, OSError):
        return _explain_os_error(error), FAILED
    if kind == "ValidationError" and type(error).__module__.startswith("pydantic"):
        from sublimate.training.config import describe_error

        return describe_error(error), FAILED  # type: ignore[arg-type]
    if isinstance(error, (ValueError, TypeError)) and text:
        return (text if _raised_by_us(error) else f"{text.rstrip('.')} ({DEBUG_HINT})."), FAILED
    return f"{kind}: {text.rstrip('.') or 'no message'}; this was not expected, {DEBUG_HINT}.", FAILED


def _explain_os_error(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist."
    return f"{path}: {(error.strerror or str(error)).lower()}."


def _disk_full(error: BaseException | None) -> str | None:
    """The path that could not be written ("" when unknown) if the disk is full, else None; causes are searched."""
    while error is not None:
        # safetensors and torch report the system's message inside exceptions of their own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return str(getattr(error, "filename", None) or "")
        error = error.__cause__ or error.__context__
    return None


def _raised_by_us(error: BaseException) -> bool:
    """Whether the exception left a function of this package first: only our messages are written for users."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("sublimate.")


def _leave_quietly() -> NoReturn:
    """Ends like a program that SIGPIPE stopped: standard output lost its reader (`| head`), which is no error."""
    # Python flushes once more at exit, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(READER_GONE) from None
