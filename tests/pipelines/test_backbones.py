"""Each family's adapter against the stock pipeline and against its own network, called directly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from opened import Opened, draw

from sublimate.pipelines.backbones.base import Backbone, backbone_for, known_backbones
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.tokens import concept_span, cut_to_fit

FLUX_FAMILIES = ("tiny_flux", "tiny_flux_schnell")
MASKED_FAMILIES = ("tiny_pixart", "tiny_pixart_sigma", "tiny_sana")
CONCEPT_FAMILIES = (
    "tiny_sd",
    "tiny_sd_v",
    "tiny_inpainting",
    "tiny_upscaling",
    "tiny_sd3",
    "tiny_sdxl",
    "tiny_sdxl_v",
    *FLUX_FAMILIES,
    *MASKED_FAMILIES,
)
TEXT_FAMILIES = (*CONCEPT_FAMILIES, "tiny_audio")
CLASS_FAMILIES = ("tiny_dit", "tiny_edm_classes", "tiny_class_conditional")
FAMILIES = (*TEXT_FAMILIES, *CLASS_FAMILIES, "tiny_unconditional", "tiny_edm")
PROMPTS = ["a red cat", "a painting in the style of van gogh"]
LONG = ["a red cat", " ".join(["cat", "red", "dog", "a", "painting", "of"] * 60)]


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Model]:
    return Opened(request)


def test_every_adapter_is_found_by_its_pipeline_classes():
    assert {"StableDiffusionPipeline", "StableDiffusion3Pipeline", "DDIMPipeline"} <= known_backbones().keys()
    assert all(isinstance(backbone, Backbone) for backbone in known_backbones().values())


def test_an_unknown_family_is_named_together_with_the_known_ones():
    with pytest.raises(ValueError, match=r"KandinskyPipeline is not supported.*StableDiffusionPipeline"):
        backbone_for("KandinskyPipeline")


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["short", "cut"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_prompts_are_encoded_as_the_stock_pipeline_does(models, name, prompts):
    model = models[name]
    with cut_to_fit() as cut:
        ours = model.encode_prompts(prompts)
    assert cut == ({LONG[1]} if prompts == LONG else set())
    if name == "tiny_audio":
        # Stock pads the null prompt to the prompt's length, which changes it; alone it is a prompt like any other.
        for prompt, row in (*((p, ours.index(i)) for i, p in enumerate(prompts)), ("", model.null_condition())):
            t5, mask, generated = model.pipeline.encode_prompt([prompt], "cpu", 1, False)
            torch.testing.assert_close(row["text"], generated, atol=1e-6, rtol=0)
            torch.testing.assert_close(row["text.t5"][:, : t5.shape[1]], t5, atol=1e-6, rtol=0)
            assert (
                torch.equal(row["text.mask"][:, : t5.shape[1]], mask.float()) and row["text.mask"].sum() == mask.sum()
            )
        return
    if name in MASKED_FAMILIES:
        text, mask, null, null_mask = model.pipeline.encode_prompt(prompts, device="cpu")
        assert torch.equal(ours["text.mask"], mask.float())
        assert torch.equal(model.null_condition()["text.mask"], null_mask[:1].float())
    elif name in FLUX_FAMILIES:
        text, pooled, _ = model.pipeline.encode_prompt(prompts, device="cpu", max_sequence_length=24)
        null, null_pooled, _ = model.pipeline.encode_prompt("", device="cpu", max_sequence_length=24)
        torch.testing.assert_close(ours["text.pooled"], pooled, atol=0, rtol=0)
        torch.testing.assert_close(model.null_condition()["text.pooled"], null_pooled, atol=1e-6, rtol=0)
    elif "text.pooled" in ours:
        others = [None] * (len(model.backbone.text_components) - 1)
        text, null, pooled, null_pooled = model.pipeline.encode_prompt(prompts, *others, device="cpu")
        torch.testing.assert_close(ours["text.pooled"], pooled, atol=0, rtol=0)
        torch.testing.assert_close(model.null_condition()["text.pooled"], null_pooled[:1], atol=1e-6, rtol=0)
    else:
        text, null = model.pipeline.encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(ours["text"], text, atol=0, rtol=0)
    torch.testing.assert_close(model.null_condition()["text"], null[:1], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_prompt_that_t5_reads_whole_is_no_long_one_for_sd3(models):
    model, prompt = models["tiny_sd3"], " ".join(["a red cat"] * 20)  # more than a CLIP reads
    with cut_to_fit() as cut:
        ours = model.encode_prompts([prompt])
    assert not cut
    text, _, pooled, _ = model.pipeline.encode_prompt(prompt, None, None, device="cpu")
    assert torch.equal(ours["text"], text) and torch.equal(ours["text.pooled"], pooled)
    assert torch.equal(model.encode_prompts([prompt])["text"], text)
    alone = copy.copy(model.pipeline)
    alone.text_encoder_3 = None
    with pytest.raises(ValueError, match="tokens but the model reads 16"):
        model.backbone.encode_prompts(alone, [prompt])


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_long_prompt_is_refused_by_name(models, name):
    long = " ".join(["cat"] * 400)
    with pytest.raises(ValueError, match=rf"'{long}' has \d+ tokens but the model reads (16|24|80|120|256|300):"):
        models[name].encode_prompts(["a cat", long])


def test_a_single_string_or_nothing_is_refused(models):
    with pytest.raises(TypeError, match="list of prompts"):
        models["tiny_sd"].encode_prompts("a cat")
    with pytest.raises(ValueError, match="no prompt"):
        models["tiny_sd"].encode_prompts([])


def test_an_unconditional_model_reads_no_prompts(models):
    model = models["tiny_unconditional"]
    assert model.encode_prompts(["", ""]) == {}
    assert model.null_condition() == {}
    with pytest.raises(ValueError, match="unconditional"):
        model.encode_prompts(["a cat"])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_is_the_stock_pipelines(models, name):
    model = models[name]
    x0 = 0.5 * draw(model)[0]
    images = model.decode(x0)
    if "vae" not in model.components():
        expected = x0 / 2 + 0.5
    elif name == "tiny_audio":
        expected = model.pipeline.vae.decode(x0 / model.pipeline.vae.config.scaling_factor).sample
        assert torch.equal(model.render(x0), expected)
    else:
        config = model.pipeline.vae.config
        shift = config.get("shift_factor") or 0
        expected = model.pipeline.vae.decode(x0 / config.scaling_factor + shift).sample
        expected = (expected / 2 + 0.5).clamp(0, 1)
        images = images.clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoding_and_decoding_are_differentiable(models, name):
    model = models[name]
    images = torch.rand(1, *model.decode(draw(model)[0]).shape[1:]).requires_grad_()
    latents = model.encode(images)
    assert latents.shape[1:] == model.latent_shape
    model.decode(latents).square().mean().backward()
    assert images.grad is not None
    assert bool((images.grad != 0).any())


def test_latents_have_the_scale_of_the_stock_training_scripts(models):
    # z = (mode - shift) * scale
    model = models["tiny_sd3"]
    images = torch.rand(1, 3, 16, 16)
    mode = model.pipeline.vae.encode(2 * images - 1).latent_dist.mode()
    torch.testing.assert_close(model.encode(images), (mode - 0.0609) * 1.5305, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_x_t_and_the_text(models, name):
    model = models[name]
    x_t, t, condition = draw(model)
    x_t.requires_grad_()
    leaves = {key: value.clone().requires_grad_() for key, value in condition.items() if value.is_floating_point()}
    model.denoiser(x_t, t, condition.replace(**leaves)).x0.square().mean().backward()
    assert all(leaf.grad is not None and bool((leaf.grad != 0).any()) for leaf in (x_t, *leaves.values()))


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_gradients_reach_a_text_encoder_that_trains(models, name):
    model = models[name]
    encoder = model.component("text_encoder_2" if name in ("tiny_sd3", "tiny_audio") else "text_encoder")
    parameter = encoder.get_input_embeddings().weight
    parameter.requires_grad_(True)
    try:
        total = sum(value.square().sum() for value in model.encode_prompts(PROMPTS).values())
        (gradient,) = torch.autograd.grad(total, parameter)
        assert bool((gradient != 0).any())
    finally:
        parameter.requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_modules_outputs_and_leave_no_hooks(models, name):
    model = models[name]
    x_t, t, condition = draw(model)
    taps = model.backbone.feature_taps(model.denoiser.network)
    assert model.feature_taps() == taps[: len(model.feature_taps())] != ()
    prediction = model.denoiser(x_t.requires_grad_(), t, condition, features=taps)
    assert set(prediction.features) == set(taps)
    for feature in prediction.features.values():
        assert len(feature) == 2
        assert feature.requires_grad
    assert not any(module._forward_hooks for module in model.denoiser.network.modules())
    torch.testing.assert_close(prediction.output, model.denoiser(x_t, t, condition).output, atol=0, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_for_features_ends_with_the_last_of_them(models, name, checkpointing):
    model = models[name]
    x_t, t, condition = draw(model)
    taps = model.feature_taps()
    denoiser = copy.deepcopy(model.denoiser).train()
    if checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    found, outputs = [], []
    handle = denoiser.network.register_forward_hook(lambda *_: outputs.append(1))
    for read in (denoiser, denoiser.activations):
        x = x_t.clone().requires_grad_()
        seen = read(x, t, condition, features=taps)
        assert seen.x_t is x and set(seen.features) == set(taps)
        (gradient,) = torch.autograd.grad(sum(f.square().sum() for f in seen.features.values()), x)
        found.append([gradient, *seen.features.values()])
    assert len(outputs) == 1  # the first: the second never came to the network's output
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    handle.remove()
    assert not any(module._forward_hooks for module in denoiser.network.modules())


def test_an_unknown_feature_is_refused_and_leaves_no_hooks(models):
    model = models["tiny_sd"]
    x_t, t, condition = draw(model)
    with pytest.raises(ValueError, match="no module 'attic'"):
        model.denoiser(x_t, t, condition, features=["mid_block", "attic"])
    assert not any(module._forward_hooks for module in model.denoiser.network.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_features_and_gradients_survive_gradient_checkpointing(models, name):
    model = models[name]
    x_t, t, condition = draw(model)
    taps = model.backbone.feature_taps(model.denoiser.network)

    def gradients(checkpointing: bool):
        denoiser = copy.deepcopy(model.denoiser).train().requires_grad_(True)
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        prediction = denoiser(x_t, t, condition, features=taps)
        loss = prediction.x0.square().mean() + sum(f.square().mean() for f in prediction.features.values())
        loss.backward()
        return [p.grad for p in denoiser.parameters() if p.grad is not None]

    plain, saved = gradients(False), gradients(True)
    assert len(plain) == len(saved) > 10
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_condition_that_cannot_be_used_is_refused(models, name):
    model = models[name]
    x_t, t, condition = draw(model)
    with pytest.raises(ValueError, match=r"cannot use the condition's \['extra.mood'\]"):
        model.denoiser(x_t, t, condition.replace(**{"extra.mood": torch.zeros(2)}))
    if model.any_condition():
        with pytest.raises(ValueError, match=r"needs (a text condition|'extra\.)"):
            model.denoiser(x_t, t)


@torch.no_grad()
@pytest.mark.parametrize("name", (*TEXT_FAMILIES, *CLASS_FAMILIES))
def test_text_enters_only_through_the_entry_points(models, name):
    # With the columns that read the text set to zero, the prompt no longer matters.
    model = models[name]
    x_t, t, condition = draw(model)
    network = copy.deepcopy(model.denoiser)
    texts = {key: condition[key] for key in condition.text_keys}
    swapped = {k: torch.randn_like(v) if v.is_floating_point() else v.flip(0) for k, v in texts.items()}
    other = condition.replace(**swapped)
    assert not torch.equal(network(x_t, t, condition).output, network(x_t, t, other).output)
    points = model.text_entry_points()
    assert points
    for point in points:
        assert point.component == model.backbone.network_attribute
        layer = network.network.get_submodule(point.module_name)
        table = isinstance(layer, torch.nn.Embedding)
        columns = (layer.weight.mT if table else layer.weight)[:, point.columns]
        assert columns.shape[1] == (layer.num_embeddings if table else condition[point.key].shape[-1])
        assert (getattr(layer, "bias", None) is not None) == point.bias
        columns.zero_()
    # Equal values are averaged over other tokens where another mask is told, so rounding differs.
    found, expected = network(x_t, t, other).output, network(x_t, t, condition).output
    torch.testing.assert_close(found, expected, atol=1e-6 if "text.mask" in condition else 0, rtol=0)


def test_an_unconditional_model_has_no_entry_points(models):
    assert models["tiny_unconditional"].text_entry_points() == []
    assert models["tiny_unconditional"].prompt_rows("") == ()


def test_concepts_are_found_in_every_tokenizers_rows(models):
    prompt = "a painting of Van Gogh in red"
    (span,) = models["tiny_sd"].find_concept(prompt, "van gogh")
    assert (span.start, span.stop, span.end, span.last) == (4, 6, 8, 16)
    assert (span.rows, span.tail) == (slice(4, 6), slice(4, 16))
    clip, t5 = models["tiny_sd3"].find_concept("a painting of van gogh in red", "Van Gogh")
    assert clip == span
    assert (t5.start, t5.stop, t5.end, t5.last) == (19, 21, 23, 272)
    (t5,) = models["tiny_flux"].find_concept("a painting of van gogh in red", "Van Gogh")
    assert (t5.start, t5.stop, t5.end, t5.last) == (3, 5, 7, 24)


@torch.no_grad()
@pytest.mark.parametrize("name", CONCEPT_FAMILIES)
def test_only_the_tail_of_a_concept_has_seen_it(models, name):
    # CLIP is causal: rows before the concept do not change with it. T5 is not.
    model = models[name]
    one, other = model.encode_prompts(["a red cat in style", "a red dog in style"])["text"]
    span = model.find_concept("a red cat in style", "cat")[0]
    changed = (one != other).any(dim=-1)[: span.last]
    if name not in MASKED_FAMILIES:  # T5 sees the whole prompt, Gemma what came before
        assert changed[: span.start].any() == (name in FLUX_FAMILIES)
    assert changed[span.tail].all()


@pytest.mark.parametrize("name", CONCEPT_FAMILIES)
def test_a_concept_that_does_not_occur_is_an_error(models, name):
    with pytest.raises(ValueError, match="does not mention 'dog'"):
        models[name].find_concept("a red cat", "dog")
    with pytest.raises(ValueError, match="no tokens"):
        models[name].find_concept("a red cat", "")


@pytest.mark.parametrize("name", CONCEPT_FAMILIES)
def test_concepts_are_whole_words(models, name):
    with pytest.raises(ValueError, match="does not mention 'cat'"):
        models[name].find_concept("a catx", "cat")


def test_a_word_that_goes_on_is_another_word_for_t5_too(models):
    # "▁cat" and "x" are tokens of their own there, so the tokens of "cat" do occur.
    tokenizer = models["tiny_sd3"].pipeline.tokenizer_3
    assert tokenizer.tokenize("catx") == ["▁cat", "x"]
    with pytest.raises(ValueError, match="does not mention 'cat'"):
        concept_span(tokenizer, "a catx", "cat", 256)
    assert concept_span(tokenizer, "a catx, a cat", "cat", 256).rows == slice(5, 6)
    # The first letters alike, in another case and inside another word, are no mention.
    prompt = "a CATx, a cat"
    (found,) = tokenizer(prompt).input_ids[concept_span(tokenizer, prompt, "cat", 256).rows]
    assert tokenizer.decode(found) == "cat"


def test_prompt_rows_leave_out_start_and_end(models):
    (span,) = models["tiny_sd"].prompt_rows("a red cat")
    assert (span.start, span.stop, span.end) == (1, 4, 4)
    (empty,) = models["tiny_sd"].prompt_rows("")
    assert (empty.start, empty.stop, empty.end) == (1, 1, 1)
    assert models["tiny_sd3"].prompt_rows("a red cat")[1].rows == slice(16, 19)


def test_image_sizes(models):
    model = models["tiny_sd"]
    assert model.backbone.latent_shape(model.pipeline, 24, 32) == (4, 12, 16)
    with pytest.raises(ValueError, match="multiple of 2 pixels, not 23"):
        model.backbone.latent_shape(model.pipeline, 23)
    pixels = models["tiny_unconditional"]
    with pytest.raises(ValueError, match="8x8 pixels only"):
        pixels.backbone.latent_shape(pixels.pipeline, 16)


@torch.no_grad()
def test_a_guidance_distilled_unet_is_told_the_scale_as_in_the_stock_pipeline(tiny_sd: Path):
    model = open_model(tiny_sd)
    unet = type(model.pipeline.unet).from_config(model.pipeline.unet.config, time_cond_proj_dim=7)
    model.pipeline.unet = unet
    model = Model(model.pipeline, "lcm")
    x_t, t, condition = draw(model)
    scale = torch.tensor([8.0, 1.0])
    told = model.pipeline.get_guidance_scale_embedding(scale - 1, embedding_dim=7)
    expected = unet(x_t, t, encoder_hidden_states=condition["text"], timestep_cond=told).sample
    ours = model.denoiser(x_t, t, condition.replace(guidance=scale))
    torch.testing.assert_close(ours.output, expected, atol=1e-6, rtol=0)
    unguided = model.denoiser(x_t, t, condition).output
    assert torch.equal(unguided[1], ours.output[1])
    assert not torch.equal(unguided[0], ours.output[0])
