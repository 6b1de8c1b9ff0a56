"""The rules of the house: layers, declared packages, file sizes and names, checked on the source itself."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import diffusers.pipelines
import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("diffusion", "pipelines", "training", "erasure", "evaluation", "cli")
FOLDERS = (*LAYERS, "assets", "configs")
DIFFUSION_MAY_IMPORT = sys.stdlib_module_names | {"torch", "sublimate"}
# `--help`, `methods` and configuration errors answer at once: what they need loads nothing heavy.
LIGHT = {"cli", "training/config.py", "training/config_files.py", "training/registry.py"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "torchmetrics", "scipy", "sklearn", "numpy"}

FILES = sorted(path.relative_to(ROOT).as_posix() for folder in LAYERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import below a node; names imported from a package count as its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def import_violation(layer: str, name: str) -> str | None:
    """What is wrong with importing `name` in a file of `layer`; None when nothing is."""
    parts = name.split(".")
    if name.startswith("."):
        return "is relative: write sublimate.<folder>..."
    if parts[0] in FOLDERS:
        return f"imports a second copy: write sublimate.{name}"
    if layer == "diffusion" and parts[0] not in DIFFUSION_MAY_IMPORT:
        return "is not torch: diffusion needs nothing else"
    if parts[0] == "sublimate" and parts[1] in LAYERS and LAYERS.index(parts[1]) > LAYERS.index(layer):
        return f"goes rightwards: {layer} stands before {parts[1]}"
    return None


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_imports_go_one_way() -> None:
    wrong = [
        f"{file}:{line}: import of {name} {problem}"
        for file in FILES
        for line, name in imports(parse(file))
        if (problem := import_violation(file.split("/")[0], name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("layer", "name", "allowed"),
    [
        ("training", "sublimate.pipelines.model.Model", True),
        ("training", "sublimate.training.losses", True),
        ("training", "sublimate.erasure.request", False),
        ("diffusion", "math", True),
        ("diffusion", "numpy", False),
        ("pipelines", "numpy", True),
        ("pipelines", "..model", False),
        ("cli", "training.losses", False),
        ("erasure", "sublimate.assets", True),
    ],
)
def test_the_import_rule_itself(layer: str, name: str, allowed: bool) -> None:
    assert (import_violation(layer, name) is None) == allowed


@pytest.mark.slow
def test_tests_import_absolutely() -> None:
    wrong = [
        f"{file}:{line}: {name}"
        for file in TESTS
        for line, name in imports(parse(file))
        if name.startswith(".") or name.split(".")[0] in FOLDERS
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    holding_python = {
        "sublimate." + ".".join(path.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert set(declared["packages"]) == holding_python
    assert declared["package-dir"] == {f"sublimate.{folder}": folder for folder in FOLDERS}


def test_every_package_has_an_init_of_one_docstring() -> None:
    for folder in {path.parent for root in FOLDERS for path in (ROOT / root).rglob("*.py")}:
        init = folder / "__init__.py"
        assert init.is_file(), f"{folder} needs an __init__.py"
        body = ast.parse(init.read_text()).body
        assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), f"{init} holds more than a docstring"


def test_links_lead_to_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / ".links" / "sublimate" / folder).resolve() == ROOT / folder


@pytest.mark.slow
def test_every_file_starts_with_a_docstring() -> None:
    missing = [file for file in FILES + TESTS if not ast.get_docstring(parse(file))]
    assert not missing, missing


def test_no_file_is_long() -> None:
    lengths = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in FILES + TESTS}
    assert not {file: lines for file, lines in lengths.items() if lines > 400}


def test_no_file_is_called_utils() -> None:
    assert not [file for file in FILES + TESTS if Path(file).stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.slow
def test_no_asserts_outside_tests() -> None:
    found = [
        f"{file}:{node.lineno}" for file in FILES for node in ast.walk(parse(file)) if isinstance(node, ast.Assert)
    ]
    assert not found, found


def test_light_modules_import_nothing_heavy_at_the_top() -> None:
    light = [file for file in FILES if file in LIGHT or file.split("/")[0] in LIGHT]
    wrong = [
        f"{file}:{line}: {name}"
        for file in light
        for node in parse(file).body
        for line, name in imports(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name.split(".")[0] in HEAVY
    ]
    assert not wrong, wrong


def test_the_command_starts_without_torch() -> None:
    code = f"import sys, sublimate.cli.__main__; sys.exit(' '.join({HEAVY} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_folder_is_named_like_one_of_diffusers() -> None:
    # diffusers records a saved component's module by the name of its folder, and mistakes such a folder for its own.
    taken = {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__) if module.ispkg}
    assert {"flux", "dit", "stable_diffusion"} <= taken
    ours = {part for file in FILES for part in Path(file).parent.parts}
    assert not ours & taken
