"""Several real processes that train together over gloo, on the CPU.

They are forked from one that has imported what they need, since that takes as long as many a test.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# Reads jobs, one a line; forks a process for each set of variables; answers whether one failed.
PARENT = """
import gc, json, os, signal, sys, traceback
import torch, accelerate.state, sublimate.training.distill, sublimate.evaluation.drawing


def child(job, variables, errors):
    sys.stderr = open(errors, "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    os.dup2(2, 1)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c", *job["arguments"]]
    try:
        exec(compile(job["code"], "<launched>", "exec"), {"__name__": "__main__"})
        # A process that leaves while the group's threads run may be aborted by them.
        accelerate.state.PartialState().destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


gc.freeze()
for line in sys.stdin:
    job, running, failed = json.loads(line), set(), False
    for variables, errors in zip(job["variables"], job["errors"]):
        running.add(pid := os.fork())
        if pid == 0:
            child(job, variables, errors)
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not failed:
            failed = True
            for other in running:  # which wait for it
                os.kill(other, signal.SIGKILL)
    print(failed, flush=True)
"""


@cache
def _parent() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PARENT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def launch(code: str, *arguments: object, processes: int = 1, timeout: float = 120) -> None:
    """Runs `code` with the arguments in so many processes, as `accelerate launch` would, until all are done."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = []
    for rank in range(processes):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        told |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        told = {key: str(value) for key, value in told.items()} if processes > 1 else {}
        variables.append({**os.environ, "OMP_NUM_THREADS": "1", **told})
    with tempfile.TemporaryDirectory() as folder:
        errors = [str(Path(folder) / str(rank)) for rank in range(processes)]
        job = {"code": code, "arguments": list(map(str, arguments)), "variables": variables, "errors": errors}
        parent = _parent()
        assert parent.stdin is not None and parent.stdout is not None
        print(json.dumps(job), file=parent.stdin, flush=True)
        ended = select.select([parent.stdout], [], [], timeout)[0]
        if not ended:
            os.killpg(parent.pid, 9)
            _parent.cache_clear()
        said = "\n".join(Path(path).read_text(encoding="utf-8") for path in errors if Path(path).exists())
        assert ended, f"{processes} processes took more than {timeout} s:\n{said}"
        assert parent.stdout.readline().strip() == "False", said
