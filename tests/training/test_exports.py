"""What the objectives' rows train, stock diffusers draws: on every family that they do not refuse."""

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
    metafunc.parametrize(("case", "family"), rows(metafunc, OBJECTIVES.CASES, OBJECTIVES.FAMILIES))


def test_a_stock_pipeline_draws_what_a_row_trains(request, case, family):
    model = opened(request.getfixturevalue(family))
    artefact = OBJECTIVES.make(model, case).exports()
    with refusals(*REASONS):
        check_export(model, artefact)
