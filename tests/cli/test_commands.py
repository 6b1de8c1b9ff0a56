"""Every subcommand on a tiny checkpoint, and bad input: one clear sentence, a non-zero exit, nothing damaged."""

import errno
import json
import re
import shutil

import pytest
import torch
from commands import failed, sublimate
from PIL import Image
from safetensors.torch import load_file
from students import with_lora

from sublimate.cli.app import run
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure.methods.uce import UCE
from sublimate.evaluation.ink_demo import ink_request
from sublimate.pipelines import folders
from sublimate.pipelines.attention import _OperatorLog
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.export import export_lora
from sublimate.pipelines.model import open_model

DISTILL = (
    "data.prompts={prompts}",
    "data.count=2",
    "data.teacher_steps=1",
    "objective.critic_updates=1",
    "objective.discriminator_width=8",
    "trainer.max_train_steps=2",
    "trainer.train_batch_size=2",
    "trainer.checkpointing_steps=1",
)


@pytest.fixture
def distilling(tmp_path, tiny_sd_v):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red cat\na dog\n")
    options = [option.format(prompts=prompts) for option in DISTILL]
    return ["distill", "demo", f"model={tiny_sd_v}", f"trainer.output_dir={tmp_path / 'run'}", *options]


@pytest.mark.slow
def test_distill_writes_a_student_and_the_same_command_resumes(capsys, tmp_path, distilling):
    status, out, _ = sublimate(capsys, *distilling)
    assert status == 0 and "student" in out
    weights = tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert sublimate(capsys, *distilling)[0] == 0
    assert weights.read_bytes() == before
    assert json.loads((tmp_path / "run" / "student" / "sublimate.json").read_text())["steps"] == 1
    # A finished run exports again without training, here in another precision.
    assert sublimate(capsys, *distilling, "save_dtype=float16")[0] == 0
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}


@pytest.mark.slow
def test_dry_run_prints_the_configuration_and_its_cost(capsys, tmp_path, distilling):
    status, out, _ = sublimate(capsys, *distilling, "--dry-run")
    assert status == 0 and "method: f_distill" in out and "network passes" in out
    assert "# turn student: " in out and "# critic: weights " in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_of_an_edited_teacher_reads_the_edit(capsys, tmp_path, distilling):
    said = failed(capsys, *distilling, f"edits=[{tmp_path / 'nowhere.safetensors'}]", "--dry-run")
    assert "nowhere.safetensors" in said


def test_dry_run_of_what_cannot_be_reached_says_what_it_does_not_count(capsys, tmp_path, distilling):
    (tmp_path / "model.safetensors").write_bytes(b"")
    status, out, _ = sublimate(capsys, *distilling, f"model={tmp_path / 'model.safetensors'}", "--dry-run")
    assert status == 0 and "network passes" in out and "are not counted: " in out and "give a folder" in out


@pytest.mark.slow
def test_dry_run_of_an_erasure_prints_options_and_cost(capsys, tmp_path, tiny_sd_v):
    erase = ["erase", tiny_sd_v, "cat", "--anchor", "dog", "--out", tmp_path / "edit", "--dry-run"]
    status, out, _ = sublimate(capsys, *erase, "--set", "lam=0.25")
    assert status == 0 and '"anchor": "dog"' in out and "# reading 2 prompts: " in out
    assert not (tmp_path / "edit").exists()
    # What is printed is a file of options.
    (tmp_path / "options.yaml").write_text(out)
    assert sublimate(capsys, *erase, "--config", tmp_path / "options.yaml")[1] == out
    status, out, _ = sublimate(capsys, "erase", tiny_sd_v, "cat", "--method", "slug", "--dry-run")
    assert status == 0 and "are not counted: what slug does depends on values" in out
    assert "nowhere" in failed(capsys, "erase", tmp_path / "nowhere", "cat", "--dry-run")
    (tmp_path / "model.safetensors").write_bytes(b"")
    status, out, _ = sublimate(capsys, "erase", tmp_path / "model.safetensors", "cat", "--dry-run")
    assert status == 0 and "lam: " in out and "are not counted: " in out and "give a folder" in out


