"""Image-to-image unlearning: what the encoders are shown, what is compared, what trains, and who is refused."""

import pytest
import torch
from erasing import disturb
from PIL import Image

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.latent_bank import LatentBank
from sublimate.erasure.methods.image_to_image import ImageToImage, ImageToImageConfig, ImageToImageObjective
from sublimate.erasure.picture_noise import PictureNoise
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.features import unet_code
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat"), preserve=["seven", "red"])
SMALL = {"images": 3, "sampling_steps": 1, "start_guidance": 1.0, "train_batch_size": 4, "learning_rate": 1e-3}
MASK, MASKED = "extra.mask", "extra.masked"


@pytest.fixture(scope="module")
def inpainting(tiny_inpainting):
    return open_model(tiny_inpainting)


def start(model, request=CAT, n=6, **options):
    objective = ImageToImageObjective(model, ImageToImageConfig(**SMALL, **options), request)
    (turn,) = objective.turns(0)
    with torch.no_grad():
        batch = objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, "student", range(n))), 0)
    return objective, turn, batch


def codes(denoiser, x_t, t, condition, names):
    """The encoder's outputs from a whole pass of the network."""
    return denoiser(x_t, t, condition, features=names).features


def mean_error(ours, theirs):
    return torch.stack([(ours[name] - theirs[name]).square().mean() for name in ours]).mean()


@pytest.mark.slow
def test_the_loss_is_its_formula(inpainting):
    objective, turn, batch = start(inpainting, retain=0.7, alpha=0.4, text_dropout=0.0)
    disturb(objective)
    names = unet_code(inpainting.denoiser.network)
    student = objective.student
    text = inpainting.encode_prompts(["cat"] * 6)
    kept = inpainting.encode_prompts([("seven", "red")[row] for row in batch["kept_rows"].tolist()])

    def told(words, shown):
        return words.replace(**{key: batch[f"{shown}/{key}"] for key in (MASK, MASKED)})

    with torch.no_grad():
        loss = objective.loss(turn, batch, 0)
        forget = mean_error(
            codes(student, batch["x_t"], batch["t"], told(text, "shown"), names),
            codes(inpainting.denoiser, batch["x_t"], batch["t"], told(text, "noise"), names),
        )
        drift = mean_error(
            *(
                codes(d, batch["kept_x_t"], batch["kept_t"], told(kept, "kept"), names)
                for d in (student, inpainting.denoiser)
            )
        )
    assert min(forget, drift) > 1e-5
    torch.testing.assert_close(loss.logs["forget"], forget)
    torch.testing.assert_close(loss.logs["retain"], drift)
    torch.testing.assert_close(loss.total, 0.4 * forget + 0.7 * drift)


@pytest.mark.slow
def test_pictures_and_noise_are_shown_through_the_same_hole(inpainting):
    objective, _, batch = start(inpainting)
    assert torch.equal(batch[f"shown/{MASK}"], batch[f"noise/{MASK}"])
    assert len({mask.numpy().tobytes() for mask in batch[f"shown/{MASK}"]}) > 1
    assert (batch[f"shown/{MASKED}"] - batch[f"noise/{MASKED}"]).abs().max() > 1e-2
    # x_t is the concept's own picture, whatever is shown.
    pictures = generate_latents(inpainting, ["cat"] * 3, steps=1, guidance_scale=1.0)
    c = inpainting.schedule.at(batch["t"])
    alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in (c.alpha, c.sigma))
    random = SampleRandom(0, 0, "student", range(6))
    rows, _ = objective.erased.draw(random), random.uniform()
    x0 = objective.pictures.draw(rows, random, "cpu")
    assert all(any(torch.equal(latent, picture) for picture in pictures) for latent in x0)
    torch.testing.assert_close(batch["x_t"], alpha * x0 + sigma * random.normal(inpainting.latent_shape))
    shown = inpainting.show(images=inpainting.render(x0), masks=torch.ones(6, 1, 16, 16))
    everything = batch[f"shown/{MASK}"].flatten(1).min(1).values == 1
    assert everything.any() and not everything.all()
    torch.testing.assert_close(batch[f"shown/{MASKED}"][everything], shown[MASKED][everything], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_text_is_dropped_for_some(inpainting):
    objective, _, batch = start(inpainting, n=40, text_dropout=0.3)
    told = objective.told(batch, objective.erased, "shown")
    null, cat = (inpainting.encode_prompts([prompt])["text"][0] for prompt in ("", "cat"))
    dropped = sum(torch.allclose(text, null) for text in told["text"])
    assert dropped == int(batch["dropped"].sum()) and 4 < dropped < 22
    assert sum(torch.allclose(text, cat) for text in told["text"]) == 40 - dropped


@pytest.mark.slow
def test_only_the_encoder_trains_and_all_of_it(inpainting):
    edit = ImageToImage(**SMALL, max_train_steps=2).fit(inpainting, CAT)
    parts = {key.split("/")[1].split(".")[0] for key in edit.values}
    assert parts == {"conv_in", "down_blocks", "mid_block"}
    before = inpainting.parameters()
    moved = [key for key, value in edit.values.items() if not torch.equal(value, before[key])]
    assert len(moved) > 0.9 * len(edit.values)


def test_the_codes_are_all_that_the_way_up_is_given(inpainting):
    unet, given = inpainting.denoiser.network, {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kw, i=i: given.update({i: kw}), with_kwargs=True)
        for i, block in enumerate(unet.up_blocks)
    ]
    x_t, cat = torch.randn(1, *inpainting.latent_shape), inpainting.encode_prompts(["cat"])
    names = unet_code(unet)
    found = codes(inpainting.denoiser, x_t, 500.0, cat, names)
    for hook in hooks:
        hook.remove()
    skips = [skip for i in sorted(given, reverse=True) for skip in given[i]["res_hidden_states_tuple"]]
    assert len(skips) == len(names) - 1
    for name, skip in zip(names, skips, strict=False):
        assert torch.equal(found[name], skip), name
    assert torch.equal(found["mid_block"], given[0]["hidden_states"])


