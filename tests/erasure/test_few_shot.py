"""Few-shot erasing: the negated loss at few pictures, the two measures, and the step that is kept."""

import pytest
import torch
from erasing import disturb
from PIL import Image

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.latent_bank import LatentBankConfig, few_latents
from sublimate.erasure.methods.few_shot import FewShot, FewShotConfig, FewShotObjective
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.step_choice import StepChoice, best_step
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven", "red"])
SMALL = {"images": 2, "sampling_steps": 1, "templates": ("{}", "a {}"), "train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sd_v"])
def sd(request):
    return open_model(request.getfixturevalue(request.param))


def said(denoiser, batch, encode, texts):
    """A denoiser at the batch's x_t, told one text per sample."""
    return denoiser(batch["x_t"], batch["t"], encode(texts))


def phrases(rows, words):
    texts = [template.format(word) for word in words for template in ("{}", "a {}")]
    return [texts[row] for row in rows.tolist()]


@pytest.mark.slow
def test_the_loss_is_minus_the_denoising_loss_at_few_noised_pictures(sd):
    objective = FewShotObjective(sd, FewShotConfig(**SMALL, retain=0.7), CAT)
    disturb(objective)
    (turn,) = objective.turns(0)
    with torch.no_grad():
        batch = objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, "student", range(6))), 0)
        loss, encode = objective.loss(turn, batch, 0), objective.text.encode_prompts
        shown = said(sd.denoiser, batch, encode, phrases(batch["rows"], ["cat"]))
        texts = phrases(batch["kept_rows"], ["seven", "red"])
        moved = said(sd.denoiser, batch, encode, texts).output
        drift = (moved - said(sd.denoiser, batch, sd.encode_prompts, texts).output).square().mean()
    c = sd.schedule.at(batch["t"])
    alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in (c.alpha, c.sigma))
    torch.testing.assert_close(batch["x_t"], alpha * batch["x0"] + sigma * batch["eps"])
    pictures = objective.pictures.rows[0]
    assert len(pictures) == 2
    assert all(any(torch.equal(x0, picture) for picture in pictures) for x0 in batch["x0"])
    erase = denoising_loss(shown, batch["x0"], batch["eps"]).mean()
    assert min(erase, drift) > 1e-6
    torch.testing.assert_close(loss.total, -erase + 0.7 * drift)


@pytest.mark.slow
def test_the_measures_are_their_formulas_one_sample_at_a_time(sd):
    objective = FewShotObjective(sd, FewShotConfig(**SMALL, held_out=6), CAT)
    assert objective.measure()[1] == 0.0
    disturb(objective)
    gain, drift = objective.measure()
    texts = ["", "a dog", "dog", "seven", "a seven", "red", "a red"]
    gains, drifts, units = [], [], []
    for part in objective.held_out:
        for i in range(len(part["t"])):
            one = {name: value[i : i + 1] for name, value in part.items()}
            cat, neutral = phrases(one["rows"], ["cat"]), [texts[one["neutral_rows"]]]
            moved = objective.text.encode_prompts
            with torch.no_grad():
                gains.append(denoising_loss(said(sd.denoiser, one, moved, cat), one["x0"], one["eps"]))
                for texts_, encoders, found in (
                    ((neutral, neutral), (moved, sd.encode_prompts), drifts),
                    ((cat, [""]), (sd.encode_prompts, sd.encode_prompts), units),
                ):
                    a, b = (said(sd.denoiser, one, e, text).output for e, text in zip(encoders, texts_, strict=True))
                    found.append((a - b).square().mean()[None])
    gains, drifts, units = (torch.cat(values).mean() for values in (gains, drifts, units))
    torch.testing.assert_close(torch.tensor(gain), gains, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(drift), drifts / units, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_what_is_held_out_covers_all_times_and_no_step_draws_it(sd):
    objective = FewShotObjective(sd, FewShotConfig(**SMALL, held_out=10), CAT)
    t = torch.cat([part["t"] for part in objective.held_out])
    torch.testing.assert_close(t, sd.schedule.uniform_time((torch.arange(10, dtype=torch.float64) + 0.5) / 10))
    (turn,) = objective.turns(0)
    drawn = objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, turn.name, range(10))), 0)
    assert not torch.equal(drawn["eps"], torch.cat([part["eps"] for part in objective.held_out]))


@pytest.mark.slow
def test_training_ascends(sd):
    edit = FewShot(**SMALL, max_train_steps=6, max_drift=1e9).fit(sd, CAT)
    gains = edit.provenance["outcome"]["gains"]
    assert gains[6] > gains[3] > gains[0]
    assert {key.partition("/")[0] for key in edit.values} == {"text_encoder"}


