"""Fine-tuning erasers that train a LoRA: their edit is its effect, of low rank, where a LoRA can do what is asked."""

import pytest
import torch
from commands import failed, sublimate
from erasing import disturb

from sublimate.erasure.methods.concept_ablation import ConceptAblation
from sublimate.erasure.methods.esd import ESD, ESDConfig, ESDObjective
from sublimate.erasure.methods.l1_sparse import L1SparseConfig
from sublimate.erasure.methods.prune_then_erase import PruneThenErase
from sublimate.erasure.methods.salun import SalUnConfig
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.trained_weights import denoiser_player
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import open_model

CAT = Request("cat", preserve=["seven"])
SMALL = {"sampling_steps": 2, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3, "lora_rank": 2}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


@torch.no_grad()
def answer(model, denoiser):
    x_t = torch.linspace(-2, 2, 2 * 4 * 8 * 8).view(2, *model.latent_shape)
    return denoiser(x_t, 400.0, model.encode_prompts(["cat", "a red dog"])).output


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["x", "x-strict", "u", "self", "full"])
def test_the_edit_is_the_trained_adapters_effect(sd, rule):
    objective = ESDObjective(sd, ESDConfig(weights=rule, lora_rank=2, lora_alpha=6), CAT)
    said = answer(sd, sd.denoiser)
    assert torch.equal(answer(sd, objective.student), said)
    disturb(objective)
    moved = answer(sd, objective.student)
    assert (moved - said).abs().max() > 1e-2
    changes = objective.changes(sd)
    edit = Edit(changes.values, changes.low_rank)
    assert not edit.values and {b.shape[1] for b, _ in edit.low_rank.values()} == {2}
    assert torch.equal(answer(sd, sd.denoiser), said)
    with edit.applied(sd, allow_other_base=True):
        torch.testing.assert_close(answer(sd, sd.denoiser), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_lora_takes_the_linear_layers_of_the_rule(sd):
    player = denoiser_player(sd, "x-strict", learning_rate=1e-3, lora_rank=2)
    layers = {name.partition(".lora_")[0].partition(".attn2.")[2] for name in player.names}
    assert layers == {"to_k", "to_v"}
    torch.rand(1)  # the global generator has no say
    again, other = (denoiser_player(sd, "x-strict", learning_rate=1e-3, lora_rank=2, seed=s) for s in (0, 1))
    factors = [torch.cat([p.flatten() for p in one.trainable().values()]) for one in (player, again, other)]
    assert torch.equal(factors[0], factors[1]) and not torch.equal(factors[0], factors[2])
    whole = denoiser_player(sd, "x-strict", learning_rate=1e-3)
    sizes = [sum(p.numel() for p in one.trainable().values()) for one in (player, whole)]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.slow
def test_a_fitted_lora_composes_travels_and_is_one_for_diffusers(sd, tmp_path):
    edit = ESD(**SMALL, weights="x").fit(sd, CAT)
    assert Edit.load(edit.save(tmp_path / "edit.safetensors")).low_rank.keys() == edit.low_rank.keys()
    state = edit.to_lora(sd)
    key, (b, a) = next(iter(edit.low_rank.items()))
    layer = key.removesuffix(".weight").replace("/", ".", 1)
    assert torch.equal(state[f"{layer}.lora_B.weight"], b) and torch.equal(state[f"{layer}.lora_A.weight"], a)
    other = UCE().fit(sd, Request(Concept("red", anchor="dog")))
    both = Edit.compose([edit, other])
    assert both.low_rank.keys() == edit.low_rank.keys() | other.low_rank.keys() and not both.values
    with edit.applied(sd):
        one_by_one = other.applied(sd)
        with one_by_one:
            expected = answer(sd, sd.denoiser)
    with both.applied(sd):
        torch.testing.assert_close(answer(sd, sd.denoiser), expected)


@pytest.mark.slow
def test_the_seed_decides_and_a_stopped_run_resumes(sd, tmp_path):
    def fit(seed=1, **options):
        return ESD(**{**SMALL, **options}, checkpointing_steps=2).fit(sd, CAT, seed=seed).low_rank

    whole, other = fit(max_train_steps=4), fit(2, max_train_steps=4)
    fit(output_dir=tmp_path)
    resumed = fit(max_train_steps=4, output_dir=tmp_path)
    for key, (b, a) in whole.items():
        assert torch.equal(resumed[key][0], b) and torch.equal(resumed[key][1], a)
        assert not torch.equal(other[key][1], a)


def test_what_is_about_single_weights_is_refused():
    for config, options in ((ESDConfig, {"l1": 0.1}), (SalUnConfig, {}), (L1SparseConfig, {})):
        with pytest.raises(ValueError, match="is about single weights, and a LoRA moves whole layers"):
            config(**options, lora_rank=2)
    with pytest.raises(ValueError, match="lora_alpha is of a LoRA"):
        ESDConfig(lora_alpha=2)
    with pytest.raises(ValueError, match="Pruned weights are single ones, and a LoRA moves whole layers"):
        PruneThenErase(then="esd", options=SMALL, sparsity=0.3)
    assert PruneThenErase(then="esd", options=SMALL, sparsity=0.0).inner.config.lora_rank == 2


@pytest.mark.slow
def test_tables_of_classes_take_none(tiny_dit):
    with pytest.raises(ValueError, match="names no linear layer, as a LoRA needs"):
        ConceptAblation(weights="x-strict", lora_rank=2, start_guidance=1.0).fit(open_model(tiny_dit), Request("cat"))


@pytest.mark.slow
def test_the_command_writes_it_as_a_lora(capsys, tmp_path, tiny_sd):
    erase = ["erase", tiny_sd, "cat", "--method", "esd", "--lora", "--out", tmp_path]
    assert "full rank, which no LoRA holds" in failed(capsys, *erase)
    options = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    status, _, err = sublimate(capsys, *erase, *options)
    assert status == 0, err
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
