"""Configurations: what is read is what was written, and whatever is wrong is named in one sentence."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from sublimate.training.config import Config, ConfigError, describe_error, dump_config, load_config, validate_section
from sublimate.training.config_files import packaged_configs


class Player(Config):
    learning_rate: float = Field(default=1e-4, gt=0)
    kind: Literal["full", "lora"] = "full"


class Trainer(Config):
    output_dir: Path = Path("runs/x")
    max_train_steps: int = Field(default=100, ge=1)
    resume_from: int | Literal["latest"] = "latest"


class Run(Config):
    method: str
    objective: dict[str, object] = Field(default_factory=dict)
    trainer: Trainer = Trainer()
    critic: Player = Player(learning_rate=5e-3)
    players: tuple[Player, ...] = ()
    bounds: tuple[float, float] | None = (0.1, math.inf)
    note: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Run:
        if self.bounds is not None and self.bounds[0] > self.bounds[1]:
            raise ValueError(f"bounds must be ascending, not {self.bounds}.")
        return self


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_file_then_overrides_in_order(write) -> None:
    path = write("method: f_distill\ntrainer: {max_train_steps: 7, output_dir: runs/a}\n")
    run = load_config(Run, path, ["trainer.max_train_steps=8", "trainer.max_train_steps=9", "objective.a.b=[1, 2]"])
    assert run.trainer == Trainer(max_train_steps=9, output_dir=Path("runs/a"))
    assert run.objective == {"a": {"b": [1, 2]}}


def test_exponents_without_a_dot_are_numbers(write) -> None:
    run = load_config(Run, write("method: m\nobjective: {a: 1e-4, b: -2E+3, c: e4}\n"), ["objective.d=1e2"])
    assert run.objective == {"a": 1e-4, "b": -2e3, "c": "e4", "d": 100.0}


def test_only_true_and_false_are_booleans(write) -> None:
    run = load_config(
        Run, write("method: no\nobjective: {a: on, b: true, c: False}\n"), ["note=no", "objective.d=yes"]
    )
    assert (run.method, run.note) == ("no", "no")
    assert run.objective == {"a": "on", "b": True, "c": False, "d": "yes"}


def test_section_given_in_part_keeps_the_defaults_of_its_field(write) -> None:
    run = load_config(Run, write("method: m\n"), ["critic.kind=lora"])
    assert run.critic == Player(learning_rate=5e-3, kind="lora")


def test_override_of_a_nested_section_keeps_outer_defaults() -> None:
    class Outer(Config):
        run: Run = Run(method="m", critic=Player(learning_rate=7.0), note="kept")

    outer = validate_section(Outer, {"run": {"critic": {"kind": "lora"}}}, "outer")
    assert outer.run.critic == Player(learning_rate=7.0, kind="lora")
    assert outer.run.note == "kept"


@pytest.mark.parametrize("note", ["1e-4", "7", "null", "a: b", "naïve\nlines", "true", "no", "", "[1]", "1_0e2"])
def test_dump_then_load_is_the_identity(write, note: str) -> None:
    run = Run(
        method="m",
        objective={"rate": 1e-12, "text": note, "list": [1, 2.0, None]},
        trainer=Trainer(output_dir=Path("a b/c"), resume_from=3),
        players=(Player(kind="lora"), Player()),
        note=note,
    )
    text = dump_config(run)
    assert load_config(Run, write(text)) == run
    assert dump_config(load_config(Run, write(text))) == text


def test_dump_holds_defaults_in_the_order_of_the_class() -> None:
    assert dump_config(Player()) == "learning_rate: 0.0001\nkind: full\n"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "trainer.max_train_stps=5",
            "Unknown key 'trainer.max_train_stps' in {}; did you mean 'trainer.max_train_steps'?",
        ),
        ("max_train_steps=5", "Unknown key 'max_train_steps' in {}; did you mean 'trainer.max_train_steps'?"),
        ("players=[{knd: lora}]", "Unknown key 'players.0.knd' in {}; did you mean 'players.0.kind'?"),
        (
            "trainer.zzz=5",
            "Unknown key 'trainer.zzz' in {}; valid keys there are max_train_steps, output_dir, resume_from.",
        ),
        ("trainer.max_train_steps=many", "'trainer.max_train_steps' in {} must be a valid integer, not 'many'."),
        ("trainer.max_train_steps=1.5", "'trainer.max_train_steps' in {} must be a valid integer, not 1.5."),
        ("trainer.max_train_steps=0", "'trainer.max_train_steps' in {} must be greater than or equal to 1, not 0."),
        ("critic.kind=lorra", "'critic.kind' in {} must be 'full' or 'lora', not 'lorra'."),
        ("trainer.resume_from=first", "'trainer.resume_from' in {} must be a valid integer or 'latest', not 'first'."),
        ("trainer=5", "'trainer' in {} must be a section of keys and values, not 5."),
        ("players=5", "'players' in {} must be a list, not 5."),
        ("players=[{learning_rate: x}]", "'players.0.learning_rate' in {} must be a valid number, not 'x'."),
        ("bounds=[1]", "'bounds.1' is missing in {}: set it in the file or as bounds.1=value."),
        ("bounds=[2, 1]", "bounds must be ascending, not (2.0, 1.0)."),
        ("note=7", "'note' in {} must be a valid string, not 7."),
        ("method.sub=3", "The override 'method.sub=3' does not fit: 'method' is 'm', not a section."),
        ("method", "The override 'method' must have the form key.sub=value."),
        ("trainer..a=3", "The override 'trainer..a=3' must have the form key.sub=value."),
        ("note=[1", "the override 'note=[1', line 1 is not valid YAML: expected ',' or ']', but got '<stream end>'."),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(write, override: str, sentence: str) -> None:
    path = write("method: m\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, [override])
    assert str(caught.value) == sentence.format(path)


def test_unknown_key_comes_first_and_the_rest_is_counted(write) -> None:
    path = write("trainer: {max_train_steps: x}\nmetod: m\n")
    with pytest.raises(ConfigError, match=r"^Unknown key 'metod' .* 'method'\? \(2 more problems after this one\.\)$"):
        load_config(Run, path)


def test_missing_key(write) -> None:
    with pytest.raises(ConfigError, match=r"'method' is missing in .*: set it in the file or as method=value\.$"):
        load_config(Run, write(""))


def test_section_errors_carry_the_prefix() -> None:
    with pytest.raises(ConfigError, match=r"^Unknown key 'objective.knd'; did you mean 'objective.kind'\?$"):
        validate_section(Player, {"knd": 1})
    with pytest.raises(ConfigError, match=r"^'eraser.learning_rate' must be greater than 0, not -1\.0\.$"):
        validate_section(Player, {"learning_rate": -1.0}, "eraser")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"run\.yaml, line 3 is not valid YAML: the key 'a' is given twice\.$"),
        ("a: {b: 1, b: 2}\n", r"line 1 is not valid YAML: the key 'b' is given twice\.$"),
        ("a: [1\n", r"line 2 is not valid YAML"),
        ("a: !!python/object:os.system {}\n", r"is not valid YAML: could not determine a constructor"),
        ("a: \x07\n", r"run\.yaml is not valid YAML"),
        ("- a\n", r"run\.yaml must hold keys and values, not \[a\]\.$"),
    ],
)
def test_bad_yaml(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Run, write(text))


def test_missing_file_lists_packaged_names_nearest_first() -> None:
    with pytest.raises(
        ConfigError, match=r"^There is no configuration 'ink_f_distil'; packaged ones are distill/ink_f_d"
    ):
        load_config(Run, "ink_f_distil")
    with pytest.raises(ConfigError, match=r"^There is no file nowhere/ink\.yaml; packaged ones are teacher/ink, "):
        load_config(Run, "nowhere/ink.yaml")
    with pytest.raises(ConfigError, match=r"^There is no configuration 'ink_f'; packaged ones are ink\.$"):
        load_config(Run, "ink_f", kind="teacher")


@pytest.mark.parametrize("name", ["ink", "teacher/ink"])
def test_packaged_names(name: str) -> None:
    class Loose(Config):
        model_config = Config.model_config | {"extra": "allow"}

    assert "teacher" in load_config(Loose, name).model_dump()


def test_every_packaged_stem_is_listed() -> None:
    assert {"distill/ink_f_distill", "teacher/ink"} <= set(packaged_configs())
    assert list(packaged_configs("teacher")) == ["teacher/ink"]


def test_describe_error_without_the_data() -> None:
    with pytest.raises(ValidationError) as caught:
        Player(kind="x", rate=3)
    assert describe_error(caught.value) == "Unknown key 'rate'; remove it. (1 more problem after this one.)"


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Player().kind = "lora"


@pytest.mark.slow
def test_no_torch() -> None:
    code = "import sys, sublimate.training.config, sublimate.training.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
