"""Finished parts of an audit on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sublimate.erasure.request import Concept
from sublimate.evaluation.attack import Attack
from sublimate.evaluation.audit_result import Finding, Trial, as_bytes
from sublimate.evaluation.blindspots import Atom
from sublimate.evaluation.criteria import Criterion
from sublimate.evaluation.erasure_result import Comparison, Drift, ErasureResult, Example
from sublimate.evaluation.intervals import Difference, Rate
from sublimate.evaluation.studies import ErasureStudy
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.folders import file_written_aside
from sublimate.pipelines.model import Model, weights_hash
from sublimate.pipelines.placement import name_of
from sublimate.pipelines.versions import versions
from sublimate.training.checkpoints import fingerprint

log = logging.getLogger(__name__)
Made = TypeVar("Made")


class Parts:
    """The study and the trials of an audit, each in a file that is there when the part is done, and only then.

    A file's name has the fingerprint of everything that its content depends on, so that parts of another model,
    concept, study, detector, seed or version are never taken for this audit's.

    Args:
        folder: where the files are; without one nothing is kept.
        known: what all parts depend on, see `identity`.
    """

    def __init__(self, folder: Path | None, known: Mapping[str, Any]) -> None:
        self.folder, self.known = folder, known

    def study(
        self, study: ErasureStudy, measure: Callable[[], tuple[ErasureResult, Sequence[Atom]]]
    ) -> tuple[ErasureResult, tuple[Atom, ...]]:
        """The study's result and the map of side effects: read, or measured and written."""
        if (there := self._read("study", {})) is not None:
            return _result(study, *there), tuple(_made(Atom, atom) for atom in there[0]["atoms"])
        result, atoms = measure()
        record = {**result.to_dict(), "atoms": [asdict(atom) for atom in atoms]}
        record["examples"] = [[one.role, one.prompt, one.seed] for one in result.examples]
        images = [torch.stack([one.before, one.after]) for one in result.examples]
        self._write("study", {}, record, {"examples": as_bytes(torch.stack(images))} if images else {})
        return result, tuple(atoms)

    def trial(self, attack: Attack) -> Trial | None:
        """What came of an attack, where that is written."""
        there = self._read(attack.name(), _options(attack))
        return None if there is None else _trial(*there)

    def write_trial(self, attack: Attack, trial: Trial) -> None:
        """Writes what came of an attack."""
        record = {**trial.to_dict(), "seconds": trial.seconds, "bar": trial.bar, "prompts": trial.edited.prompts}
        images = {"base": trial.base.images, "edited": trial.edited.images}
        self._write(attack.name(), _options(attack), record, images)

    def _path(self, folder: Path, name: str, options: Mapping[str, Any]) -> Path:
        return folder / f"{name}-{fingerprint(self.known, options)[:16]}.safetensors"

    def _read(self, name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if self.folder is None or not (path := self._path(self.folder, name, options)).is_file():
            return None
        log.info("%s is taken from %s.", name.replace("_", " ").capitalize(), path)
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["part"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def _write(
        self, name: str, options: Mapping[str, Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        if self.folder is not None:
            with file_written_aside(self._path(self.folder, name, options)) as aside:
                save_file(dict(tensors), aside, metadata={"part": json.dumps(record)})


def identity(
    base: Model,
    edited: Model,
    concept: Concept,
    study: ErasureStudy,
    detector: Detector,
    *,
    pictures: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that all parts of an audit depend on, as JSON values."""
    asked = {role: (prompts.texts, list(map(dict, prompts.expected))) for role, prompts in study.prompts.items()}
    judged = (study.concept, study.group, study.label, study.seeds, asdict(study.bars))
    tensors = (*detector.named_parameters(), *detector.named_buffers()) if isinstance(detector, nn.Module) else ()
    known = {
        "base": _model(base),
        "edited": _model(edited),
        "concept": asdict(concept),
        "study": (judged, asked),
        "detector": (type(detector).__name__, dict(detector.groups), getattr(detector, "threshold", None)),
        "detector hash": weights_hash(tensors),
        "pictures": pictures,
        "seed": seed,
        "versions": versions(),
    }
    return json.loads(json.dumps(known, default=str))


def _model(model: Model) -> dict[str, Any]:
    scheduler = getattr(model.pipeline, "scheduler", None)
    return {
        "hash": model.content_hash(),
        "dtype": name_of(model.dtype),
        "defaults": model.defaults,
        "scheduler": None if scheduler is None else dict(scheduler.config),
    }


def _options(attack: Attack) -> dict[str, Any]:
    """What an attack's results depend on; files that it names count by what they hold."""
    options = attack.depends_on()
    texts = {value for value in _leaves(options) if isinstance(value, str) and len(value) < 4096}
    files = sorted(text for text in texts if Path(text).is_file())
    return {**options, "files": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]}


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _leaves(value)
    else:
        yield values


def _result(study: ErasureStudy, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ErasureResult:
    images = tensors["examples"] / 255 if record["examples"] else ()
    return ErasureResult(
        study=study,
        rates={name: _comparison(values) for name, values in record["rates"].items()},
        siblings={name: _comparison(values) for name, values in record["siblings"].items()},
        drawn_instead=record["drawn_instead"],
        drift=None if record["drift"] is None else _made(Drift, record["drift"]),
        criteria=tuple(_made(Criterion, values) for values in record["criteria"]),
        examples=tuple(Example(*asked, *pair) for asked, pair in zip(record["examples"], images, strict=True)),
    )


def _comparison(values: Mapping[str, Any]) -> Comparison:
    return Comparison(_made(Rate, values["before"]), _made(Rate, values["after"]), _made(Difference, values["change"]))


def _trial(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trial:
    def finding(which: str, prompts: Sequence[str]) -> Finding:
        values = record[which]
        curve = tuple((point["steps"], _made(Rate, point)) for point in values["curve"])
        return Finding(_made(Rate, values["rate"]), values["found"], curve, tuple(prompts), tensors[which])

    return Trial(
        name=record["attack"],
        box=record["box"],
        budget=record["budget"],
        base=finding("base", ()),
        edited=finding("edited", record["prompts"]),
        passes=record["passes"],
        seconds=record["seconds"],
        bar=record["bar"],
    )


def _made(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """A dataclass from a record that has its fields, and may have others."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]
