"""Two gloo processes must train what one process trains at the same global batch."""

from pathlib import Path

import pytest
import torch
from processes import launch
from safetensors.torch import load_file

WORKER = """
import runpy, sys
from pathlib import Path
from sublimate.training import gradients
gradients.BUCKET = 5  # so that there are several messages, some of one gradient
kit = runpy.run_path(sys.argv[1])
folder, size = Path(sys.argv[2]), int(sys.argv[3])
kit["train"](folder, kit["without_dropout"](kit["Duel"]()), train_batch_size=size, checkpointing_steps=6)
"""


def trained(folder, processes, batch):
    launch(WORKER, Path(__file__).with_name("test_trainer.py"), folder, batch, processes=processes)
    tensors = {}
    for path in sorted((folder / "checkpoint-6").glob("*.safetensors")):
        tensors |= {f"{path.stem}/{k}": v for k, v in load_file(path).items()}
    return tensors


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    one, two = trained(tmp_path / "one", 1, 4), trained(tmp_path / "two", 2, 2)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)


DRAWING = """
import sys
from accelerate import Accelerator
from safetensors.torch import save_file
from sublimate.pipelines.model import open_model
from sublimate.training import together
from sublimate.training.data_config import DataConfig
from sublimate.training.sources import make_source

together._MESSAGE = 1  # so that there are several
folder, checkpoint, prompts, cache = sys.argv[1:]
model, accelerator, drawn = open_model(checkpoint), Accelerator(), []
model.denoiser.network.register_forward_pre_hook(lambda _, given, named: drawn.append(len(given[0])), with_kwargs=True)
data = DataConfig(prompts=prompts, teacher_steps=1, cache_dir=None if cache == "none" else cache)
source = make_source(model, data, 1.0, progress=False)
name = f"{folder}/{accelerator.num_processes}-{accelerator.process_index}-{sum(drawn)}.safetensors"
save_file({"x0": source.tensors["images"]}, name)
"""


@pytest.mark.slow
def test_processes_share_the_drawing_of_the_teachers_samples(tiny_sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\nred cat\na boat\n")
    for processes in (1, 2):
        launch(DRAWING, tmp_path, tiny_sd, prompts, "none", processes=processes)
    drawn = {path.stem: load_file(path)["x0"] for path in tmp_path.glob("*.safetensors")}
    # Of three samples each of two draws two: shares are of one size.
    assert sorted(drawn) == ["1-0-3", "2-0-2", "2-1-2"]
    assert torch.equal(drawn["2-0-2"], drawn["2-1-2"])
    torch.testing.assert_close(drawn["2-0-2"], drawn["1-0-3"], rtol=1e-4, atol=1e-5)
    # What two draw and store, a single one reads, and draws nothing.
    stored = tmp_path / "stored"
    for processes in (2, 1):
        stored.mkdir(exist_ok=True)
        launch(DRAWING, stored, tiny_sd, prompts, tmp_path / "cache", processes=processes)
    found = {path.stem: load_file(path)["x0"] for path in stored.glob("*.safetensors")}
    assert sorted(found) == ["1-0-0", "2-0-2", "2-1-2"]
    assert all(torch.equal(x0, drawn["2-0-2"]) for x0 in found.values())
