"""Which versions of which packages made something, for its provenance."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("sublimate", "torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """The installed versions of this package, of what computes and of what models are saved as."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
