"""Every packaged configuration says what it is, and is one that its command would run."""

import itertools
import re

import pytest

from sublimate.erasure.eraser import Eraser
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.config import load_config, validate_section
from sublimate.training.config_files import packaged_configs
from sublimate.training.distill import OBJECTIVES, DistillConfig
from sublimate.training.ink.train import InkConfig
from sublimate.training.objective import Objective
from sublimate.training.plan import plan_distillation

FIELDS = ["Needs", "Cost", "Memory", "Command"]
ERASERS = "sublimate.erasure.methods"


@pytest.mark.parametrize("name", packaged_configs())
def test_its_header_says_needs_cost_memory_and_command(name):
    header = list(itertools.takewhile(lambda line: line[0] == "#", packaged_configs()[name].read_text().splitlines()))
    assert header[0].endswith(".")
    published = name.split("/")[-1].startswith(tuple(f"{model}_" for model in TINY))
    fields = [field for field in FIELDS if published or field != "Cost"]  # Ink costs minutes
    assert [word for line in header[1:] if (word := line[2:].split(":")[0]) in FIELDS] == fields
    assert re.fullmatch(rf"# Command:  (?:sublimate|accelerate launch) .*\b{name.split('/')[-1]}\b.*", header[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_configs("distill"))
def test_a_distillation_has_options_of_its_objective_and_a_cost(name):
    config = load_config(DistillConfig, name, kind="distill")
    objective = registry.load(OBJECTIVES, config.method, Objective)
    options = validate_section(objective.Config, config.objective)
    assert isinstance(options, objective.Config)
    written = config.resolved()
    assert validate_section(objective.Config, written.objective) == options and written.resolved() == written
    assert options.phases()[-1] < config.trainer.max_train_steps
    assert config.passes() > 0


@pytest.mark.parametrize("name", packaged_configs("erase"))
def test_an_erasure_has_options_of_its_eraser(name):
    eraser = registry.load(ERASERS, method_of(name), Eraser)
    assert isinstance(load_config(eraser.Config, name, kind="erase"), eraser.Config)


def method_of(name):
    """The method of erase/<model>_…_<method>."""
    return max((method for method in registry.available(ERASERS) if name.endswith(f"_{method}")), key=len)


# What a recipe for a published checkpoint begins with, and a tiny checkpoint of the same class.
TINY = {
    "sd15": "tiny_sd",
    "sd_inpaint": "tiny_inpainting",
    "sd_upscale": "tiny_upscaling",
    "sdxl": "tiny_sdxl",
    "pixart": "tiny_pixart",
    "flux": "tiny_flux",
}


def recipes(kind):
    names = (name for name in packaged_configs(kind) if not name.split("/")[1].startswith(("ink", "demo")))
    return sorted(
        (name, next(tiny for start, tiny in TINY.items() if name.split("/")[1].startswith(start))) for name in names
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tiny"), recipes("distill"))
def test_a_recipe_of_a_published_checkpoint_is_planned_on_a_tiny_one_of_its_class(request, name, tiny):
    folder = request.getfixturevalue(tiny)
    # Every phase takes as long again.
    small = [f"trainer.{name}=1" for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps")]
    method = load_config(DistillConfig, name, kind="distill").method
    if "critic_updates" in registry.load(OBJECTIVES, method, Objective).Config.model_fields:  # which are all alike
        small.append("objective.critic_updates=1")
    found = plan_distillation(load_config(DistillConfig, name, [f"model={folder}", *small], kind="distill"))
    assert found.flops > 0 and found.peak > found.base


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tiny"), recipes("erase"))
def test_a_recipe_of_a_published_checkpoint_erases_from_a_tiny_one_of_its_class(request, name, tiny):
    model = open_model(request.getfixturevalue(tiny))
    eraser = registry.load(ERASERS, method_of(name), Eraser)
    few = {"max_train_steps": 1, "sampling_steps": 5} if "sampling_steps" in eraser.Config.model_fields else {}
    # The tiny tokenizers know letters, and sixteen of them.
    options = load_config(eraser.Config, name, kind="erase").model_copy(update={"templates": ("{}", "a {}"), **few})
    request = Request(Concept("cat", anchor="dog" if eraser.uses_anchor else ""), preserve=["red"])
    assert eraser(options).fit(model, request).shapes()


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
