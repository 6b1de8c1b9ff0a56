"""Everything runs on a device that is not the CPU's, without a tensor of the CPU among its own."""

from pathlib import Path

import pytest
from checkpoints import modules
from grid import matrix
from processes import launch

SUPPORT = Path(__file__).parent / "support"

MIXED = """
import torch
from card import card
from sublimate.pipelines.placement import brought_to

with card() as device:
    x = torch.ones(2, device=device)
    assert x.device == device and (x * 2 + 1).cpu().tolist() == [3, 3]
    wrong = [
        lambda: x + torch.ones(2),
        lambda: torch.ones(2).add_(x),
        lambda: torch.cat([x, torch.ones(2)]),
        lambda: torch.nn.Linear(2, 2)(x),
        lambda: torch.randn(2, device=device, generator=torch.Generator()),
        lambda: x.numpy(),
    ]
    layer = torch.nn.Linear(2, 2).to(device)
    for function in (layer, layer.forward):
        assert function(brought_to(function, torch.ones(1, 2))).device == device
    assert brought_to(len, x) is x
    for work in wrong:
        try:
            work()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("two devices met")
"""

# By default: one row for each way to go about it, on one family, and families that are told unlike things.
ROWS = {
    "images": ("",),
    "objective": ("f_distill-lora", "em_distillation", "consistency_trajectory", "speedupnet-consistency"),
    "eraser": ("uce", "slug", "adv_unlearn", "interpret_then_deactivate"),
    "attack": ("textual_inversion", "latent_search"),
}
DRAWN = ("tiny_sdxl", "tiny_flux")


def pytest_generate_tests(metafunc):
    if "row" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--families")
    named = modules() if asked == "all" else asked.split(",") if asked else ()
    if named:
        every = {"images": ("",), "objective": matrix("training/test_objectives").CASES}
        every["eraser"] = matrix("erasure/test_erasers").CASES
        chosen = [(family, what, row) for family in named for what, names in every.items() for row in names]
    else:
        chosen = [("tiny_sd", what, row) for what, names in ROWS.items() for row in names]
        chosen += [(family, "images", "") for family in DRAWN]
    metafunc.parametrize(("family", "what", "row"), chosen)


@pytest.mark.slow
def test_it_says_on_a_card_what_it_says_on_the_cpu(request, family, what, row):
    code = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import on_card; on_card.{what}(*sys.argv[1:])"
    launch(code, request.getfixturevalue(family), *([row] if row else []))


@pytest.mark.slow
def test_a_tensor_of_the_cpu_is_refused_there():
    launch(f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n{MIXED}")
