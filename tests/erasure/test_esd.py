"""ESD: its losses at the start are known exactly, and a fit changes what it says and nothing else."""

import pytest
import torch
from erasing import disturb

from sublimate.diffusion.conditions import Condition
from sublimate.erasure import fine_tuning
from sublimate.erasure.methods.esd import ESD, ESDObjective
from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.weights import select
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom
from sublimate.training.trainer import Interrupted

CAT = Request(Concept("cat", prompts=("a red cat",)), preserve=["seven", "dog"])
SMALL = {"sampling_steps": 3, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


def bits(model):
    return {key: p.detach().numpy().tobytes() for key, p in model.parameters().items()}


def streams(n=4, step=0):
    return SampleRandom(0, step, "student", range(n))


def start(model, request=CAT, **options):
    """An objective and its prepared first batch."""
    objective = ESDObjective(model, ESD.Config(**{**SMALL, **options}), request)
    turn = objective.turns(0)[0]
    with torch.no_grad():
        return objective, turn, objective.prepare(turn, Batch(Condition(), streams()), 0)


def mean_square(x):
    return x.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_the_first_loss_is_the_squared_guidance_times_one_plus_eta_squared(sd, eta):
    objective, turn, batch = start(sd, eta=eta)
    with torch.no_grad():
        concept = sd.denoiser(batch["x_t"], batch["t"], objective.erased.condition(batch["rows"], "cpu")).output
        null = sd.denoiser(batch["x_t"], batch["t"], sd.null_condition()).output
        loss = objective.loss(turn, batch, 0)
    torch.testing.assert_close(batch["target"], null - eta * (concept - null))
    torch.testing.assert_close(loss.logs["erase"], (1 + eta) ** 2 * mean_square(concept - null))
    assert loss.logs["erase"] > 0


def test_within_trains_under_the_context_and_leaves_its_prediction_otherwise(sd):
    request = Request("cat", within="a photo")
    objective, turn, batch = start(sd, request, eta=0.7)
    x_t, t = batch["x_t"], batch["t"]
    with torch.no_grad():
        context, concept = (sd.denoiser(x_t, t, sd.encode_prompts([p])).output for p in ("a photo", "cat"))
        null = sd.denoiser(x_t, t, sd.null_condition()).output
        loss = objective.loss(turn, batch, 0)
    torch.testing.assert_close(batch["target"], context - 0.7 * (concept - null))
    torch.testing.assert_close(loss.total, 0.49 * mean_square(concept - null))


@pytest.mark.slow
def test_keep_terms_start_at_zero_and_add_up_with_their_weights(sd):
    objective, turn, batch = start(sd, retain=0.5, null_pin=2.0, l1=3.0)
    with torch.no_grad():
        logs = objective.loss(turn, batch, 0).logs
        assert logs["retain"] == logs["null"] == logs["l1"] == 0
        disturb(objective)
        loss = objective.loss(turn, batch, 0)
        kept = objective.kept.condition(batch["kept_rows"], "cpu")
        x, t = batch["kept_x_t"], batch["kept_t"]
        retained = mean_square(objective.student(x, t, kept).output - sd.denoiser(x, t, kept).output)
        x, t, null = batch["x_t"], batch["t"], sd.null_condition()
        pinned = mean_square(objective.student(x, t, null).output - sd.denoiser(x, t, null).output)
    torch.testing.assert_close(loss.logs["retain"], retained)
    torch.testing.assert_close(loss.logs["null"], pinned)
    expected = loss.logs["erase"] + 0.5 * retained + 2 * pinned + 3 * loss.logs["l1"]
    torch.testing.assert_close(loss.total, expected)
    assert min(retained, pinned, loss.logs["l1"]) > 1e-6


@pytest.mark.slow
def test_the_space_weights_the_loss(sd):
    totals = {}
    for space in ("output", "eps", "v"):
        objective, turn, batch = start(sd, Request("cat"), space=space)
        with torch.no_grad():
            disturb(objective)
            totals[space] = objective.loss(turn, batch, 0).total
    torch.testing.assert_close(totals["output"], totals["eps"])
    assert totals["v"] > 1.01 * totals["eps"]


@pytest.mark.slow
def test_the_student_or_the_frozen_network_samples(sd):
    for trajectory, moves in (("student", True), ("frozen", False)):
        objective, turn, batch = start(sd, trajectory=trajectory)
        disturb(objective)
        with torch.no_grad():
            again = objective.prepare(turn, Batch(Condition(), streams()), 0)
        assert torch.equal(again["t"], batch["t"]) and torch.equal(again["rows"], batch["rows"])
        assert torch.equal(again["x_t"], batch["x_t"]) != moves
        assert torch.equal(again["kept_x_t"], batch["kept_x_t"]) != moves


def test_samples_draw_concepts_alike_whatever_the_number_of_their_prompts(sd):
    bank = PromptBank(sd, [["cat", "a cat", "a red cat"], ["dog"]])
    rows = bank.draw(streams(400))
    counts = rows.bincount(minlength=4)
    assert 160 < counts[3] < 240 and counts[:3].min() > 40
    told = bank.condition(torch.tensor([3, 1]), "cpu")["text"]
    torch.testing.assert_close(told, sd.encode_prompts(["dog", "a cat"])["text"])


@pytest.mark.slow
def test_counted_passes_are_the_networks_passes(sd):
    config = {"sampling_steps": 1, "null_pin": 1.0}
    objective, turn, _ = start(sd, **config)
    calls = {"student": 0, "frozen": 0}
    for name, module in (("student", objective.student), ("frozen", objective.frozen)):
        module.register_forward_hook(lambda m, args, out, name=name: calls.update({name: calls[name] + len(args[0])}))
    with torch.no_grad():
        batch = objective.prepare(turn, Batch(Condition(), streams()), 0)
        objective.loss(turn, batch, 0)
    objective.frozen._forward_hooks.clear()
    assert objective.config.passes() == (calls["frozen"] + 3 * calls["student"]) / 4 == 12
    assert ESD.Config().passes() == 49 + 2 + 3 + 49 + 1 + 3
    assert ESD.Config(start_guidance=1.0, retain=0.0).passes() == 24.5 + 2 + 3


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["x", "x-strict", "u", "self"])
def test_a_fit_changes_the_selected_weights_and_nothing_else(sd, rule):
    before, flags = bits(sd), {key: p.requires_grad for key, p in sd.parameters().items()}
    random_state = torch.get_rng_state()
    edit = ESD(weights=rule, **SMALL).fit(sd, CAT, seed=1)
    assert bits(sd) == before and torch.equal(torch.get_rng_state(), random_state)
    assert {key: p.requires_grad for key, p in sd.parameters().items()} == flags
    assert set(edit.values) == {f"unet/{name}" for name in select(sd.denoiser.network, rule)} and not edit.low_rank
    with edit.applied(sd):
        after = bits(sd)
    changed = {key for key in before if after[key] != before[key]}
    assert changed <= set(edit.values) and len(changed) > len(edit.values) / 2
    assert bits(sd) == before
    assert edit.provenance["method"] == "esd" and edit.provenance["config"]["weights"] == rule


