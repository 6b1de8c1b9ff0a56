"""Erasers that train on noised pictures: banks of latents, the two losses, and the weights that may move."""

import copy

import numpy as np
import pytest
import torch
from erasing import disturb
from PIL import Image

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import add_noise
from sublimate.erasure import latent_bank
from sublimate.erasure.latent_bank import LatentBank, LatentBankConfig, drawn_bank, encoded
from sublimate.erasure.methods.concept_ablation import ConceptAblationConfig, ConceptAblationObjective
from sublimate.erasure.methods.salun import SalUn, SalUnConfig, SalUnObjective
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.saliency import largest
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.captioned import Framing
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven", "red"])
SMALL = {"images": 3, "sampling_steps": 1, "templates": ("{}", "a {}"), "train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sd_v"])
def sd(request):
    return open_model(request.getfixturevalue(request.param))


def streams(n=6, step=0):
    return SampleRandom(0, step, "student", range(n))


def start(model, cls, config, request=CAT):
    objective = cls(model, config(**SMALL, retain=0.7, weights="x"), request)
    (turn,) = objective.turns(0)
    return objective, turn, objective.prepare(turn, Batch(Condition(), streams()), 0)


def said(objective, model, batch, words, prefix=""):
    """The student at x_t for every sample's own phrase with a word of `words` in it, by its row."""
    texts = [template.format(word) for word in words for template in ("{}", "a {}")]
    told = model.encode_prompts([texts[row] for row in batch[f"{prefix}rows"].tolist()])
    return objective.student(batch[f"{prefix}x_t"], batch[f"{prefix}t"], told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config", "shown"),
    [(ConceptAblationObjective, ConceptAblationConfig, "dog"), (SalUnObjective, SalUnConfig, "cat")],
)
def test_the_loss_is_its_formula_at_noised_pictures(sd, cls, config, shown):
    objective, turn, batch = start(sd, cls, config)
    disturb(objective)
    pictures = generate_latents(sd, [shown] * 3 + [f"a {shown}"] * 3, steps=1, guidance_scale=7.5)
    for x0, row in zip(batch["x0"], batch["rows"].tolist(), strict=True):
        assert any(torch.equal(x0, picture) for picture in pictures[3 * row : 3 * row + 3])
    c = sd.schedule.at(batch["t"])
    alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in (c.alpha, c.sigma))
    torch.testing.assert_close(batch["x_t"], alpha * batch["x0"] + sigma * batch["eps"])
    with torch.no_grad():
        loss = objective.loss(turn, batch, 0)
        cat, dog = (said(objective, sd, batch, [word]).output for word in ("cat", "dog"))
        kept = said(objective, sd, batch, ["seven", "red"], "kept_")
        retained = denoising_loss(kept, batch["kept_x0"], batch["kept_eps"]).mean()
    erase = (cat - dog).square().mean()
    assert min(erase, retained) > 1e-6
    torch.testing.assert_close(loss.logs["erase"], erase)
    torch.testing.assert_close(loss.total, erase + 0.7 * retained)


