"""Signals that ask a run to stop, noted instead of obeyed at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one of either takes effect at once.

    In another thread than the main one, which alone may handle signals, none is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None is what another language installed, which Python cannot put back.
    previous: dict[int, Any] = {number: handler for number, handler in found.items() if handler is not None}
    try:
        for number in previous:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