@pytest.mark.slow
def test_erase_then_generate(capsys, tmp_path, tiny_sd_v):
    edit, images = tmp_path / "edit", tmp_path / "images"
    erase = ["erase", tiny_sd_v, "cat", "--anchor", "dog", "--preserve", "red", "--out", edit, "--fold"]
    assert sublimate(capsys, *erase)[0] == 0
    draw = ["--steps", "2", "--out", images, "--guidance-scale", "1"]
    assert sublimate(capsys, "generate", tiny_sd_v, "red cat", "--edit", edit / "edit.safetensors", *draw)[0] == 0
    edited = (images / "00000.png").read_bytes()
    half = [*draw, "--dtype", "bfloat16"]
    assert sublimate(capsys, "generate", tiny_sd_v, "red cat", "--edit", edit / "edit.safetensors", *half)[0] == 0
    assert (images / "00000.png").read_bytes() != edited
    assert sublimate(capsys, "generate", edit / "model", "red cat", *draw)[0] == 0
    assert (images / "00000.png").read_bytes() == edited
    assert sublimate(capsys, *erase, "--lora")[0] == 0
    assert {f.name for f in (edit / "lora").iterdir()} == {"pytorch_lora_weights.safetensors", "kohya.safetensors"}
    assert "full rank, which no LoRA holds" in failed(capsys, "erase", tiny_sd_v, "cat", "--method", "esd", "--lora")


def test_classes_are_erased_and_drawn_by_name(capsys, tmp_path, tiny_dit):
    edit = tmp_path / "edit"
    erase = ["erase", tiny_dit, "Felis catus", "--anchor", "dog", "--out", edit, "--fold", "--set", "lam=1e-9"]
    assert sublimate(capsys, *erase)[0] == 0
    drawn = {}
    for model, prompt in ((edit / "model", "cat"), (tiny_dit, "1"), (tiny_dit, "cat")):
        draw = ["--steps", "1", "--out", tmp_path / "images", "--guidance-scale", "1"]
        assert sublimate(capsys, "generate", model, prompt, *draw)[0] == 0
        drawn[model, prompt] = (tmp_path / "images" / "00000.png").read_bytes()
    assert drawn[edit / "model", "cat"] == drawn[tiny_dit, "1"] != drawn[tiny_dit, "cat"]
    assert "not 'hound'" in failed(capsys, "generate", tiny_dit, "hound")


