"""The hardware line names what is there and nothing about the place."""

from __future__ import annotations

import platform

import torch

from sublimate.evaluation.hardware import hardware_line


def test_the_line_names_processor_threads_and_torch():
    line = hardware_line()
    assert "\n" not in line and f"torch {torch.__version__}" in line
    assert f", {torch.get_num_threads()} thread" in line
    assert platform.node() not in line


def test_accelerators_are_counted_by_name(monkeypatch):
    names = ["H200", "H200", "L4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert "; 2 x H200; 1 x L4; torch" in hardware_line()
