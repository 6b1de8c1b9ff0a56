"""SLUG: one step along one gradient of one layer of the text encoder, whose length is searched for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure.concept_pairs import ConceptPairs, forget_loss, retain_loss
from sublimate.erasure.contrastive import CLIPPair, Pair, trained_pair
from sublimate.erasure.eraser import Changes, Eraser
from sublimate.erasure.fine_tuning import refuse_student
from sublimate.erasure.latent_bank import LatentBankConfig, drawn_bank
from sublimate.erasure.layer_choice import pareto_front, scored_layers
from sublimate.erasure.probes import DetectorJudge, PairJudge, Prober
from sublimate.erasure.request import Concept, Request, Templates
from sublimate.erasure.step_search import Probe, Ray, best_probe, bracketed_search
from sublimate.erasure.text_student import TextStudent, select_text, text_encoders
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.training.players import PlayerConfig
from sublimate.training.randomness import key as keyed

log = logging.getLogger(__name__)


class SLUGConfig(LatentBankConfig):
    """Options of SLUG; the search's are those of the authors' for Stable Diffusion.

    Attributes:
        clip: the CLIP checkpoint (folder or hub id) whose text tower the model reads with; None trains a small pair of
            towers on the pictures instead (`erasure/contrastive.py`).
        templates: prompts with `{}` that concepts, erased and preserved, are put in.
        sampling_steps, start_guidance: of the probes' pictures too.
        pair_steps: of the pair's training, if there is one.
        layers: search on the "deepest" layer of the Pareto front (theirs for diffusion), or on every layer of the
            "front", of which the best probe wins (theirs for CLIP).
        probe_images: pictures per concept that a probe draws and reads.
        first_step: lambda_0 |G_f| / |theta|, the relative length of the first step; the longest is ten times that.
        max_probes: steps tried per layer, at most.
        max_left: share of the erased concepts' pictures that may still show them.
        max_lost: share of the preserved concepts' pictures that may cease to show them.

    `images` are `LatentBankConfig`'s.
    """

    clip: str | None = None
    templates: Templates = ("{}", "a {}", "a photo of a {}")
    images: int = Field(default=8, ge=1)
    sampling_steps: int = Field(default=100, ge=1)
    start_guidance: float = Field(default=9.0, ge=1)
    pair_steps: int = Field(default=300, ge=1)
    layers: Literal["deepest", "front"] = "deepest"
    probe_images: int = Field(default=3, ge=1)
    first_step: float = Field(default=0.1, gt=0)
    max_probes: int = Field(default=11, ge=1)
    max_left: float = Field(default=0.0, ge=0, lt=1)
    max_lost: float = Field(default=0.1, ge=0, lt=1)


class SLUG(Eraser):
    """Single Layer Unlearning Gradient (Cai et al. 2025).

    With L_f = mean(1 - cos) over pictures and prompts of what is erased and L_r = InfoNCE over what is preserved, both
    gradients G_f and G_r are taken once. Of the layers l on the Pareto front of large |G_f[l]| / |theta[l]| and small
    |cos(G_f[l], G_r[l])|, the deepest becomes

        theta'[l] = theta[l] + lambda G_f[l],   lambda > 0

    Erasing has to raise L_f, and L_f(theta + lambda G_f) = L_f + lambda |G_f|^2 to first order, hence the sign; that
    the loss does rise is verified. (The authors' script for Stable Diffusion subtracts this very gradient, summed over
    prefixes of its batches.) The relative length lambda |G_f[l]| / |theta[l]| is searched for
    (`erasure/step_search.py`) with pictures drawn at every probe, which the detector reads, if one is given, and else
    the pair itself (`erasure/probes.py`).
    """

    Config = SLUGConfig
    paper: ClassVar[str] = "2407.11867"
    uses_detector = True
    uses_images = True
    uses_kept_images = True

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        config: SLUGConfig = self.config
        refuse_student(model)
        kept = _kept(request)
        concepts, some = [*request.erase, *kept], len(request.erase)
        # A concept without a label ends the run before anything is drawn.
        read = None if detector is None else DetectorJudge(model, detector, concepts)
        student = TextStudent(model, select_text(text_encoders(model), "mlp-attn"), PlayerConfig())
        pictures = drawn_bank(model, concepts, config.templates, config, seed=seed)
        pairs = ConceptPairs(model, concepts, config.templates, pictures)
        with torch.no_grad():
            states = pairs.states(model.encode_prompts)
        pair = self._pair(model, pairs, states, seed)
        images = pairs.embedded(pair)

        def losses() -> tuple[Tensor, Tensor]:
            told = pairs.states(student.encode_prompts)
            return forget_loss(pair, images[:some], told[:some]), retain_loss(pair, images[some:], told[some:])

        weights = student.player.trainable()
        forget, retain = _gradients(student, losses)
        front = pareto_front(scored_layers(weights, forget, retain))
        prober = Prober(
            Model(student.pipeline, model.source, model.defaults),
            read or PairJudge(pair, states),
            pairs.phrases,
            erased=some,
            images=config.probe_images,
            steps=config.sampling_steps,
            guidance_scale=config.start_guidance,
            seed=keyed(seed, "probes"),
        )
        before = prober.rates()
        if before[0] <= config.max_left:
            sees = f"The {prober.judge.name} sees the concept in {100 * before[0]:g} % of the model's own pictures"
            if read is not None:
                raise ValueError(f"{sees}, so no step can show that it is gone: give other templates or no detector.")
            log.warning("%s, so no step can show that it is gone: give a detector.", sees)
        rays = {
            layer: Ray(weights, forget, layer.weights) for layer in (front if config.layers == "front" else front[:1])
        }
        found = {layer: self._search(ray, losses, prober, before[1]) for layer, ray in rays.items()}
        best = best_probe([probe for probe, _ in found.values()])
        if best.missing:
            shares = (100 * best.left, 100 * best.kept)
            log.warning(
                "No probe is good enough; the best leaves %g %% of the concept and keeps %g %% of others.", *shares
            )
        layer = next(layer for layer, (probe, _) in found.items() if probe is best)
        outcome = {
            "layer": layer.name,
            "front": [candidate.name for candidate in front],
            "step": best.step,
            "lambda": best.step * rays[layer].unit,
            "judge": prober.judge.name,
            "before": list(before),
            "after": [best.left, best.kept],
            "probes": {
                candidate.name: [[p.step, p.left, p.kept] for p in seen] for candidate, (_, seen) in found.items()
            },
        }
        return Changes(student.keyed(rays[layer].at(best.step)), outcome=outcome)

    def _pair(self, model: Model, pairs: ConceptPairs, states: Sequence[Tensor], seed: int) -> Pair:
        config: SLUGConfig = self.config
        if config.clip is not None:
            return CLIPPair(model, config.clip)
        return trained_pair(pairs.pictures, states, steps=config.pair_steps, seed=seed)

    def _search(
        self, ray: Ray, losses: Callable[[], tuple[Tensor, Tensor]], prober: Prober, kept_before: float
    ) -> tuple[Probe, list[Probe]]:
        """The best step along one layer's gradient, and all that were tried."""
        config: SLUGConfig = self.config

        def probe(step: float) -> tuple[float, float]:
            with ray.moved(step):
                return prober.rates()

        with torch.no_grad():
            here = losses()[0]
            with ray.moved(config.first_step / 100):
                there = losses()[0]
        if not there > here:
            raise ValueError(f"The loss of what is erased does not rise along its gradient ({here:.6g}, {there:.6g}).")
        return bracketed_search(
            probe,
            config.first_step,
            10 * config.first_step,
            max_left=config.max_left,
            min_kept=kept_before - config.max_lost,
            probes=config.max_probes,
        )


def _gradients(
    student: TextStudent, losses: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """G_f and G_r by name, zero where a loss does not read a weight."""
    student.player.set_trainable(True)
    weights = student.player.trainable()
    found = []
    values = losses()
    for i, value in enumerate(values):
        gradients = torch.autograd.grad(value, list(weights.values()), retain_graph=i == 0, materialize_grads=True)
        found.append(dict(zip(weights, gradients, strict=True)))
    student.player.set_trainable(False)
    return found[0], found[1]


def _kept(request: Request) -> list[Concept]:
    """What L_r is over: the preserved concepts, and the anchors among no concept's names.

    Raises:
        ValueError: for fewer than two, between which there is nothing to tell apart.
    """
    known = {name.lower() for concept in (*request.erase, *request.preserve) for name in concept.names}
    anchors = {concept.anchor for concept in request.erase if concept.anchor} - {""}
    kept = [*request.preserve, *(Concept(anchor) for anchor in sorted(anchors) if anchor.lower() not in known)]
    if len(kept) < 2:
        raise ValueError(
            "slug needs two or more concepts to keep, which its gradient is compared with: preserve some."
        )
    return kept
