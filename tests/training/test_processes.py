"""Two gloo processes must train what one process trains at the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import runpy, sys
from pathlib import Path
kit = runpy.run_path(sys.argv[1])
folder, size = Path(sys.argv[2]), int(sys.argv[3])
kit["train"](folder, kit["without_dropout"](kit["Duel"]()), train_batch_size=size, checkpointing_steps=6)
# A process that leaves while the group's threads run may be aborted by them.
from accelerate import PartialState
PartialState().destroy_process_group()
"""


def launch(folder, processes, batch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    kit = Path(__file__).with_name("test_trainer.py")
    workers = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        variables |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **({k: str(v) for k, v in variables.items()} if processes > 1 else {})}
        command = [sys.executable, "-c", WORKER, str(kit), str(folder), str(batch)]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    tensors = {}
    for path in sorted((folder / "checkpoint-6").glob("*.safetensors")):
        tensors |= {f"{path.stem}/{k}": v for k, v in load_file(path).items()}
    return tensors


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    one, two = launch(tmp_path / "one", 1, 4), launch(tmp_path / "two", 2, 2)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)