@pytest.mark.slow
def test_the_seed_decides(sd):
    def fit(seed):
        return ESD(**SMALL).fit(sd, CAT, seed=seed).values

    first, again, other = fit(1), fit(1), fit(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.slow
def test_training_leads_away_from_the_concept(sd):
    options = {**SMALL, "sampling_steps": 1}
    objective, turn, batch = start(sd, Request("cat"), **options)
    with torch.no_grad():
        before = objective.loss(turn, batch, 0).total
    # The batch is drawn with another seed than the run's.
    edit = ESD(**{**options, "max_train_steps": 20, "train_batch_size": 4}).fit(sd, Request("cat"), seed=1)
    with edit.applied(sd), torch.no_grad():
        told = objective.erased.condition(batch["rows"], "cpu")
        predicted = sd.denoiser(batch["x_t"], batch["t"], told).output
    assert mean_square(predicted - batch["target"]) < 0.2 * before


@pytest.mark.slow
def test_what_has_no_gradient_does_not_move(sd):
    # Strength 0 within a context asks for what the network does already; weight decay would move it all the same.
    values = ESD(eta=0.0, **SMALL).fit(sd, Request("cat", within="photo")).values
    assert all(torch.equal(value, sd.parameters()[key]) for key, value in values.items())


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_weights(sd, tmp_path):
    options = {**SMALL, "checkpointing_steps": 2}
    whole = ESD(**{**options, "max_train_steps": 4}).fit(sd, CAT)
    ESD(**options, output_dir=tmp_path).fit(sd, CAT)
    resumed = ESD(**{**options, "max_train_steps": 4}, output_dir=tmp_path).fit(sd, CAT)
    assert all(torch.equal(resumed.values[key], value) for key, value in whole.values.items())
    with pytest.raises(ValueError, match="another model, data or options"):
        ESD(**{**options, "max_train_steps": 4}, output_dir=tmp_path).fit(sd, Request("dog"))


def test_a_run_without_a_folder_leaves_none_and_says_how_to_resume(sd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def stopped(trainer):
        assert trainer.config.output_dir.parent == tmp_path
        raise Interrupted(15, trainer.config.output_dir)

    monkeypatch.setattr(fine_tuning.Trainer, "run", stopped)
    with pytest.raises(KeyboardInterrupt, match="set output_dir"):
        ESD(**SMALL).fit(sd, CAT)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Interrupted):
        ESD(**SMALL, output_dir=tmp_path / "run").fit(sd, CAT)


@pytest.mark.slow
def test_joint_attention_models_are_edited_too(tiny_sd3):
    model = open_model(tiny_sd3)
    before = bits(model)
    edit = ESD(weights="x-strict", **SMALL).fit(model, Request("cat"))
    assert all(".add_k_proj." in key or ".add_v_proj." in key for key in edit.values)
    assert bits(model) == before
    edit.apply(model)
    assert bits(model) != before
    edit.remove(model)
    assert bits(model) == before


@pytest.mark.slow
def test_what_esd_cannot_train_is_refused(sd, tiny_sd, tiny_unconditional):
    with pytest.raises(ValueError, match="knows no prompts"):
        ESD(**SMALL).fit(open_model(tiny_unconditional), CAT)
    with pytest.raises(ValueError, match="in which nothing trains: open it in bfloat16 or float32"):
        ESD(**SMALL).fit(open_model(tiny_sd, dtype=torch.float16), CAT)
    with pytest.raises(ValueError, match="exactly one"):
        ESD(templates=("a photo",))
