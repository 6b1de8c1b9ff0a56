"""Every packaged configuration says what it is, and is one that its command would run."""

import itertools
import re

import pytest

from sublimate.erasure.eraser import Eraser
from sublimate.training import registry
from sublimate.training.config import load_config, validate_section
from sublimate.training.config_files import packaged_configs
from sublimate.training.distill import OBJECTIVES, DistillConfig
from sublimate.training.ink.train import InkConfig
from sublimate.training.objective import Objective

FIELDS = ["Needs", "Memory", "Command"]
ERASERS = "sublimate.erasure.methods"


@pytest.mark.parametrize("name", packaged_configs())
def test_its_header_says_needs_memory_and_command(name):
    header = list(itertools.takewhile(lambda line: line[0] == "#", packaged_configs()[name].read_text().splitlines()))
    assert header[0].endswith(".")
    assert [word for line in header[1:] if (word := line[2:].split(":")[0]) in FIELDS] == FIELDS
    assert re.fullmatch(rf"# Command:  sublimate .*\b{name.split('/')[-1]}\b.*", header[-1])


@pytest.mark.parametrize("name", packaged_configs("distill"))
def test_a_distillation_has_options_of_its_objective_and_a_cost(name):
    config = load_config(DistillConfig, name, kind="distill")
    objective = registry.load(OBJECTIVES, config.method, Objective)
    assert isinstance(validate_section(objective.Config, config.objective), objective.Config)
    assert config.passes() > 0


@pytest.mark.parametrize("name", packaged_configs("erase"))
def test_an_erasure_has_options_of_its_eraser(name):
    eraser = registry.load(ERASERS, name.partition("_")[2], Eraser)  # erase/<model>_<method>
    assert isinstance(load_config(eraser.Config, name, kind="erase"), eraser.Config)


def test_every_eraser_has_options_on_ink():
    assert {f"erase/ink_{name}" for name in registry.available(ERASERS)} <= packaged_configs("erase").keys()


def test_the_teachers_recipe_is_one():
    assert [load_config(InkConfig, name, kind="teacher") for name in packaged_configs("teacher")] != []


def test_every_objective_has_a_configuration_on_ink():
    methods = {
        load_config(DistillConfig, n, kind="distill").method for n in packaged_configs("distill") if "ink_" in n
    }
    # Training by plain denoising is what makes Ink's teacher, not what distils it.
    assert methods == set(registry.available(OBJECTIVES)) - {"denoising"}
