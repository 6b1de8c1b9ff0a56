"""A run's tracker: told what the log is told, by one process, and closed without parting the others."""

import json
import struct
from pathlib import Path

import pytest
from processes import launch
from tensorboardX.proto.event_pb2 import Event

TRACKED = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_trainer import Duel, Noise
from sublimate.training.trainer import Trainer, TrainerConfig

folder = Path(sys.argv[1])
options = {"max_train_steps": 4, "train_batch_size": 2, "logging_steps": 2, "report_to": "tensorboard"}
about = {"data": {"prompts": None, "count": 3}, "edits": []}
trainer = Trainer(Duel(), Noise(), TrainerConfig(output_dir=folder, **options), about=about, progress=False)
trainer.run()
assert trainer.accelerator.trackers == []
trainer.accelerator.wait_for_everyone()  # as an export after it does
trainer.run()  # nothing is left to do, and the tracker starts and ends again
print("done")
"""


def scalars(folder):
    """What an event file holds, by name: (step, value) of each."""
    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.mark.slow
def test_processes_that_a_tracker_watches_stay_together(tmp_path):
    launch(TRACKED, tmp_path, Path(__file__).parent, processes=2)
    found = scalars(tmp_path / "sublimate")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in lines[0].keys() - {"step"}:
        assert [(step, pytest.approx(value)) for step, value in found[name]] == [
            (at["step"], at[name]) for at in lines
        ]
