"""What the README's grid makes of the matrices' results."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "grid.py"

REPORT = """<testsuites><testsuite>
<testcase name="test_it_trains[uce-tiny_sd]" />
<testcase name="test_it_saves[uce-last-tiny_sd]" />
<testcase name="test_it_trains[uce-tiny_sd3]" />
<testcase name="test_it_trains[uce-last-tiny_sd]"><skipped message="{skip}" /></testcase>
<testcase name="test_every_method_has_a_row" />
</testsuite></testsuites>"""
SKIP = "/tmp/x/tiny_sd0 has no CLIP text encoder to move: use an eraser that moves the denoiser."


@pytest.fixture(scope="module")
def grid():
    spec = importlib.util.spec_from_file_location("benchmarks_grid", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outcomes_are_those_of_one_family(grid, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT.format(skip=SKIP))
    found = grid.read_outcomes(tmp_path / "report.xml", "tiny_sd")
    said = "This model has no CLIP text encoder to move: use an eraser that moves the denoiser."
    assert found == {"uce": "", "uce-last": said}
    failing = REPORT.format(skip=SKIP).replace('[uce-tiny_sd]" />', '[uce-tiny_sd]"><failure /></testcase>')
    (tmp_path / "report.xml").write_text(failing)
    with pytest.raises(SystemExit, match=r"test_it_trains\[uce-tiny_sd\] fails"):
        grid.read_outcomes(tmp_path / "report.xml", "tiny_sd")


def test_a_method_fits_where_all_of_its_rows_do(grid):
    refused = "It cannot."
    assert grid.judged({"uce": "", "uced": refused}, "uce") == ""
    assert grid.judged({"uce": refused, "uce-last": refused}, "uce") == refused
    assert grid.judged({"uce": "", "uce-last": refused}, "uce") == "with some of its options; else: It cannot."
    assert grid.judged({"uced": ""}, "uce").startswith("not run")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("A UNet2DConditionModel cannot be told a time.", "This network cannot be told a time."),
        ("An AnyTransformer2DModel reads two texts.", "This network reads two texts."),
        ("AnyPipeline loads no LoRA.", "The stock pipeline loads no LoRA."),
        ("No call of AnyPipeline guides it.", "No call of the stock pipeline guides it."),
        ("It works in one encoder; /x/tiny_dit0 has none: use another.", "It works in one encoder: use another."),
        ("/x/y/tiny_sd_v12 is shown no pictures.", "This model is shown no pictures."),
        ("No text enters /x/y/tiny_edm0, so there is none.", "No text enters this model, so there is none."),
    ],
)
def test_sentences_name_no_checkpoint(grid, refusal, said):
    assert grid.sentence(refusal) == said
