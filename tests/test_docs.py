"""The examples of docs/python.md run as they stand, one after the other."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub  # noqa: F401 (reads HfApi when it is imported, which must not be the stub)
from huggingface_hub import ModelCard

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


class Hub:
    """What is sent to the hub, by repository; nothing is."""

    def __init__(self):
        self.made, self.sent = [], {}

    def create_repo(self, repo_id, **_):
        self.made.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **_):
        assert repo_id in self.made
        root = Path(folder_path)
        self.sent[repo_id] = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch):
    stub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stub)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(f"diffusers.utils.hub_utils.{name}", getattr(stub, name))
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: ModelCard(""))
    return stub


@pytest.mark.slow
def test_the_python_examples_run(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["images"].shape == (1, 3, 32, 32) and torch.isfinite(names["images"]).all()
    assert (tmp_path / "ink-without-seven" / "model_index.json").is_file()
    bare = {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert bare < hub.sent["me/ink-one-step-bare"]
    assert {*bare, "README.md", "sublimate.json"} < hub.sent["me/ink-one-step"]
    assert names["rate"].value <= 1 and names["plan"].peak > 0
