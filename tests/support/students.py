"""Students with weights of their own, and what a stock pipeline has to draw with them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from pictures import shown_to

from sublimate.diffusion.samplers import one_step
from sublimate.diffusion.schedules import RectifiedFlow
from sublimate.pipelines.backbones.flux1 import Flux1, packed, unpacked
from sublimate.pipelines.few_steps import FewSteps, sample_few_steps
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import telling
from sublimate.pipelines.sound import waveforms

SEEDS = (11, 12)
PROMPTS = ("a red cat", "a painting in the style of van gogh")
# Of one length, since a stock audio pipeline pads, and padding changes what its language model says.
SOUNDS = ("a red cat", "a red dog")
# Of models whose classes have no names.
CLASSES = ("3", "8")

# Family, start of the student; None is the schedule's end.
STUDENTS = {
    "tiny_sd": None,
    "tiny_sd@399": 399,
    "tiny_sd_v": None,
    "tiny_sd_v@750": 750,
    "tiny_inpainting": None,
    "tiny_inpainting@399": 399,
    "tiny_upscaling": None,
    "tiny_upscaling@750": 750,
    "tiny_unconditional": None,
    "tiny_unconditional@120": 120,
    "tiny_edm": None,
    "tiny_edm@2.5": 2.5,
    "tiny_edm_classes": None,
    "tiny_dit": None,
    "tiny_dit@399": 399,
    "tiny_sd3": None,
    "tiny_sd3@0.75": 0.75,
    "tiny_sdxl": None,
    "tiny_sdxl_v@750": 750,
    "tiny_flux": None,
    "tiny_flux@0.75": 0.75,
    "tiny_flux_schnell": None,
    "tiny_audio": None,
    "tiny_audio@399": 399,
    "tiny_pixart": None,
    "tiny_pixart@399": 399,
    "tiny_pixart_sigma": None,
    "tiny_sana": None,
    "tiny_sana@0.75": 0.75,
}

# Students of several steps; "told" ones are told the guidance scale.
FEW_STEP_STUDENTS = {
    "tiny_sd#consistency": FewSteps("consistency", grid_steps=50),
    "tiny_sd_v#target_driven": FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7),
    "tiny_sd#times": FewSteps("target_driven", steps=3, eta=0.2, times=(999, 875, 251), guidance_scale=2.0),
    "tiny_sd#deterministic": FewSteps("target_driven", grid_steps=250),
    "tiny_sd#one": FewSteps("target_driven", steps=1, eta=0.2, grid_steps=250, guidance_scale=3.0),
    "tiny_sd#told": FewSteps("consistency", steps=2, grid_steps=50, guidance_scale=8.0),
    "tiny_inpainting#times": FewSteps("target_driven", steps=3, eta=0.2, times=(999, 875, 251), guidance_scale=2.0),
    "tiny_upscaling#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_unconditional#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_edm#consistency": FewSteps("consistency", steps=3, grid_steps=18),
    "tiny_edm#one": FewSteps("consistency", steps=1),
    "tiny_edm_classes#consistency": FewSteps("consistency", steps=3, grid_steps=18),
    "tiny_dit#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_dit#guided": FewSteps("consistency", steps=3, grid_steps=50, guidance_scale=2.0),
    "tiny_sd3#deterministic": FewSteps("target_driven", steps=3, grid_steps=50, guidance_scale=2.0),
    "tiny_sd3#consistency": FewSteps("consistency", steps=3),
    "tiny_sdxl#told": FewSteps("consistency", steps=2, grid_steps=50, guidance_scale=8.0),
    "tiny_sdxl_v#times": FewSteps("target_driven", steps=3, eta=0.2, times=(999, 875, 251), guidance_scale=2.0),
    "tiny_flux#told": FewSteps("target_driven", steps=3, grid_steps=50, guidance_scale=4.5),
    "tiny_flux#consistency": FewSteps("consistency", steps=3),
    "tiny_flux_schnell#deterministic": FewSteps("target_driven", steps=2),
    "tiny_audio#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_audio#target_driven": FewSteps("target_driven", eta=0.3, grid_steps=250),
    "tiny_pixart#consistency": FewSteps("consistency", grid_steps=50),
    "tiny_pixart#one": FewSteps("target_driven", steps=1, eta=0.2, grid_steps=250, guidance_scale=3.0),
    "tiny_sana#deterministic": FewSteps("target_driven", steps=3, grid_steps=50, guidance_scale=2.0),
    "tiny_sana#consistency": FewSteps("consistency", steps=3),
    "tiny_pixart_sigma#times": FewSteps("target_driven", steps=3, eta=0.2, times=(999, 875, 251), guidance_scale=2.0),
}
GLOBAL_SEED = 13


def student_of(model: Model):
    """The base's denoiser with other weights, far enough that the base itself would fail the comparison."""
    student = copy.deepcopy(model.denoiser)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def stock_draws(model: Model):
    """What the stock pipeline is told, its initial noise, and what it draws further noise with."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw(shape):
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])

    condition = model.encode_prompts(prompts_of(model) or [""] * len(SEEDS))
    condition = condition.replace(**shown_to(model, len(SEEDS), draw))
    z = draw(model.latent_shape)
    if model.backbone.shown == "masks":
        draw(model.latent_shape)  # it samples the posterior of the masked image
    return condition, z, draw


@torch.no_grad()
def images_of(model: Model, student, t: float | None) -> torch.Tensor:
    condition, z, _ = stock_draws(model)
    return displayed(model, one_step(lambda x, t: student(x, t, condition), z, model.schedule, t))


def displayed(model: Model, x0: torch.Tensor) -> torch.Tensor:
    """What the stock pipeline returns: images, or waveforms."""
    media = model.render(x0)
    return waveforms(model, media)[0] if model.backbone.medium == "audio" else media


@torch.no_grad()
def few_step_images_of(model: Model, student, few: FewSteps) -> torch.Tensor:
    condition, z, draw = stock_draws(model)
    torch.manual_seed(GLOBAL_SEED)

    # Pipelines that prepare arguments of the scheduler's step give it their generators, others draw from the global.
    own = hasattr(model.pipeline, "prepare_extra_step_kwargs") or not isinstance(model.schedule, RectifiedFlow)

    def noise(x):
        if isinstance(model.backbone, Flux1):  # whose stock pipeline adds noise to the packed latents
            return unpacked(torch.randn(packed(x).shape), *x.shape[2:])
        if type(model.pipeline).__name__ == "DiTPipeline":
            # Guided, it samples both halves of its batch, and keeps the first.
            return torch.randn((2 if few.guidance_scale > 1 else 1) * len(x), *x.shape[1:])[: len(x)]
        return draw(x.shape[1:]) if own else torch.randn(x.shape)

    denoise = telling(student, condition, model.null_condition(), few.guidance_scale)
    return displayed(model, sample_few_steps(few, denoise, z, model.schedule, noise))


def few_step_student_of(model: Model, name: str):
    """A student with other weights; "told" ones have a number input, in which nothing is zero."""
    student = student_of(model)
    if name.endswith("#told"):
        student.network, student.reads_guidance = model.backbone.with_number_input(student.network), True
        for parameter in student.network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(7))
    return student


def prompts_of(model: Model) -> list[str]:
    """As many as there are `SEEDS`; none for an unconditional model."""
    if not model.any_condition():
        return []
    if model.backbone.medium == "audio":
        return list(SOUNDS)
    return list(PROMPTS if model.null_condition() else CLASSES)


def stock_prompts(model: Model) -> dict[str, Any]:
    """The same as arguments of the stock pipeline's call."""
    if model.backbone.text_components:
        return {"prompt": prompts_of(model)}
    accepted = inspect.signature(type(model.pipeline).__call__).parameters
    told = {"batch_size": len(SEEDS)} if "batch_size" in accepted else {}
    if prompts_of(model):
        told["class_labels"] = model.encode_prompts(prompts_of(model))["text"].tolist()
    return told


def with_lora(model: Model, ranks: dict[str, int]):
    """A student with non-zero adapters of mixed rank and a scale other than 1."""
    tree = copy.deepcopy(model.denoiser)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern=ranks)
    tree = inject_adapter_in_model(config, tree)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in tree.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return tree