@pytest.mark.slow
def test_students_of_classes(capsys, tmp_path, distilling, tiny_edm_classes, tiny_class_conditional):
    (tmp_path / "prompts.txt").write_text("3\n4\n")
    options = ["objective.guidance_scale=1"]
    status, _, err = sublimate(capsys, *distilling, f"model={tiny_edm_classes}", *options)
    assert status == 0, err
    student = tmp_path / "run" / "student"
    assert sublimate(capsys, "generate", student, "3", "--out", tmp_path / "images")[0] == 0
    # Refused before training.
    other = [f"model={tiny_class_conditional}", f"trainer.output_dir={tmp_path / 'other'}", *options]
    assert "DDIMPipeline cannot pass class labels" in failed(capsys, *distilling, *other)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_sounds_are_written_with_their_spectrograms(capsys, tmp_path, tiny_audio):
    draw = ["--steps", "1", "--guidance-scale", "1", "--count", "2", "--out", tmp_path]
    status, out, _ = sublimate(capsys, "generate", tiny_audio, "red cat", *draw)
    assert status == 0 and "2 sounds" in out
    names = ["00000.png", "00000.wav", "00001.png", "00001.wav", "sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len((tmp_path / "00001.wav").read_bytes()) == 44 + 2 * 256


def trains_with(distilling, *options):
    """The operators that run in a distillation; autograd's and the text encoder's too."""
    seen = set()
    with _OperatorLog(seen.add), pytest.raises(SystemExit) as stop:
        run([str(argument) for argument in (*distilling, "trainer.max_train_steps=1", *options)])
    assert stop.value.code == 0
    return seen


@pytest.mark.slow
def test_players_are_trained_with_the_attention_that_was_asked_for(distilling, tmp_path, caplog):
    flash = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
    assert flash in trains_with(distilling)
    assert flash not in trains_with(distilling, "attention=math", f"trainer.output_dir={tmp_path / 'math'}")
    assert "attention: math ran, math was asked for" in caplog.messages


@pytest.mark.slow
def test_it_says_which_attention_drew(capsys, tiny_sd_v, tmp_path):
    draw = ["generate", tiny_sd_v, "cat", "--steps", 1, "--out", tmp_path, "--attention"]
    assert "attention: math ran, math was asked for\n" in sublimate(capsys, *draw, "math")[1]
    assert re.search(r"attention: (flash|math) ran, auto was asked for\n", sublimate(capsys, *draw, "auto")[1])


@pytest.mark.slow
def test_attention_that_does_not_run_here(capsys, tiny_sd_v, distilling):
    said = "'cudnn' does not run here on cpu"
    assert said in failed(capsys, *distilling, "attention=cudnn")
    esd = ["erase", tiny_sd_v, "cat", "--method", "esd", "--set"]
    assert said in failed(capsys, *esd, "attention=cudnn")
    assert said in failed(capsys, "generate", tiny_sd_v, "cat", "--attention", "cudnn")
    assert "use one of auto, sdpa" in failed(capsys, "generate", tiny_sd_v, "cat", "--attention", "fast")


def test_unknown_method(capsys, tiny_sd_v):
    assert "There is no method 'ucee'" in failed(capsys, "erase", tiny_sd_v, "cat", "--method", "ucee")


def test_commands_for_one_process_say_so(capsys, monkeypatch, tmp_path, tiny_sd_v):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["erase", tiny_sd_v, "cat"], ["generate", tiny_sd_v, "cat", "--out", tmp_path / "images"]):
        assert f"sublimate {command[0]} works in one process" in failed(capsys, *command)
    assert not (tmp_path / "images").exists()


def test_misspelled_key(capsys, distilling):
    assert "objective.divergence" in failed(capsys, *distilling, "objective.divergance=reverse_kl")


