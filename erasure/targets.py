"""What a student should predict instead of a concept, as functions of predictions at the same x_t and t.

Every target here is an affine combination of predictions whose coefficients add up to one, so it is the same target
whether the network predicts eps, v, a velocity or x0, and it is formed on the network's own output. The *loss* is not
the same: |v - v'|^2 = |eps - eps'|^2 / alpha^2 and |x0 - x0'|^2 = (sigma/alpha)^2 |eps - eps'|^2, a factor of 214 at
the noisiest step of Stable Diffusion (alpha = 0.068). `squared_error` therefore takes the space by name.

The predictions that enter a target are those of a *frozen* network in ESD, and of the *current* one without gradient
in concept ablation; a function here does not know which it was given, the method says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from sublimate.diffusion.predictions import Prediction

Space = Literal["output", "eps", "x0", "v"]
"""In which quantity predictions are compared: the network's own output, the noise, the clean image, or v."""


def negative_guidance(null: Prediction, concept: Prediction, eta: float) -> Prediction:
    """y_null - eta (y_c - y_null): guidance away from the concept (ESD, Gandikota et al. 2023, arXiv 2303.07345).

    Args:
        null: the prediction without text.
        concept: the prediction for the concept.
        eta: the paper's strength; 0 is the plain null target. The authors' rewrite of 2025 starts from y_c instead of
            y_null, so its number is this one plus 1 (`paper_eta`).
    """
    return within(null, concept, null, eta)


def within(context: Prediction, concept: Prediction, null: Prediction, eta: float) -> Prediction:
    """y_w - eta (y_c - y_null): takes the concept out of a context ("glasses" out of "scientist") and leaves the rest.

    Args:
        context: the prediction for the context, which is what the student is then trained under.
        concept: the prediction for the concept.
        null: the prediction without text.
        eta: strength.
    """
    return replace(context, output=context.output - eta * (concept.output - null.output))


def paper_eta(rewrite_eta: float) -> float:
    """ESD's strength as the paper counts it, from the number of the authors' rewrite of 2025.

    The rewrite's y_c - e (y_c - y_null) equals y_null - (e - 1)(y_c - y_null).
    """
    return rewrite_eta - 1


def squared_error(student: Prediction, target: Prediction, space: Space = "output") -> Tensor:
    """|student - target|^2 per sample in the given space, a mean over elements: (batch,), float32.

    Args:
        student: what is trained.
        target: carries no gradient.
        space: the quantity that is compared.
    """
    return _mean_square(getattr(student, space) - getattr(target, space).detach())


def guidance_error(
    student: Prediction,
    student_null: Prediction,
    anchor: Prediction,
    null: Prediction,
    space: Space = "output",
    *,
    detach_null: bool = False,
) -> Tensor:
    """|(u - n) - (u*_a - n*)|^2 per sample: compares guidance terms alone (All but One, arXiv 2312.12807).

    u and n are the student's predictions for the concept and without text, * marks the frozen network's. Moving both
    of the student's branches alike costs nothing here, so the null branch needs a pin: `keep.frozen_error`.

    Args:
        student: u.
        student_null: n.
        anchor: u*_a.
        null: n*; with anchor = null the target is no guidance at all.
        space: the quantity that is compared.
        detach_null: keep this term from pushing the null branch. The minimiser with a pin is the same, but without
            this the null branch drifts at first, by up to 0.28 of the edit's size.

    Returns:
        (batch,), float32.
    """
    n = getattr(student_null, space)
    guidance = getattr(student, space) - (n.detach() if detach_null else n)
    return _mean_square(guidance - (getattr(anchor, space) - getattr(null, space)).detach())


def _mean_square(difference: Tensor) -> Tensor:
    return difference.float().square().flatten(1).mean(1)
