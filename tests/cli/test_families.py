"""`sublimate distill` and `sublimate erase` on every family, and stock diffusers drawing what they wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from captioned_sets import image_folder
from fresh import FreshProcess
from students import few_step_images_of, images_of

from sublimate.cli.app import run
from sublimate.pipelines.export import stock_sampling
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.model import Model, open_model

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Commands:
    """What a family is given.

    Attributes:
        recipe: the packaged configuration to distil by.
        changes: to it, beside those that make it small.
        erase: the concept and options; none for a model that is told nothing.
        prompts: of the distillation; none for captioned pictures, and where there is no text.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    erase: tuple[str, ...] = ("cat", "--anchor", "dog")
    prompts: str = "red cat\na dog\n"


ESD = ("--set", "max_train_steps=1", "--set", "sampling_steps=2", "--set", "train_batch_size=1")
FLASH = ("objective.student.kind=full", "data.train_data_dir={pictures}", "trainer.train_batch_size=2")
UNGUIDED = ("objective.guidance_scale=1", "data.prompts=null")

FAMILIES = {
    "tiny_sd": Commands("sd15_f_distill"),
    "tiny_sd_v": Commands("demo"),
    "tiny_inpainting": Commands("sd_inpaint_flash", FLASH, prompts=""),
    "tiny_upscaling": Commands("sd_upscale_flash", FLASH, prompts=""),
    # Full, since stock diffusers alone puts a LoRA and its base together.
    "tiny_sdxl": Commands("sdxl_f_distill", ("objective.student.kind=full",)),
    "tiny_sd3": Commands("sd15_f_distill"),
    "tiny_flux": Commands("sd15_f_distill"),
    "tiny_flux_schnell": Commands("sd15_f_distill"),
    "tiny_pixart": Commands("pixart_swiftbrush"),
    "tiny_pixart_sigma": Commands("pixart_swiftbrush"),
    "tiny_sana": Commands("sd15_f_distill"),
    # Closed forms need rows of text that belong to one word.
    "tiny_audio": Commands("sd15_f_distill", erase=("cat", "--method", "esd", *ESD)),
    "tiny_dit": Commands("sd15_f_distill", prompts="cat\ndog\n"),
    "tiny_edm_classes": Commands("sd15_f_distill", ("objective.guidance_scale=1",), ("3", "--anchor", "4"), "3\n4\n"),
    "tiny_edm": Commands("sd15_f_distill", UNGUIDED, (), ""),
    "tiny_unconditional": Commands("sd15_f_distill", UNGUIDED, (), ""),
}
SMALL = (
    "trainer.max_train_steps=2",
    "trainer.train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.checkpointing_steps=null",
)
# A CPU without bf16 of its own takes long in it; over a base in bf16, it has to.
PLAIN = (*SMALL, "trainer.mixed_precision=no")
SMALLER = {
    "sd15_f_distill": (*PLAIN, "data.count=2", "data.teacher_steps=1", "objective.critic_updates=1"),
    "demo": (*PLAIN, "data.count=2", "data.teacher_steps=1", "objective.critic_updates=1"),
    "sdxl_f_distill": (*SMALL, "data.count=2", "data.teacher_steps=1", "objective.critic_updates=1"),
    "pixart_swiftbrush": (*SMALL, "objective.critic.rank=2", "objective.critic.lora_alpha=4"),
    "sd_inpaint_flash": PLAIN,
    "sd_upscale_flash": PLAIN,
}


def sublimate(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        run([str(argument) for argument in arguments])
    assert stop.value.code == 0


def distilled(family: str, base: Path, root: Path) -> Path:
    """The student's folder."""
    commands, folder = FAMILIES[family], root / f"{family}-distilled"
    options = [f"model={base}", f"trainer.output_dir={folder}", *SMALLER[commands.recipe]]
    if commands.prompts:
        (root / f"{family}.txt").write_text(commands.prompts)
        options.append(f"data.prompts={root / family}.txt")
    changes = [change.format(pictures=root / "pictures") for change in commands.changes]
    sublimate("distill", commands.recipe, *options, *changes)
    return folder / "student"


def erased(family: str, base: Path, root: Path) -> Path:
    """The edited model's folder."""
    sublimate("erase", base, *FAMILIES[family].erase, "--out", root / f"{family}-edit", "--fold")
    return root / f"{family}-edit" / "model"


def drawn(model: Model):
    """What a student draws here."""
    few = model.defaults.get("few_steps")
    if few is not None:
        return few_step_images_of(model, model.denoiser, FewSteps.from_dict(few))
    return images_of(model, model.denoiser, model.defaults["start"])


@pytest.fixture(scope="module")
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """Largest difference and pipeline class of every student and edited model, drawn by stock diffusers."""
    root = tmp_path_factory.mktemp("commands")
    image_folder(root / "pictures", 4)
    process = FreshProcess(root)
    for family, commands in FAMILIES.items():
        base = request.getfixturevalue(family)
        folder = distilled(family, base, root)
        student = open_model(folder)
        assert student.content_hash() != open_model(base).content_hash()
        process.add(f"{family}-student", student, drawn(student), folder)
        if not commands.erase:
            continue
        folder = erased(family, base, root)
        edited = open_model(folder)
        assert edited.content_hash() != open_model(base).content_hash()
        # In one step, which is exact whatever scheduler the family samples with.
        sampling, scheduler = stock_sampling(edited, "weights"), root / f"{family}-scheduler"
        sampling.scheduler.save_pretrained(scheduler)
        images = images_of(edited, edited.denoiser, None)
        process.add(f"{family}-edited", edited, images, folder, sampling.call, scheduler=scheduler)
    return process.run()


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_draws_what_the_commands_wrote(stock, family):
    error, _ = stock[f"{family}-student"]
    assert error < 5e-5
    if FAMILIES[family].erase:
        error, _ = stock[f"{family}-edited"]
        assert error < 1e-5
