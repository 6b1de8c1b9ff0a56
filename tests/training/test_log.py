"""A run's tracker: told what the log is told, by one process, and closed without parting the others."""

import io
import json
import struct
from pathlib import Path

import pytest
from PIL import Image
from processes import launch
from tensorboardX.proto.event_pb2 import Event

TRACKED = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
from test_trainer import Duel, Noise
from sublimate.training.trainer import Trainer, TrainerConfig

folder = Path(sys.argv[1])
options = {"max_train_steps": 4, "train_batch_size": 2, "logging_steps": 2, "report_to": "tensorboard"}


def validate(step):
    picture = torch.zeros(3, 2, 5)
    picture[0] = 1.0  # red
    return picture if trainer.accelerator.is_main_process else None


options["validation_steps"] = 4
about = {"data": {"prompts": None, "count": 3}, "edits": []}
config = TrainerConfig(output_dir=folder, **options)
trainer = Trainer(Duel(), Noise(), config, validate=validate, about=about, progress=False)
trainer.run()
assert trainer.accelerator.trackers == []
trainer.accelerator.wait_for_everyone()  # as an export after it does
"""


def events(folder):
    """What an event file holds, by name: (step, value) of each."""
    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                told = value.image.encoded_image_string or value.simple_value
                found.setdefault(value.tag, []).append((event.step, told))
    return found


@pytest.mark.slow
def test_processes_that_a_tracker_watches_stay_together(tmp_path):
    launch(TRACKED, tmp_path, Path(__file__).parent, processes=2)
    found = events(tmp_path / "sublimate")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in lines[0].keys() - {"step"}:
        assert [(step, pytest.approx(value)) for step, value in found[name]] == [
            (at["step"], at[name]) for at in lines
        ]
    ((step, picture),) = found["samples"]
    image = Image.open(io.BytesIO(picture))
    assert step == 4 and image.size == (5, 2) and image.getpixel((0, 0)) == (255, 0, 0)
