"""What a run reports: lines of JSON on disk, in the order of the steps, and to one of accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from sublimate.pipelines.folders import file_written_aside

# How trackers are told where an array's channels are.
_LAYOUTS: Mapping[str, Mapping[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


class Log:
    """`log.jsonl` in a run's folder, of which a resumed run's equals that of an uninterrupted one; and a tracker.

    Only the main process writes; all may call.

    Args:
        folder: the run's; made when the first line is written.
        accelerator: of the run, made with the tracker's name.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = folder / "log.jsonl", accelerator

    def start(self, step: int, project: str, about: Mapping[str, Any]) -> None:
        """Goes on from a step: what was reported after it is forgotten, as another run starts in its place.

        Args:
            step: finished steps.
            project: the tracker's project, or its folder.
            about: what the tracker shows of the run, as nested JSON.
        """
        if self.accelerator.is_main_process:
            self._rewind(step)
        self.accelerator.init_trackers(project, config=dict(_flat(about)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Reports finite numbers by name, after so many finished steps."""
        self.accelerator.log(dict(values), step=step)
        if not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")

    def show(self, step: int, picture: Tensor | None) -> None:
        """Shows a sample picture, (3, height, width) in [0, 1], in the trackers that take arrays."""
        if picture is None:
            return
        array = (255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0)[None].cpu().numpy()
        for tracker in self.accelerator.trackers:
            if tracker.name in _LAYOUTS:
                tracker.log_images({"samples": array}, step=step, **_LAYOUTS[tracker.name])

    def close(self) -> None:
        """Has the tracker write what it still holds. `Accelerator.end_training` would part the processes, too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def _rewind(self, step: int) -> None:
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A process that was killed while writing leaves half a line.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            with file_written_aside(self.path) as aside:
                aside.write_text("".join(kept), encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Nested options under dotted names, as every tracker takes them: numbers and texts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else json.dumps(value)
