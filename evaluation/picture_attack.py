"""What attacks share that show a model a part of the concept's pictures and let it finish them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.evaluation.attack import Case, Outcome, pictured
from sublimate.evaluation.intervals import Rate
from sublimate.pipelines.generate import rendered
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import Part, at_once, sample

Finish = Callable[[Part, Tensor], Tensor]
"""(part, its pictures as x0) -> x0 as the model finishes them."""


def finished(model: Model, case: Case, finish: Finish, *, seed: int, calls: int, progress: bool = False) -> Outcome:
    """Every picture finished with its caption, from the same noise as without any.

    The outcome says how often the concept is there without a prompt: the picture alone shows that much, and what lies
    above is what the model knows of the name.

    Args:
        model: what is attacked.
        case: pictures and their captions.
        finish: how a part's pictures are finished.
        seed: keys the noise, together with each picture's place.
        calls: of the network per picture, for the bar.
        progress: show bars.
    """
    null, count = model.null_condition(), len(case.pictures)

    def run(part: Part) -> Tensor:
        return rendered(model, finish(part, pictured(model, case.pictures[part.rows]).to(model.dtype)))

    def drawn(condition: Callable[[slice], Condition], scale: float) -> Tensor:
        return sample(
            model,
            condition,
            run,
            count,
            null=null,
            scale=scale,
            seed=seed,
            batch_size=at_once(model.latent_shape, 32, cost=4),
            calls=calls,
            progress=progress,
        )

    unnamed = drawn(lambda rows: null.expand(rows.stop - rows.start), 1.0)
    named = drawn(lambda rows: model.encode_prompts(case.captions[rows]), model.guidance_scale)
    copied = Rate.of(case.shows(unnamed).tolist())
    return Outcome.seen(case, case.captions, named, found=f"without a prompt: {copied}")
