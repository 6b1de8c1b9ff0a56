"""A base in half precision under what trains in float32, and warnings of precisions that a machine does not have."""

import json
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from grid import matrix
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sublimate.erasure.methods.esd import ESD
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import open_model
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.precision import float32_products, warn_of_launchers_precision, warn_of_slow_bf16

OBJECTIVES = matrix("training/test_objectives")
CAT = Request(Concept("cat", anchor="dog"))
SHORT = {"sampling_steps": 2, "max_train_steps": 2, "learning_rate": 1e-3}
LORA = {"kind": "lora", "rank": 2}
# On CPUs without bf16 of their own every run in it says that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore:This CPU has no bf16")


def configured(folder, out, player=LORA, run=None, **options):
    small = {"critic_updates": 1, "discriminator_width": 8, "student": player, "critic": player}
    data = {"prompts": str(out.parent / "prompts.txt"), "images": "teacher", "count": 2, "teacher_steps": 2}
    (out.parent / "prompts.txt").write_text("red cat\na dog\n")
    run = {"output_dir": out, "max_train_steps": 2, "train_batch_size": 2, "mixed_precision": "bf16", **(run or {})}
    return DistillConfig(model=str(folder), objective=small, data=data, trainer=run, **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["f_distill", "f_distill-lora", "consistency_distillation-told", "speedupnet"])
def test_players_train_in_float32_over_a_base_in_bfloat16(tiny_sd, tmp_path, case):
    model = open_model(tiny_sd, dtype=torch.bfloat16)
    before = {key: p.clone() for key, p in model.parameters().items()}
    trainer = OBJECTIVES.make_trainer(model, case, tmp_path, mixed_precision="bf16")
    start = OBJECTIVES.weights(trainer)
    trainer.run()
    trained = OBJECTIVES.weights(trainer)
    assert {p.dtype for player in trainer.players.values() for p in player.trainable().values()} == {torch.float32}
    # A step of Adam's is far below what bfloat16 tells apart.
    moved = [(trained[name] - start[name]).abs().max() for name in start if name.startswith("student.")]
    assert 0 < max(moved, default=1) < 1e-3 or case == "speedupnet"
    for key, p in model.parameters().items():
        assert p.dtype == torch.bfloat16 and torch.equal(p, before[key])


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_a_student_of_a_base_in_bfloat16_is_written_in_one_precision(tiny_sd, tmp_path, saved):
    edit = UCE().fit(open_model(tiny_sd), CAT)  # of the base in float32
    path = edit.save(tmp_path / "edit.safetensors")
    config = configured(tiny_sd, tmp_path / "run", dtype="bfloat16", edits=[path], save_dtype=saved)
    student = distill(config, progress=False)
    files = [file for file in student.rglob("*.safetensors") if "lora" not in file.name]
    assert len(files) == 3
    assert {t.dtype for file in files for t in load_file(file).values()} == {getattr(torch, saved)}
    # A pipeline whose parts are of different precisions dies at its first step.
    opened = DiffusionPipeline.from_pretrained(student)
    assert {p.dtype for part in (opened.unet, opened.text_encoder, opened.vae) for p in part.parameters()} == {
        torch.float32
    }
    assert "\ndtype: bfloat16\n" in json.loads((student / "sublimate.json").read_text())["provenance"]["config"]


@pytest.mark.slow
@pytest.mark.parametrize("player", [LORA, {"kind": "full"}], ids=["lora", "full"])
def test_students_over_a_base_in_bfloat16_are_drawn_during_training(tiny_sd, tmp_path, monkeypatch, player):
    monkeypatch.setattr("sublimate.training.distill.at_once", lambda shape, cost=1: 2)
    prompts, data = ("red cat", "a dog", "red cat"), {"run": {"validation_steps": 1}, "player": player}
    plain = configured(tiny_sd, tmp_path / "plain", **data, validation_prompts=prompts, dtype="float32")
    half = configured(tiny_sd, tmp_path / "half", **data, validation_prompts=prompts, dtype="bfloat16")
    for config in (plain, half):
        distill(config, progress=False)
    first, second = (Image.open(tmp_path / name / "samples" / "0000002.png") for name in ("plain", "half"))
    (width, height), pixels = first.size, first.tobytes()
    assert second.size == (width, height) and len(set(pixels)) > 20
    apart = [abs(a - b) for a, b in zip(pixels, second.tobytes(), strict=True)]
    assert max(apart) < 16  # of 255