def test_the_other_branch_of_the_swap_gets_no_gradient(sd):
    objective, turn, batch = start(sd, ConceptAblationObjective, ConceptAblationConfig)
    disturb(objective)
    objective.player.set_trainable(True)
    dog = said(objective, sd, batch, ["dog"]).output.detach()
    objective.config = objective.config.model_copy(update={"retain": 0.0})
    parameters = list(objective.player.trainable().values())
    found = torch.autograd.grad(objective.loss(turn, batch, 0).total, parameters)
    expected = torch.autograd.grad((said(objective, sd, batch, ["cat"]).output - dog).square().mean(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_concept_ablation_to_noise_with_a_prior(sd):
    config = ConceptAblationConfig(**SMALL, target="noise", prior=0.4, retain=0.0)
    objective = ConceptAblationObjective(sd, config, CAT)
    (turn,) = objective.turns(0)
    batch = objective.prepare(turn, Batch(Condition(), streams()), 0)
    with torch.no_grad():
        loss = objective.loss(turn, batch, 0)
        cat, dog = (
            denoising_loss(said(objective, sd, batch, [word]), batch["x0"], batch["eps"]).mean()
            for word in ("cat", "dog")
        )
    torch.testing.assert_close(loss.total, cat + 0.4 * dog)
    assert config.passes() == 3 + 3 and ConceptAblationConfig().passes() == 3 + 1 + 3


@pytest.mark.slow
def test_the_mask_is_that_of_the_largest_gradients_of_the_concepts_loss(sd):
    options = {**SMALL, "weights": "x", "saliency_guidance": 4.0}
    objective = SalUnObjective(sd, SalUnConfig(**options, saliency=0.3), CAT)
    student, null = copy.deepcopy(sd.denoiser).requires_grad_(True), sd.null_condition()
    # Every picture once, one at a time.
    pictures = [(row, latent) for row, latents in enumerate(objective.pictures.rows) for latent in latents]
    assert len(pictures) == 6
    for index, (row, x0) in enumerate(pictures):
        random = SampleRandom(0, 0, "saliency", [index])
        eps, t = random.normal(sd.latent_shape), sd.schedule.uniform_time(random.uniform())
        x_t = add_noise(sd.schedule, x0[None], eps, t)
        prediction = guided(student, x_t, t, sd.encode_prompts([("cat", "a cat")[row]]), null, 4.0)
        denoising_loss(prediction, x0[None], eps).sum().backward()
    total = {name: dict(student.named_parameters())[name].grad.abs() for name in objective.masks}
    everything = torch.cat([g.flatten() for g in total.values()]).sort(descending=True).values
    threshold = everything[-(-3 * len(everything) // 10) - 1]
    wrong = sum(int((mask != (total[name] >= threshold)).sum()) for name, mask in objective.masks.items())
    assert wrong <= 1e-3 * len(everything)  # rounding, at the threshold


@pytest.mark.slow
def test_the_mask_belongs_to_the_run(sd):
    # Another mask, as rounding on another machine makes one, is replaced by the checkpoint's.
    first, second = (SalUnObjective(sd, SalUnConfig(**SMALL, weights="x", saliency=s), CAT) for s in (0.3, 0.6))
    second.load_state({name: mask.clone() for name, mask in first.state().items()})
    second.player.set_trainable(True)
    (turn,) = second.turns(0)
    second.loss(turn, second.prepare(turn, Batch(Condition(), streams()), 0), 0).total.backward()
    for name, parameter in second.player.trainable().items():
        assert not parameter.grad[~first.masks[name]].any()


def test_the_gradients_are_summed_over_every_picture_once():
    own, shared = torch.zeros(2, 1), torch.ones(3, 1)
    assert [row for row, _ in LatentBank([own, shared, shared]).each()] == [0, 0, 1, 1, 1]


@pytest.mark.slow
def test_masked_weights_do_not_move_and_the_others_do(sd):
    options = {**SMALL, "weights": "x", "saliency": 0.25, "max_train_steps": 3}
    masks = SalUnObjective(sd, SalUnConfig(**options), CAT).masks
    edit = SalUn(**options).fit(sd, CAT)
    moved = {name: edit.values[f"unet/{name.removeprefix('network.')}"] for name in masks}
    before = {name: sd.parameters()[f"unet/{name.removeprefix('network.')}"] for name in masks}
    for name, mask in masks.items():
        assert torch.equal(moved[name][~mask], before[name][~mask])
    changed = sum(int((moved[name] != before[name]).sum()) for name in masks)
    assert 0.95 < changed / sum(int(mask.sum()) for mask in masks.values()) <= 1


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 1.0])
def test_the_largest_are_those_of_a_global_sort(share):
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.rand(7, 9, generator=generator) ** 8, "b": 1e-30 * torch.rand(50, generator=generator)}
    masks = largest(tensors, share)
    everything = torch.cat([tensor.flatten() for tensor in tensors.values()]).sort(descending=True).values
    threshold = everything[max(1, -(-int(share * 1000) * len(everything) // 1000)) - 1]
    for name, mask in masks.items():
        assert torch.equal(mask, tensors[name] >= threshold)


def test_ties_at_the_threshold_are_all_in():
    masks = largest({"a": torch.tensor([0.0, 1.0, 1.0, 1.0]), "b": torch.tensor([2.0])}, 0.4)
    assert masks["a"].tolist() == [False, True, True, True] and masks["b"].tolist() == [True]


def test_a_bank_draws_each_rows_own_latents_alike():
    bank = LatentBank([torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[7.0]])])
    rows = torch.tensor([0, 1] * 300)
    found = bank.draw(rows, streams(600), "cpu")[:, 0]
    assert (found[1::2] == 7).all()
    assert found[::2].long().bincount(minlength=3).min() > 70


def test_a_concepts_own_pictures_stand_for_it(sd, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        pixels = (255 * torch.rand(16, 16, 3, generator=generator)).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    concept = Concept("cat", anchor="dog", images=(tmp_path / "a.png", tmp_path / "b.png"))
    config = LatentBankConfig(images=1, sampling_steps=1, start_guidance=1.0)
    options = {"config": config, "seed": 0, "batch_size": 4}
    bank = drawn_bank(sd, [concept, Concept("red")], ("{}", "a {}"), **options)
    assert [len(row) for row in bank.rows] == [2, 2, 1, 1]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in concept.images])
    expected = sd.encode(pixels.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(bank.rows[0], expected.detach())
    drawn = drawn_bank(sd, [concept], ("{}",), anchored=True, **options)
    assert torch.equal(drawn.rows[0], generate_latents(sd, ["dog"], steps=1, guidance_scale=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_dit", "tiny_edm_classes"])
def test_pictures_of_any_size_are_framed_as_training_frames_them(request, family, tmp_path):
    model = open_model(request.getfixturevalue(family))
    size = model.render(torch.zeros(1, *model.latent_shape)).shape[-1]
    pixels = (255 * torch.rand(2 * size, 5 * size, 3, generator=torch.Generator().manual_seed(0))).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels[:size, :size]).save(tmp_path / "own.png")
    found = encoded(model, [tmp_path / "wide.png", tmp_path / "own.png"])
    framing = Framing(size, size, center_crop=True)
    images = [framing(Image.open(tmp_path / f"{name}.png"), 0) for name in ("wide", "own")]
    torch.testing.assert_close(images[1], torch.from_numpy(pixels[:size, :size]).permute(2, 0, 1).float() / 255)
    torch.testing.assert_close(found, model.encode(torch.stack(images)).detach())


@pytest.mark.slow
def test_what_is_no_picture_is_named(tiny_sd, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"picture .*a\.png cannot be read"):
        encoded(open_model(tiny_sd), [tmp_path / "a.png"])
    with pytest.raises(ValueError, match=r"There is no picture .*b\.png"):
        encoded(open_model(tiny_sd), [tmp_path / "b.png"])


def test_large_pictures_are_encoded_in_smaller_parts(tmp_path, monkeypatch):
    class Large:
        source, device, latent_shape, encoded = "large", "cpu", (4, 64, 64), []

        def encode(self, images):
            self.encoded.append(len(images))
            return images.new_zeros(len(images), *self.latent_shape)

    monkeypatch.setattr(latent_bank, "framing_of", lambda model, options: Framing(8, 8, center_crop=True))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert len(encoded(Large(), [tmp_path / "a.png"] * 6)) == 6
    assert Large.encoded == [4, 2]
