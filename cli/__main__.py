"""Where `sublimate` and `python -m sublimate.cli` start."""

from __future__ import annotations

import sys

from sublimate.cli.app import run


def main() -> None:
    """Runs the command line and exits with its status."""
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
