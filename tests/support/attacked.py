"""What attacks are tried on: a case with pictures of a tiny model's, and a detector that reads how bright they are."""

from typing import ClassVar

import torch

from sublimate.erasure.request import Concept
from sublimate.evaluation.attack import Case
from sublimate.pipelines.generate import generate


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