@pytest.mark.slow
def test_a_base_in_half_precision_is_refused_where_it_cannot_train(tiny_sd, tmp_path):
    config = configured(tiny_sd, tmp_path / "run", dtype="bfloat16")
    plain = config.model_copy(update={"trainer": config.trainer.model_copy(update={"mixed_precision": "no"})})
    with pytest.raises(
        ValueError, match=r"what trains is float32: set mixed_precision to bf16, or open it in float32"
    ):
        distill(plain, progress=False)
    with pytest.raises(ValueError, match="open already, in its precision: leave dtype out"):
        distill(config, open_model(tiny_sd), progress=False)
    with pytest.raises(ValueError, match=r"set mixed_precision to bf16"):
        ESD(**SHORT).fit(open_model(tiny_sd, dtype=torch.bfloat16), CAT)


@pytest.mark.slow
@pytest.mark.parametrize("eraser", [ESD(**SHORT, mixed_precision="bf16"), UCE()], ids=["esd", "uce"])
def test_an_edit_made_in_bfloat16_fits_the_same_checkpoint_in_either_precision(tiny_sd, tiny_sd_v, tmp_path, eraser):
    half = open_model(tiny_sd, dtype=torch.bfloat16)
    edit = Edit.load(eraser.fit(half, CAT).save(tmp_path / "edit.safetensors"))
    folded = DiffusionPipeline.from_pretrained(edit.fold(half, tmp_path / "model"))
    assert folded.unet.dtype == folded.text_encoder.dtype == torch.float32
    with safe_open(tmp_path / "edit.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
    assert edit.provenance["base"]["dtype"] == "bfloat16"
    key = next(iter(edit.shapes()))
    for model in (half, open_model(tiny_sd)):
        before = {k: p.clone() for k, p in model.parameters().items()}
        other = UCE().fit(model, Request(Concept("seven", anchor="red")))
        # Also beside another edit, which the hash of the weights as they are would count.
        with other.applied(model), edit.applied(model):
            assert not torch.equal(model.parameters()[key], before[key])
        assert all(torch.equal(p, before[k]) for k, p in model.parameters().items())
    with pytest.raises(ValueError, match="The edit was made for"):
        edit.apply(open_model(tiny_sd_v))
    unsaid = {name: value for name, value in edit.provenance["base"].items() if name != "dtype"}
    with pytest.raises(ValueError, match="The edit was made for"):
        Edit(edit.values, edit.low_rank, {**edit.provenance, "base": unsaid}).apply(open_model(tiny_sd))


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_is_rounded_to_tf32_where_the_run_allows_it(tiny_sd, tmp_path, monkeypatch, allowed):
    before = float32_products()
    monkeypatch.setattr("sublimate.training.distill._run", lambda *_, **__: float32_products())
    during = distill(configured(tiny_sd, tmp_path / "run", allow_tf32=allowed))
    assert during == ("tf32" if allowed else before) and float32_products() == before


def test_bf16_that_a_cpu_does_not_have_is_warned_of():
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_slow_bf16(torch.device("cpu"))
    else:
        with pytest.warns(UserWarning, match="set mixed_precision to no"):
            warn_of_slow_bf16(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_bf16(torch.device("meta"))


def test_a_launchers_precision_that_does_not_count_is_warned_of():
    with pytest.warns(UserWarning, match=r"says mixed_precision=fp16, and the run's own bf16 counts"):
        warn_of_launchers_precision("fp16", "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for launchers in ("no", "bf16"):
            warn_of_launchers_precision(launchers, "bf16")