def test_the_frozen_encoder_gets_no_gradient_and_the_middle_alone_is_an_option(inpainting):
    objective, turn, batch = start(inpainting, code="middle", retain=0.0)
    assert objective.taps == ("mid_block",) and objective.kept is None
    objective.player.set_trainable(True)
    loss = objective.loss(turn, batch, 0)
    loss.total.backward()
    assert all(p.grad is None for p in inpainting.denoiser.parameters())
    assert loss.logs.keys() == {"forget"}


@pytest.mark.slow
@pytest.mark.parametrize("proxy", [False, True])
def test_training_brings_the_codes_to_those_of_noise(tiny_inpainting, tmp_path, proxy):
    model = open_model(tiny_inpainting)
    with torch.no_grad():  # random weights hardly look at what is shown
        model.denoiser.network.conv_in.weight[:, 5:].mul_(30)
    Image.new("RGB", (16, 16), (255, 40, 0)).save(tmp_path / "cat.png")
    Image.new("RGB", (16, 16), (60, 60, 60)).save(tmp_path / "red.png")
    cat, red = (Concept(name, images=(tmp_path / f"{name}.png",)) for name in ("cat", "red"))
    request = Request(cat, preserve=() if proxy else [red])
    objective, turn, batch = start(model, request, n=32)
    with torch.no_grad():
        before = objective.loss(turn, batch, 0)
    edit = ImageToImage(**SMALL | {"max_train_steps": 60, "train_batch_size": 8}).fit(model, request)
    with torch.no_grad():
        for name, parameter in objective.player.trainable().items():
            parameter.copy_(edit.values[f"unet/{name.removeprefix('network.')}"])
        after = objective.loss(turn, batch, 0)
    assert float(before.logs["retain"]) == 0
    assert float(after.logs["forget"]) < 0.9 * float(before.logs["forget"])
    assert float(after.total) < 0.97 * float(before.total)


def test_nothing_preserved_is_stood_in_for_by_what_is_drawn_unasked(inpainting):
    objective, _, _ = start(inpainting, Request("cat"))
    drawn = generate_latents(inpainting, [""] * 3, steps=1, guidance_scale=1.0)
    assert torch.equal(objective.other_pictures.rows[0], drawn)


def test_noise_has_the_colours_of_the_pictures(inpainting):
    latents = torch.randn(5, *inpainting.latent_shape, generator=torch.Generator().manual_seed(0))
    noise = PictureNoise(inpainting, LatentBank([latents[:2], latents[2:]]), batch_size=2)
    pixels = inpainting.render(latents).double().movedim(1, -1).flatten(0, -2).detach()
    torch.testing.assert_close(noise.mean, pixels.mean(0))
    torch.testing.assert_close(noise.covariance, torch.cov(pixels.mT, correction=0))
    drawn = noise.draw(SampleRandom(0, 0, "noise", range(400)), (16, 16)).double().movedim(1, -1).flatten(0, -2)
    scale = float(noise.covariance.abs().max())
    torch.testing.assert_close(drawn.mean(0), noise.mean, rtol=0, atol=0.02 * scale**0.5)
    torch.testing.assert_close(torch.cov(drawn.mT), noise.covariance, rtol=0, atol=0.02 * scale)


@pytest.mark.slow
def test_upscalers_are_shown_small_pictures(tiny_upscaling, tmp_path):
    model = open_model(tiny_upscaling)
    for name in ("cat", "red"):
        pixels = (255 * torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(len(name)))).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    cat, red = (Concept(name, images=(tmp_path / f"{name}.png",)) for name in ("cat", "red"))
    _, _, batch = start(model, Request(cat, preserve=[red]))
    assert torch.equal(batch["shown/extra.noise_level"], batch["noise/extra.noise_level"])
    assert not torch.equal(batch["shown/extra.low_res"], batch["noise/extra.low_res"])
    edit = ImageToImage(**SMALL, max_train_steps=1).fit(model, Request(cat, preserve=[red]))
    assert {key.split("/")[1].split(".")[0] for key in edit.values} == {"conv_in", "down_blocks", "mid_block"}
    with pytest.raises(ValueError, match=r"give pictures .* of 'red'"):
        ImageToImage(**SMALL).fit(model, Request(cat, preserve=["red"]))
    with pytest.raises(ValueError, match="preserve a concept with pictures"):
        ImageToImage(**SMALL).fit(model, Request(cat))


def test_models_that_are_shown_nothing_are_refused(tiny_sd):
    with pytest.raises(ValueError, match="is shown no pictures"):
        ImageToImage(**SMALL).fit(open_model(tiny_sd), CAT)
