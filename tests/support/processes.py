"""Several real processes that train together over gloo, on the CPU."""

import os
import socket
import subprocess
import sys

# A process that leaves while the group's threads run may be aborted by them.
LEAVE = """
from accelerate import PartialState
PartialState().destroy_process_group()
"""


def launch(code, *arguments, processes=1, timeout=120):
    """Runs `code` with the arguments in so many processes, as `accelerate launch` would, until all are done."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        variables |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **({k: str(v) for k, v in variables.items()} if processes > 1 else {})}
        command = [sys.executable, "-c", code + LEAVE, *map(str, arguments)]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, errors = worker.communicate(timeout=timeout)
        assert worker.returncode == 0, errors
