"""Command lines, run in this process."""

from __future__ import annotations

import pytest

from sublimate.cli.app import run


def sublimate(capsys, *arguments):
    """Runs a command line: (exit status, standard output, what it said of errors)."""
    with pytest.raises(SystemExit) as stop:
        run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def failed(capsys, *arguments):
    """The one sentence of a command that fails."""
    status, _, err = sublimate(capsys, *arguments)
    said = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert status == 1, err
    assert len(said) == 1, err
    assert "Traceback" not in err
    return said[0]
