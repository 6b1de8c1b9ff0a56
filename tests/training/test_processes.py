"""Two gloo processes must train what one process trains at the same global batch."""

from pathlib import Path

import pytest
import torch
from processes import launch
from safetensors.torch import load_file

WORKER = """
import runpy, sys
from pathlib import Path
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