@pytest.mark.slow
def test_another_run_does_not_resume_from_this_ones_checkpoints(capsys, tmp_path, distilling):
    assert sublimate(capsys, *distilling)[0] == 0
    student = (tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for change in ("objective.divergence=pearson", "data.seed=1"):
        assert "another model, data or options" in failed(capsys, *distilling, change, "trainer.max_train_steps=3")
    assert "at step 2, beyond max_train_steps = 1" in failed(capsys, *distilling, "trainer.max_train_steps=1")
    (tmp_path / "others.txt").write_text("a cat\n")
    others = f"data.prompts={tmp_path / 'others.txt'}"
    assert "another model, data or options" in failed(capsys, *distilling, others, "trainer.max_train_steps=3")
    assert (tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == student
    longer = ["trainer.max_train_steps=3", "objective.student.learning_rate=1.0e-6"]
    assert sublimate(capsys, *distilling, *longer)[0] == 0


@pytest.mark.slow
def test_negative_prompts_that_nothing_would_read(capsys, distilling):
    assert "f_distill reads no negative prompts" in failed(capsys, *distilling, "data.negatives=ink")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["trainer.lr_warmup_steps=1"], "constant_with_warmup"),
        (["validation_prompts=[a dog]"], "validation_prompts and trainer.validation_steps go together"),
        (["method=disback", "objective={discriminator_width: 8}"], "discriminator_width"),
        (["method=consistency_trajectory", "objective={sampling_gamma: 0.3}"], "sampling_gamma"),
        (["method=discriminator_guidance", "objective={}", "save_dtype=float16"], "leave out save_dtype"),
    ],
)
def test_options_that_nothing_would_read(capsys, tmp_path, distilling, changes, said):
    own = [option for option in distilling if not option.startswith("objective.")]
    assert said in failed(capsys, *own, "trainer.lr_scheduler=constant", "trainer.lr_warmup_steps=0", *changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_lora_is_added_before_a_command_does_its_work(capsys, tmp_path, tiny_sd):
    model = open_model(tiny_sd)
    folder = export_lora(model, with_lora(model, {}), tmp_path / "lora", as_base=True)
    draw = ["generate", tiny_sd, "a cat", "--steps", "1", "--guidance-scale", "1", "--out"]
    pictures = []
    for more in ([], ["--fuse-lora", folder]):
        assert sublimate(capsys, *draw, tmp_path / "images", *more)[0] == 0
        pictures.append((tmp_path / "images" / "00000.png").read_bytes())
    assert pictures[0] != pictures[1]
    erase = ["erase", tiny_sd, "cat", "--anchor", "dog", "--out", tmp_path / "edit", "--fuse-lora", folder]
    assert sublimate(capsys, *erase)[0] == 0
    made_for = Edit.load(tmp_path / "edit" / "edit.safetensors").provenance["base"]["content_hash"]
    assert made_for == open_model(tiny_sd, loras=[folder]).content_hash() != model.content_hash()


@pytest.mark.slow
def test_pictures_of_a_concept(capsys, tmp_path, tiny_sd_v):
    erase = ["erase", tiny_sd_v, "cat", "--anchor", "dog", "--images", tmp_path / "cats", "--out", tmp_path / "edit"]
    salun = [*erase, "--method", "salun", "--set", "max_train_steps=1", "--set", "weights=x"]
    (tmp_path / "cats").mkdir()
    assert "holds no pictures" in failed(capsys, *salun)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "cats" / "b.png")
    (tmp_path / "cats" / "notes.txt").write_text("no picture")
    assert sublimate(capsys, *salun)[0] == 0
    request = Edit.load(tmp_path / "edit" / "edit.safetensors").provenance["request"]
    assert request["erase"][0]["images"] == ["b.png"]  # not where it lies
    assert "uce learns from no pictures of 'cat'" in failed(capsys, *erase)
    assert "belongs to a single concept" in failed(capsys, *salun[:3], "dog", *salun[5:])
    (tmp_path / "cats" / "a.png").write_text("no picture either")
    assert "a.png" in failed(capsys, *salun)


def test_an_anchor_that_the_eraser_does_not_read(capsys, tiny_sd_v):
    assert "--anchor" in failed(capsys, "erase", tiny_sd_v, "cat", "--method", "esd", "--anchor", "dog")


def test_missing_folder(capsys, tmp_path):
    assert "nowhere" in failed(capsys, "generate", tmp_path / "nowhere", "a cat")


@pytest.mark.slow
def test_half_written_checkpoint(capsys, tmp_path, distilling):
    assert sublimate(capsys, *distilling)[0] == 0
    path = tmp_path / "run" / "checkpoint-2" / "player.student.safetensors"
    path.write_bytes(path.read_bytes()[:64])
    assert "is damaged" in failed(capsys, *distilling)


def test_a_pickle_is_refused(capsys, tmp_path, tiny_sd_v):
    path = tmp_path / "edit.pt"
    torch.save({"w": torch.zeros(1)}, path)
    assert "safetensors" in failed(capsys, "generate", tiny_sd_v, "a cat", "--edit", path)
    assert "safetensors" in failed(capsys, "generate", path, "a cat")


