"""Where `sublimate` and `python -m sublimate.cli` start."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    print("sublimate: no subcommand is available yet", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
