"""l1-sparse unlearning: denoising on what is preserved, the penalty that fades, and nothing of what is erased."""

import pytest
import torch
from erasing import disturb

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.methods.l1_sparse import L1Sparse, L1SparseConfig, L1SparseObjective
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat"), preserve=["seven", "red"])
SMALL = {"images": 2, "sampling_steps": 1, "start_guidance": 1.0, "train_batch_size": 4, "weights": "x"}


@pytest.fixture(scope="module")
def sd(tiny_sd_v):
    return open_model(tiny_sd_v)


def start(model, **options):
    objective = L1SparseObjective(model, L1SparseConfig(**SMALL, **options), CAT)
    disturb(objective)
    (turn,) = objective.turns(0)
    return objective, turn, objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, "s", range(4))), 0)


def test_gamma_falls_from_alpha_to_nothing_and_stays_there():
    config = L1SparseConfig(l1=0.2, l1_steps=4)
    assert [config.gamma(step) for step in range(6)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0, 0])


@pytest.mark.parametrize("step", [0, 3, 9])
def test_the_loss_is_denoising_on_preserved_pictures_and_the_penalty(sd, step):
    objective, turn, batch = start(sd, l1=0.2, l1_steps=8, retain=0.7)
    pictures = generate_latents(sd, ["seven"] * 2 + ["red"] * 2, steps=1, guidance_scale=1.0)
    for x0, row in zip(batch["kept_x0"], batch["kept_rows"].tolist(), strict=True):
        assert any(torch.equal(x0, picture) for picture in pictures[2 * row : 2 * row + 2])
    told = sd.encode_prompts([("seven", "red")[row] for row in batch["kept_rows"].tolist()])
    with torch.no_grad():
        loss = objective.loss(turn, batch, step)
        prediction = objective.student(batch["kept_x_t"], batch["kept_t"], told)
        kept = denoising_loss(prediction, batch["kept_x0"], batch["kept_eps"]).mean()
        weights = [p for name, p in objective.student.named_parameters() if ".attn2.to_" in name]
        norm = sum(float(p.abs().sum()) for p in weights)
    assert kept > 1e-3 and norm > 10
    assert float(loss.total) == pytest.approx(float(0.7 * kept) + 0.2 * max(0, 1 - step / 8) * norm, rel=1e-6)


@pytest.mark.slow
def test_weights_shrink(sd):
    options = {**SMALL, "max_train_steps": 20, "learning_rate": 1e-3}

    def norm(l1):
        return sum(float(v.abs().sum()) for v in L1Sparse(**options, l1=l1, l1_steps=20).fit(sd, CAT).values.values())

    assert norm(0.1) < 0.97 * norm(0.0)


@pytest.mark.slow
def test_the_erased_concept_takes_no_part(sd):
    options = {**SMALL, "max_train_steps": 2}
    a, b = (L1Sparse(**options).fit(sd, Request(Concept(name), preserve=["red"])) for name in ("cat", "dog"))
    assert all(torch.equal(a.values[key], value) for key, value in b.values.items())


def test_nothing_preserved_is_refused(sd):
    with pytest.raises(ValueError, match="name concepts to preserve"):
        L1Sparse(**SMALL).fit(sd, Request("cat"))
    with pytest.raises(ValueError, match="retain"):
        L1SparseConfig(retain=0)
