"""What to ask two models in order to judge an erasure: prompts by role, and the bars the answer is held to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sublimate.evaluation.agreement import Expected, check_label
from sublimate.evaluation.intervals import images_needed

ROLES = ("target", "synonyms", "siblings", "unrelated")


@dataclass(frozen=True)
class PromptSet:
    """Prompts and what each one asks for.

    Attributes:
        texts: the prompts.
        expected: per prompt, group -> label; as many as texts.
    """

    texts: tuple[str, ...] = ()
    expected: tuple[Expected, ...] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.expected):
            raise ValueError(f"{len(self.texts)} prompts with {len(self.expected)} expectations; give one per prompt")


def read_prompt_set(path: Path) -> PromptSet:
    """Prompts from JSON lines: `text`, and for each group that the prompt states, its label; null is not stated.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a line is not such an object, or there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}; give JSON lines with text and labels")
    texts, expected = [], []
    # Lines end as files have them: what else Unicode takes for an end may stand in a prompt.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
            texts.append(str(row.pop("text")))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} of {path} must be a JSON object with a text ({error!r})") from error
        expected.append({str(group): str(label) for group, label in row.items() if label is not None})
    if not texts:
        raise ValueError(f"{path} holds no prompts; give one JSON object per line")
    return PromptSet(tuple(texts), tuple(expected))


@dataclass(frozen=True)
class Bars:
    """What an erasure is held to; fractions of 1.

    Attributes:
        drawn_before: the base model must draw the concept at least this often, or there is nothing to erase.
        target: the concept's rate afterwards, at most.
        synonyms: its rate in other words, at most.
        siblings_loss: accuracy lost on the group's other labels, at most.
        untouched_loss: accuracy lost on the rest of the prompts that ask for the concept, at most.
        unrelated_loss: accuracy lost on prompts that do not concern it, at most.
        rejected_rise: added share of images that are none of the labels, at most, where the concept is asked for and
            elsewhere: a broken image is no erasure.
    """

    drawn_before: float = 0.5
    target: float = 0.03
    synonyms: float = 0.03
    siblings_loss: float = 0.02
    untouched_loss: float = 0.02
    unrelated_loss: float = 0.02
    rejected_rise: float = 0.05


@dataclass(frozen=True)
class ErasureStudy:
    """Everything to ask about one concept.

    Attributes:
        concept: its name, as readers know it.
        group: the detector's group it belongs to.
        target: prompts that name the concept; what else they ask for is the "untouched" part.
        synonyms: prompts that mean it in other words: other forms, or names that the eraser was not told.
        siblings: prompts for other labels of its group.
        unrelated: prompts that do not concern it at all; what they ask for may be left empty.
        label: the detector's name of the concept where it differs from `concept`.
        seeds: every prompt is drawn once per seed.
        bars: what the result is held to.
    """

    concept: str
    group: str
    target: PromptSet
    synonyms: PromptSet = PromptSet()
    siblings: PromptSet = PromptSet()
    unrelated: PromptSet = PromptSet()
    label: str | None = None
    seeds: tuple[int, ...] = (0,)
    bars: Bars = Bars()

    def __post_init__(self) -> None:
        if not self.target.texts:
            raise ValueError(f"the study of {self.concept!r} has no target prompts; give some that ask for it")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds!r}; give at least one and none twice")
        for role in ("siblings", "unrelated"):
            for text, expected in zip(self.prompts[role].texts, self.prompts[role].expected, strict=True):
                asked = expected.get(self.group)
                if asked == self.detected_as:
                    raise ValueError(f"the {role} prompt {text!r} asks for {self.concept!r} itself; leave it out")
                if role == "siblings" and asked is None:
                    raise ValueError(f"the siblings prompt {text!r} asks for no {self.group}; move it to unrelated")

    @property
    def detected_as(self) -> str:
        """The detector's name of the concept."""
        return self.concept if self.label is None else self.label

    @property
    def prompts(self) -> dict[str, PromptSet]:
        """All prompt sets by role; some may be empty."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have prompts."""
        return tuple(role for role, prompts in self.prompts.items() if prompts.texts)

    def expected(self, role: str) -> list[Expected]:
        """What each image of a role should show: seed after seed, each with all prompts."""
        return [wanted for _ in self.seeds for wanted in self.prompts[role].expected]

    def too_few(self) -> dict[str, tuple[int, int]]:
        """The bars that this study has too few images for: bar -> (images, how many it takes at least)."""
        others = sum(any(label and group != self.group for group, label in e.items()) for e in self.target.expected)
        asked = {
            "target": (len(self.target.texts), self.bars.target),
            "synonyms": (len(self.synonyms.texts), self.bars.synonyms),
            "siblings": (len(self.siblings.texts), self.bars.siblings_loss),
            "untouched": (others, self.bars.untouched_loss),
            "unrelated": (sum(any(e.values()) for e in self.unrelated.expected), self.bars.unrelated_loss),
        }
        counts = {name: (n * len(self.seeds), images_needed(bar)) for name, (n, bar) in asked.items() if 0 < bar < 1}
        return {name: (n, least) for name, (n, least) in counts.items() if 0 < n < least}

    def check(self, groups: Mapping[str, tuple[str, ...]]) -> None:
        """Refuses a study that a detector cannot judge, before anything is generated.

        Args:
            groups: the detector's labels per group.

        Raises:
            ValueError: for a concept, group or expected label that the detector does not know, naming those it knows.
        """
        check_label(groups, self.group, self.detected_as)
        for prompts in self.prompts.values():
            for expected in prompts.expected:
                for group, label in expected.items():
                    if label is not None:
                        check_label(groups, group, label)


def read_study(folder: Path, concept: str, group: str, label: str | None = None) -> ErasureStudy:
    """A study from a folder of prompt files: target.jsonl, and synonyms, siblings and unrelated where there are some.

    Args:
        folder: holds the files, as `read_prompt_set` reads them.
        concept, group, label: as in `ErasureStudy`.

    Raises:
        FileNotFoundError: when there are no target prompts.
        ValueError: when a file cannot be used.
    """

    def prompts(role: str) -> PromptSet:
        path = folder / f"{role}.jsonl"
        return read_prompt_set(path) if path.is_file() or role == "target" else PromptSet()

    return ErasureStudy(
        concept=concept,
        group=group,
        target=prompts("target"),
        synonyms=prompts("synonyms"),
        siblings=prompts("siblings"),
        unrelated=prompts("unrelated"),
        label=label,
    )
