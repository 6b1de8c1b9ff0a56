"""The examples of docs/python.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.mark.slow
def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["images"].shape == (1, 3, 32, 32) and torch.isfinite(names["images"]).all()
    assert (tmp_path / "ink-without-seven" / "model_index.json").is_file()
    assert names["rate"].value <= 1 and names["plan"].peak > 0