def test_an_erasure_finds_what_is_wrong_before_it_begins(capsys, tmp_path, tiny_sd_v, monkeypatch):
    monkeypatch.setattr(UCE, "fit", None)
    within = failed(capsys, "erase", tiny_sd_v, "cat", "--anchor", "dog", "--within", "red", "--dry-run")
    assert "uce cannot erase within 'red' only" in within
    (tmp_path / "taken").write_text("mine")
    assert "taken" in failed(capsys, "erase", tiny_sd_v, "cat", "--anchor", "dog", "--out", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.slow
def test_a_demo_of_another_concept_does_not_mix_with_this_ones(capsys, tmp_path):
    edit = UCE().fit(open_model("ink"), ink_request("seven")).save(tmp_path / "edit.safetensors").read_bytes()
    assert "holds another demo" in failed(capsys, "demo", "three", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["edit.safetensors"]
    assert (tmp_path / "edit.safetensors").read_bytes() == edit


def test_a_concept_the_world_does_not_know(capsys, tmp_path):
    assert "eleventy" in failed(capsys, "demo", "eleventy", "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_prompt_that_is_too_long(capsys, tmp_path, tiny_sd_v):
    said = failed(capsys, "generate", tiny_sd_v, "cat " * 100, "--out", tmp_path / "images")
    assert "The prompt 'cat cat" in said and "tokens" in said
    assert not (tmp_path / "images").exists()
    draw = ["generate", tiny_sd_v, "cat " * 100, "--out", tmp_path / "images", "--steps", 1]
    assert sublimate(capsys, *draw, "--truncate-prompts")[0] == 0
    assert (tmp_path / "images" / "00000.png").exists()


@pytest.mark.slow
def test_a_lora_that_cannot_be_added_as_asked(capsys, tmp_path, tiny_sd):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    draw = ["generate", tiny_sd, "a cat", "--out", tmp_path / "images", "--fuse-lora"]
    assert "is 'much': give a number" in failed(capsys, *draw, f"{tmp_path}@much")
    assert "holds a.safetensors, b.safetensors: say which" in failed(capsys, *draw, tmp_path)


def test_zero_steps(capsys, tiny_sd_v, distilling):
    status, _, err = sublimate(capsys, "generate", tiny_sd_v, "a cat", "--steps", "0")
    assert status == 2 and "--steps" in err
    assert "trainer.max_train_steps" in failed(capsys, *distilling, "trainer.max_train_steps=0")


def test_negative_guidance(capsys, tiny_sd_v, distilling):
    status, _, err = sublimate(capsys, "generate", tiny_sd_v, "a cat", "--guidance-scale", "-2")
    assert status == 2 and "--guidance-scale" in err
    assert "objective.guidance_scale" in failed(capsys, *distilling, "objective.guidance_scale=-2")


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_student_alone(capsys, tmp_path, distilling, monkeypatch):
    assert sublimate(capsys, *distilling)[0] == 0
    student = tmp_path / "run" / "student"
    before = {path: path.read_bytes() for path in student.rglob("*") if path.is_file()}

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(folders, "_sync", full)
    assert "The disk is full" in failed(capsys, *distilling, "trainer.max_train_steps=3")
    assert {path: path.read_bytes() for path in student.rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "run").iterdir() if "partial" in path.name] == []


@pytest.mark.slow
def test_own_prompts_are_all_judged_and_inks_grammar_by_inks_detector(capsys, tmp_path, tiny_sd_v):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        '{"text": "a red seven", "digit": "seven", "ink": "red"}\n{"text": "a nine", "digit": "nine", "ink": null}\n'
    )
    found = tmp_path / "found.json"
    draw = ["evaluate", "ink", "--steps", "1", "--prompts", asked]
    assert sublimate(capsys, *draw, "--out", found)[0] == 0
    rates = json.loads(found.read_text())["agreement"]
    assert {"digit", "ink", "together", "rejected"} <= rates.keys() and rates["together"]["n"] == 2
    assert rates["ink"]["n"] == 1  # null asks for nothing
    how = json.loads(found.read_text())["options"]
    assert how["steps"] == 1 and how["prompts"] == "asked.jsonl" and how["edits"] == how["loras"] == []
    assert "--n and --judged" in failed(capsys, *draw, "--n", "8")


@pytest.mark.slow
def test_pictures_are_drawn_as_many_at_once_as_asked(capsys, tiny_sd, tmp_path, monkeypatch):
    batches = []
    forward = Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda d, x, *a, **k: batches.append(len(x)) or forward(d, x, *a, **k))
    draw = ("generate", tiny_sd, "a cat", "--count", "3", "--steps", "1", "--guidance-scale", "1", "--out", tmp_path)
    assert sublimate(capsys, *draw, "--batch-size", "2")[0] == 0
    assert batches == [2, 1]
