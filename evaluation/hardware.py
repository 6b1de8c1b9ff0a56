"""What a number was measured on: one line about the machine, and the versions of what computed it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def hardware_line() -> str:
    """The processor, the threads that torch computes with, the accelerators if any, and the torch version."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    parts = [f"{_processor()}, {threads} thread{'s' * (threads > 1)} on {cores} cores", *_accelerators()]
    return f"{'; '.join(parts)}; torch {torch.__version__}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ["Apple GPU"] if torch.backends.mps.is_available() else []
