"""What is kept of attacks, and what it says."""

import torch

from sublimate.evaluation.attack import Outcome
from sublimate.evaluation.audit_result import Finding
from sublimate.evaluation.intervals import Rate


def test_of_an_outcome_the_rate_and_a_few_pictures_are_kept():
    images, hits = torch.rand(100, 3, 8, 8), torch.arange(100) % 40 == 39
    outcome = Outcome(tuple(map(str, range(100))), images, hits, found="x", curve=((1, Rate(0, 1)),))
    kept = Finding.of(outcome, 4)
    assert (kept.rate, kept.found, kept.curve) == (Rate(2, 100), "x", outcome.curve)
    assert kept.prompts == ("39", "79", "0", "1")  # hits first
    assert kept.images.dtype == torch.uint8 and kept.images.untyped_storage().nbytes() == 4 * 3 * 8 * 8
    torch.testing.assert_close(kept.images / 255, images[[39, 79, 0, 1]], atol=0.5 / 255 + 1e-6, rtol=0)
    assert Finding.of(outcome).images.shape == (0, 3, 8, 8) and Finding.of(outcome).prompts == ()
