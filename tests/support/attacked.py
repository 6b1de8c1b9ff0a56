"""What attacks are tried on: a case with pictures of a tiny model's, and a detector that reads how bright they are."""

from typing import ClassVar

import torch

from sublimate.erasure.request import Concept
from sublimate.evaluation.attack import Case
from sublimate.evaluation.audit import make_attacks
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model

TUNED = {"steps": [1, 2], "train_batch_size": 2, "pictures": 2}
STUDENT = ["trainer.max_train_steps=1", "trainer.train_batch_size=2", "objective.critic_updates=1", "data.count=2"]
STUDENT += ["data.teacher_steps=1", "objective.discriminator_width=8", "trainer.checkpointing_steps=null"]

# A new attack adds its row here.
CASES = {
    "added_lora": {},
    "adversarial_prefix": {"tokens": 2, "pictures": 2, "max_train_steps": 2, "train_batch_size": 2},
    "benign_tuning": TUNED,
    "classifier_guidance": {"sampling_steps": 2},
    "completion": {"sampling_steps": 4},
    "distillation": {"overrides": STUDENT},
    "encoder_swap": {},
    "inpainting": {"sampling_steps": 2},
    "latent_search": {"max_train_steps": 2, "surrogate_steps": 1},
    "noise_search": {"levels": [0.5, 2.0], "sampling_steps": 2},
    "paraphrases": {},
    "relearning": TUNED,
    "seed_search": {"seeds": 2},
    "textual_inversion": {"tokens": 2, "pictures": 2, "max_train_steps": 2, "train_batch_size": 2},
    "universal_token": {"max_train_steps": 2, "train_batch_size": 2, "surrogate_steps": 1},
    "word_search": {"tokens": 2, "rounds": 2, "candidates": 2, "images": 2},
}


def attacked(folder):
    """A model that samples in two guided steps."""
    opened = open_model(folder)
    opened.defaults |= {"steps": 2, "guidance_scale": 2.0}
    return opened


def attack_of(name, **options):
    """An attack with its row's options, and others."""
    return make_attacks([name], {name: {**CASES[name], **options}})[0]


class Brightness:
    """Reads bright pictures as one label and dark ones as the other; differentiable."""

    groups: ClassVar = {"animal": ("cat", "dog")}

    def __init__(self, cut=0.5):
        self.cut = cut

    def __call__(self, images):
        bright = torch.sigmoid(50 * (images.mean(dim=(1, 2, 3)) - self.cut))
        return {"animal": torch.stack([bright, 1 - bright, torch.zeros_like(bright)], dim=1)}


def case_of(model, **changes):
    made = Case(
        concept=Concept("cat", anchor="dog", synonyms=("seven",)),
        prompts=("a red cat", "the cat", "a photo of the Cat"),
        pictures=generate(model, ["a cat", "red cat", "cat"], seed=9),
        captions=("a cat", "red cat", "cat"),
        detector=Brightness(),
        group="animal",
        label="cat",
        base=model,
        paraphrases=("a seven",),
        others=("a photo", "the style of van gogh"),
    )
    return Case(**{**vars(made), **changes})
