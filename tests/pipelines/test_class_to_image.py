"""DiT and pixel UNets with classes, against the stock pipelines and their own networks."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, UNet2DModel
from students import student_of, with_lora

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.export import export_lora, export_student, save_model
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sampling import image_generator

CLASSES = ["cat", "dog", "van gogh", "999"]


def pixels(folder, **options) -> Model:
    """The model with a fresh UNet of other options."""
    pipeline = open_model(folder).pipeline
    pipeline.unet = UNet2DModel.from_config(pipeline.unet.config, **options)
    return Model(pipeline, "odd")


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_draws_as_the_stock_pipeline(tiny_dit, scale):
    model = open_model(tiny_dit)
    ours = generate(model, CLASSES, steps=4, guidance_scale=scale, seed=9)
    pipeline = model.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(9, i) for i in range(len(CLASSES))]
    call = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "pt"}
    stock = pipeline(class_labels=[0, 1, 6, 999], generator=generators, **call)
    torch.testing.assert_close(ours, stock.images, atol=2e-6, rtol=0)


@torch.no_grad()
def test_only_the_prediction_of_a_learned_variance_is_read(tiny_dit):
    model = open_model(tiny_dit)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([900, 300])
    whole = model.pipeline.transformer(x_t, timestep=t, class_labels=torch.tensor([0, 999])).sample
    assert whole.shape[1] == 8
    assert torch.equal(model.denoiser(x_t, t, model.encode_prompts(["cat", "999"])).eps, whole[:, :4])


@torch.no_grad()
def test_no_class_is_the_one_after_the_last(tiny_dit):
    model = open_model(tiny_dit)
    assert model.null_condition()["text"].tolist() == [1000]
    assert model.encode_prompts([""])["text"].dtype == torch.int64
    drawn = generate(model, 2, steps=1, guidance_scale=1)
    assert torch.equal(drawn, generate(model, ["", ""], steps=1, guidance_scale=1))


@torch.no_grad()
def test_a_network_that_trains_drops_no_classes_of_its_own(tiny_dit):
    # Stock drops one class in ten, in every block others, by the global generator.
    model = open_model(tiny_dit)
    x_t, told = torch.randn(1, 4, 8, 8).expand(64, -1, -1, -1), Condition(text=torch.zeros(64, dtype=torch.long))
    student = copy.deepcopy(model.denoiser).train()
    state = torch.get_rng_state()
    output = student(x_t, 500, told).output
    torch.testing.assert_close(output, model.denoiser(x_t, 500, told).output, atol=1e-6, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_size_is_drawn(tiny_dit):
    model = open_model(tiny_dit)
    assert model.backbone.latent_shape(model.pipeline, 16, 16) == (4, 8, 8)
    with pytest.raises(ValueError, match="16x16 pixels only, not 32x16"):
        model.backbone.latent_shape(model.pipeline, 32)


@pytest.mark.parametrize("write", [save_model, lambda model, to: export_student(model, student_of(model), to)])
def test_names_of_classes_survive_saving(tiny_dit, tmp_path, write):
    # Stock pipelines forget them.
    model = open_model(tiny_dit)
    folder = write(model, tmp_path / "saved")
    assert DiTPipeline.from_pretrained(folder).get_label_ids(["Felis catus", "a dog"]) == [0, 1]
    again = open_model(folder)
    assert again.encode_prompts(["felis catus", ""])["text"].tolist() == [0, 1000]
    with pytest.raises(ValueError, match="'crane' names the classes 8, 9"):
        again.encode_prompts(["crane"])
    assert "pipeline(class_labels=[0]" in (folder / "README.md").read_text()


def test_a_guided_student_of_other_than_a_thousand_classes_is_refused(tiny_dit):
    model = open_model(tiny_dit)
    model.pipeline.transformer.register_to_config(num_embeds_ada_norm=10)
    few = FewSteps("consistency", steps=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="takes 1000 for no class and this model 10"):
        model.backbone.few_steps(model.pipeline, few)
    assert model.backbone.few_steps(model.pipeline, FewSteps("consistency", steps=2)).few_steps.steps == 2


def test_dit_loads_no_lora(tiny_dit, tmp_path):
    model = open_model(tiny_dit)
    with pytest.raises(ValueError, match="DiTPipeline loads no LoRA"):
        export_lora(model, with_lora(model, {}), tmp_path / "lora")


@pytest.mark.parametrize("name", ["tiny_dit", "tiny_edm_classes", "tiny_class_conditional"])
def test_a_concept_is_a_class(request, name):
    model = open_model(request.getfixturevalue(name))
    assert model.find_concept("3", "3") == ()
    with pytest.raises(ValueError, match="'3' does not mention '4'"):
        model.find_concept("3", "4")


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_edm_classes", "tiny_class_conditional"])
def test_a_pixel_model_is_told_its_class_and_nothing_for_none(request, name):
    model = open_model(request.getfixturevalue(name))
    assert model.null_condition() == {}
    x_t, t = torch.randn(1, 3, 8, 8), model.schedule.t_max
    outputs = [model.denoiser(x_t, t, model.encode_prompts([prompt])).output for prompt in ("3", "4")]
    assert not torch.equal(*outputs)
    with pytest.raises(ValueError, match="needs a text condition: encode a class, '0' to '9'"):
        model.denoiser(x_t, t)
    with pytest.raises(ValueError, match="no class for no class"):
        generate(model, 2, steps=1)
    with pytest.raises(ValueError, match="no text to guide by: set guidance_scale to 1"):
        generate(model, ["3"], steps=1, guidance_scale=2)
    # Away from another class it can be guided.
    one, other = (generate_latents(model, [c], steps=1, sampler="one_step") for c in ("3", "4"))
    led = generate_latents(model, ["3"], steps=1, sampler="one_step", guidance_scale=2, negative_prompt="4")
    torch.testing.assert_close(led, 2 * one - other, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_classes_may_be_told_as_numbers(tiny_edm_classes):
    model = pixels(tiny_edm_classes, class_embed_type="timestep")
    x_t, told = torch.randn(2, 3, 8, 8), model.encode_prompts(["3", "4"])
    sigma = torch.tensor([2.0, 3.0], dtype=torch.float64)
    network_time = 250 * sigma.log().float()
    x_in = x_t / (sigma.float().view(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
    expected = model.pipeline.unet(x_in, network_time, class_labels=torch.tensor([3, 4])).sample
    torch.testing.assert_close(model.denoiser(x_t, sigma, told).output, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="embeds classes as numbers here, without a table to edit"):
        model.text_entry_points()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_embed_type": "identity"}, "is told embeddings, which no prompt names"),
        ({"class_embed_type": "timestep", "num_class_embeds": None}, "needs num_class_embeds"),
    ],
)
def test_what_no_prompt_can_name_is_refused(tiny_edm_classes, options, message):
    with pytest.raises(ValueError, match=message):
        pixels(tiny_edm_classes, **options).encode_prompts(["3"])


def test_students_are_saved_where_a_stock_pipeline_passes_classes_on(
    tiny_edm_classes, tiny_class_conditional, tmp_path
):
    model = open_model(tiny_edm_classes)
    folder = export_student(model, student_of(model), tmp_path / "student")
    assert "pipeline(class_labels=0, num_inference_steps=1)" in (folder / "README.md").read_text()
    model = open_model(tiny_class_conditional)
    with pytest.raises(ValueError, match="DDIMPipeline cannot pass class labels"):
        export_student(model, student_of(model), tmp_path / "other")