@pytest.mark.slow
def test_the_kept_step_is_that_of_a_run_which_ends_there(sd):
    long = FewShot(**SMALL, max_train_steps=5, max_drift=1e9).fit(sd, CAT).provenance["outcome"]
    assert long["drifts"] == sorted(long["drifts"])
    kept = FewShot(**SMALL, max_train_steps=5, max_drift=(long["drifts"][2] + long["drifts"][3]) / 2).fit(sd, CAT)
    step = kept.provenance["outcome"]["step"]
    assert kept.provenance["outcome"] == long | {"step": step} and step <= 2
    short = FewShot(**SMALL, max_train_steps=step, max_drift=1e9).fit(sd, CAT)
    assert all(torch.equal(kept.values[key], short.values[key]) for key in short.values)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_an_uninterrupted_one_keeps(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    drifts = FewShot(**SMALL, max_train_steps=5, max_drift=1e9).fit(model, CAT).provenance["outcome"]["drifts"]
    run = {**SMALL, "max_drift": (drifts[1] + drifts[2]) / 2}
    whole = FewShot(**run, max_train_steps=5).fit(model, CAT)
    assert whole.provenance["outcome"]["step"] == 1
    run |= {"output_dir": tmp_path / "run", "checkpointing_steps": 1}
    FewShot(**run, max_train_steps=3).fit(model, CAT)
    resumed = FewShot(**run, max_train_steps=5).fit(model, CAT)
    assert resumed.provenance["outcome"] == whole.provenance["outcome"]
    assert all(torch.equal(resumed.values[key], whole.values[key]) for key in whole.values)


@pytest.mark.slow
def test_checkpointing_activations_changes_nothing(tiny_sd):
    model = open_model(tiny_sd)
    plain, saving = (
        FewShot(**SMALL, max_train_steps=2, max_drift=1e9, gradient_checkpointing=on).fit(model, CAT)
        for on in (False, True)
    )
    for key, value in plain.values.items():
        torch.testing.assert_close(saving.values[key], value)
    assert not model.component("unet").is_gradient_checkpointing


@pytest.mark.slow
def test_a_bound_that_no_step_meets_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="raise max_drift"):
        FewShot(**SMALL, max_train_steps=2, max_drift=1e-12).fit(open_model(tiny_sd), CAT)


@pytest.mark.parametrize(
    ("gains", "drifts", "expected"),
    [
        ([1, 2, 3, 4], [0, 0.1, 0.2, 0.3], 2),  # the largest gain within the bound
        ([1, 3, 2, 4], [0, 0.1, 0.2, 0.3], 1),  # not the last step within it
        ([1, 2, 5, 3], [0, 0.1, 0.3, 0.2], 3),  # steps beyond the bound do not count, later ones within it do
        ([1, 2, 2, 2], [0, 0.2, 0.1, 0.0], 1),  # the earliest of equals
    ],
)
def test_the_best_step(gains, drifts, expected):
    assert best_step(gains, drifts, 0.2) == expected


def test_the_choice_holds_the_best_steps_weights():
    weights, measures = {"w": torch.zeros(1)}, [(1.0, 0.0), (2.0, 0.1), (5.0, 0.9), (3.0, 0.2), (2.5, 0.1)]
    choice = StepChoice(weights, lambda: measures[int(weights["w"])], 0.2)
    for step in range(1, 5):
        weights["w"].fill_(step)
        choice.step()
    assert choice.chosen() == 3 and choice.values["w"].item() == 3
    again = StepChoice({"w": torch.zeros(1)}, lambda: measures[0], 0.2)
    again.load_state(choice.state())
    assert again.outcome() == choice.outcome() and again.values["w"].item() == 3


@pytest.mark.slow
def test_all_phrases_of_a_concept_share_its_few_latents(tiny_sd, tmp_path):
    model, config = open_model(tiny_sd), LatentBankConfig(images=3, sampling_steps=1, start_guidance=1.0)
    options = {"config": config, "seed": 0, "batch_size": 4}
    pictures = [tmp_path / f"{i}.png" for i in range(2)]
    for i, picture in enumerate(pictures):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(picture)
    concepts = [Concept("dog", images=pictures), Concept("cat"), Concept("red")]
    bank = few_latents(model, concepts, ("a {}", "{}"), zero_shot=False, **options)
    assert [len(row) for row in bank.rows] == [2, 2, 3, 3, 3, 3]
    assert all(a is b for a, b in zip(bank.rows[::2], bank.rows[1::2], strict=True))
    again = few_latents(model, concepts, ("a {}", "{}"), zero_shot=False, **options)
    assert torch.equal(again.rows[2], bank.rows[2])
    # Drawn for the first phrase: the model's image of it, from some noise.
    z = generate_latents(model, ["a cat"] * 3, steps=1, guidance_scale=1.0, seed=1)
    assert z.shape == bank.rows[2].shape and not torch.equal(bank.rows[2], bank.rows[4])
    noise = few_latents(model, concepts, ("a {}", "{}"), zero_shot=True, **options)
    assert [len(row) for row in noise.rows] == [3] * 6
    everything = torch.cat([row.flatten() for row in noise.rows])
    assert 0 <= everything.min() < 0.1 and 0.9 < everything.max() < 1


@pytest.mark.slow
def test_passes_are_those_of_training_and_measuring(tiny_sd):
    options = {"images": 2, "sampling_steps": 1, "held_out": 6, "train_batch_size": 3, "retain": 0.0}
    config = FewShotConfig(**options)
    objective = FewShotObjective(open_model(tiny_sd), config, Request(Concept("cat", "dog")))
    counted = []
    for denoiser in {id(d): d for d in (objective.student, objective.frozen)}.values():
        denoiser.register_forward_pre_hook(lambda _, given: counted.append(len(given[0])))
    objective.measure()
    assert sum(counted) / config.train_batch_size == config.passes() - 2


def test_the_defaults_are_the_papers():
    config = FewShotConfig()
    assert len(set(config.templates)) == 27
    assert (config.weights, config.retain, config.zero_shot) == ("mlp-final-attn", 0.0, False)
    player = FewShotObjective.optimiser(config)
    assert (player.learning_rate, player.adam_beta1, player.adam_beta2) == (1e-5, 0.9, 0.98)
    assert (player.adam_epsilon, player.adam_weight_decay) == (1e-6, 0.0)
    # Five epochs of four pictures in batches of two.
    assert config.max_train_steps * config.train_batch_size == 5 * config.images
