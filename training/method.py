"""Method: what erasers and attacks share, options given as a configuration or by name."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from sublimate.training.config import Config as Options


class Method(ABC):
    """A method of a file of its own, with its options.

    Args:
        config: the method's options.
        options: the same by name, instead of `config`.

    Raises:
        TypeError: when both are given.
    """

    Config: ClassVar[type[Options]]
    paper: ClassVar[str]

    def __init__(self, config: Options | None = None, /, **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"Give the options of {self.name()} as a config or by name, not both.")
        self.config: Any = self.Config(**options) if config is None else config

    @classmethod
    def name(cls) -> str:
        """The method's name: that of its file."""
        return cls.__module__.rsplit(".", 1)[-1]
