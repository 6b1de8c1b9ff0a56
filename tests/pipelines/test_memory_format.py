"""Convolutions with channels last: the same results, in every copy that trains, and files as before."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sublimate.erasure.methods.esd import ESD
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.generate import generate
from sublimate.pipelines.memory_format import channels_last, kernels
from sublimate.pipelines.model import open_model
from sublimate.training.data import ModelSource
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.objectives.denoising import Denoising, DenoisingConfig
from sublimate.training.objectives.f_distill import FDistill
from sublimate.training.trainer import Trainer, TrainerConfig

LAST = torch.channels_last


def drawn(model):
    return generate(model, ["red cat"], steps=2, seed=0, progress=False)


def test_a_network_computes_the_same_and_is_left_as_it_was(tiny_sd):
    model = open_model(tiny_sd)
    before, plain = drawn(model), model.content_hash()
    with channels_last(model):
        parts = [model.pipeline.unet, model.pipeline.vae]
        assert all(len(kernels(part)) > 5 for part in parts)
        assert all(w.is_contiguous(memory_format=LAST) and not w.is_contiguous() for p in parts for w in kernels(p))
        orders = []
        model.pipeline.unet.mid_block.resnets[-1].conv2.register_forward_hook(
            lambda *called: orders.append(called[-1].is_contiguous(memory_format=LAST))
        )
        torch.testing.assert_close(drawn(model), before, rtol=1e-4, atol=1e-5)
        assert all(orders) and len(orders) == 2
        assert model.content_hash() == plain
    assert all(w.is_contiguous() for w in model.parameters().values())
    assert torch.equal(drawn(model), before)


def test_networks_without_convolutions_have_no_channels_to_put_last(tiny_pixart):
    with (
        pytest.raises(ValueError, match="is no network of convolutions: leave out channels_last"),
        channels_last(open_model(tiny_pixart)),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_students_weights_are_those_it_has_without(tiny_sd, tmp_path, monkeypatch, kind):
    orders = {}

    def exports(self, real=FDistill.exports):
        for name in ("student", "critic"):
            weights = kernels(self.players()[name].module)
            orders[name] = {w.is_contiguous(memory_format=LAST) for w in weights if w.shape[1] > 1}
        return real(self)

    monkeypatch.setattr(FDistill, "exports", exports)
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")

    def trained(name, **options):
        player = {"kind": kind, "rank": 2} if kind == "lora" else {}
        config = DistillConfig(
            model=str(tiny_sd),
            objective={"critic_updates": 1, "discriminator_width": 8, "student": player, "critic": player},
            data={"prompts": str(tmp_path / "prompts.txt"), "teacher_steps": 1},
            trainer={"output_dir": tmp_path / name, "max_train_steps": 3, "train_batch_size": 2, **options},
            channels_last=name != "plain",
        )
        folder = distill(config, progress=False)
        assert f"channels_last: {json.dumps(name != 'plain')}" in (folder / "sublimate.json").read_text()
        return {k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}

    plain = trained("plain")
    assert orders == {"student": {False}, "critic": {False}}
    last = trained("last", checkpointing_steps=2)
    assert orders == {"student": {True}, "critic": {True}}
    assert plain.keys() == last.keys()
    for name, value in plain.items():
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_moments_are_restored_in_the_order_of_their_weights(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    with channels_last(model):
        trainers = []
        for name in ("straight", "resumed"):
            config = TrainerConfig(output_dir=tmp_path, max_train_steps=2, train_batch_size=1, checkpointing_steps=1)
            source = ModelSource(model, ["red cat"], torch.ones(1, *model.latent_shape))
            trainers.append(Trainer(Denoising(model, DenoisingConfig()), source, config, progress=False))
            if name == "straight":
                trainers[-1].run()
            else:
                trainers[-1].load(tmp_path / "checkpoint-2")
        for trainer in trainers:
            (optimizer,) = trainer.optimizers.values()
            for weight, state in optimizer.state.items():
                assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == weight.stride()
        first, second = (t.players["student"].trainable().values() for t in trainers)
        for one, other in zip(first, second, strict=True):
            found = (t.optimizers["student"].state[w]["exp_avg"] for t, w in zip(trainers, (one, other), strict=True))
            assert torch.equal(*found)


@pytest.mark.slow
def test_an_eraser_changes_what_it_changes_without(tiny_sd, tmp_path):
    def fitted(**options):
        eraser = ESD(weights="u", sampling_steps=2, max_train_steps=2, learning_rate=1e-3, **options)
        model = open_model(tiny_sd)
        edit = eraser.fit(model, Request(Concept("cat")))
        assert all(w.is_contiguous() for w in model.parameters().values())
        return load_file(edit.save(tmp_path / "edit.safetensors"))

    plain, last = fitted(), fitted(channels_last=True)
    assert plain.keys() == last.keys() and any(value.ndim == 4 and value.shape[-1] == 3 for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(last[name], value, rtol=1e-3, atol=1e-4, msg=name)
