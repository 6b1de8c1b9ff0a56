"""What the objectives' rows train, stock diffusers draws: on every family that they do not refuse."""

import pytest
from grid import matrix, opened, refusals, rows

from sublimate.training.distill import check_export

OBJECTIVES = matrix("training/test_objectives")

# Why no stock pipeline draws a student: it cannot pass what the student is told, loads no LoRA, samples otherwise.
REASONS = (
    "loads no LoRA",
    "cannot be told eta",
    "jumps with eta",
    "guides a network by two passes",
    "pads its null prompt",
    "no stock pipeline runs this student",
)


def pytest_generate_tests(metafunc):
    if "reason" in metafunc.fixturenames:
        return
    metafunc.parametrize(("case", "family"), rows(metafunc, OBJECTIVES.CASES, OBJECTIVES.FAMILIES))


def test_a_stock_pipeline_draws_what_a_row_trains(request, case, family):
    model = opened(request.getfixturevalue(family))
    artefact = OBJECTIVES.make(model, case).exports()
    with refusals(*REASONS):
        check_export(model, artefact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "family", "reason"),
    [
        ("f_distill-lora", "tiny_dit", "DiTPipeline loads no LoRA"),
        ("target_driven-full", "tiny_sd3", "jumps with eta 0.2"),
        ("f_distill", "tiny_class_conditional", "no stock pipeline runs this student"),
    ],
    ids=["lora", "eta", "classes"],  # of no family: they are no part of the grid
)
def test_what_none_draws_is_refused(request, case, family, reason):
    model = opened(request.getfixturevalue(family))
    with pytest.raises(ValueError, match=reason):
        check_export(model, OBJECTIVES.make(model, case).exports())
