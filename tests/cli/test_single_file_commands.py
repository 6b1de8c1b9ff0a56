"""Commands on a checkpoint of one file, whose text encoders are a folder's."""

import pytest
import torch
from commands import failed, sublimate
from safetensors.torch import save_file

from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import open_model


@pytest.mark.slow
def test_commands_take_what_a_file_lacks_from_a_folder(capsys, tiny_flux, tmp_path):
    whole, file = open_model(tiny_flux), tmp_path / "tuned.safetensors"
    with torch.no_grad():
        whole.pipeline.transformer.proj_out.bias.add_(0.1)
    save_file({name: tensor.contiguous() for name, tensor in whole.pipeline.transformer.state_dict().items()}, file)
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")
    parts = ("--file-config", tiny_flux)

    erase = ("erase", file, "cat", "--anchor", "dog", "--out", tmp_path / "edit")
    assert "give one, or a diffusers folder" in failed(capsys, *erase)
    assert sublimate(capsys, *erase, *parts)[0] == 0
    edit = tmp_path / "edit" / "edit.safetensors"
    assert Edit.load(edit).provenance["base"]["content_hash"] == whole.content_hash()
    draw = ("generate", file, "a cat", "--edit", edit, "--steps", "1", "--out", tmp_path / "images")
    assert sublimate(capsys, *draw, *parts)[0] == 0
    assert (tmp_path / "images" / "00000.png").is_file()

    run = ("distill", "sd15_f_distill", f"model={file}", f"file_config={tiny_flux}")
    small = ("objective.critic_updates=1", "data.count=2", "data.teacher_steps=1", "trainer.max_train_steps=1")
    options = (*small, f"data.prompts={tmp_path / 'prompts.txt'}", f"trainer.output_dir={tmp_path / 'run'}")
    status, out, _ = sublimate(capsys, *run, *options, "trainer.mixed_precision=no", "--dry-run")
    assert status == 0 and "turn student: " in out
