"""Methods are found by their file names, described without importing them, and loaded by convention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest

from sublimate.training import registry


class Base:
    """What the methods of the test package derive from."""

    paper: ClassVar[str]


FILES = {
    "__init__.py": '"""Methods."""\n',
    "_shared.py": "raise RuntimeError('never imported')\n",
    "alpha.py": (
        '"""The first\nmethod.\n\nMore about it."""\n'
        "from typing import ClassVar\n"
        "import base_of_methods\n"
        "class _Helper(base_of_methods.Base): paper = 'none'\n"
        "class Config: pass\n"
        "class Alpha(base_of_methods.Base):\n    paper: ClassVar[str] = '2502.15681'\n"
        "PUBLIC = Alpha\n"
    ),
    "beta.py": '"""The second."""\nfrom methods_found.alpha import *\nPAPER = "1"\nclass Beta(Alpha): paper = PAPER\n',
    "broken.py": '"""Breaks when imported."""\nraise RuntimeError("imported")\n',
    "silent.py": '"""Names no paper."""\nimport base_of_methods\nclass Silent(base_of_methods.Base): pass\n',
    "empty.py": '"""Defines nothing."""\nfrom methods_found.alpha import Alpha\n',
    "folder/__init__.py": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in FILES.items():
        path = tmp_path / "methods_found" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "base_of_methods", sys.modules[__name__])
    yield "methods_found"
    for name in [name for name in sys.modules if name.split(".")[0] == "methods_found"]:
        del sys.modules[name]


def test_available_lists_files_without_importing_them(package: str) -> None:
    assert registry.available(package) == ["alpha", "beta", "broken", "empty", "silent"]
    assert f"{package}.alpha" not in sys.modules


def test_load_finds_the_class_that_the_file_defines(package: str) -> None:
    assert registry.load(package, "alpha", Base).__name__ == "Alpha"
    assert registry.load(package, "beta", Base).__name__ == "Beta"


def test_unknown_name_lists_the_nearest_and_all(package: str) -> None:
    with pytest.raises(
        ValueError, match=r"no method 'alfa' .*; did you mean 'alpha'\? Available: alpha, beta, broken, e"
    ):
        registry.load(package, "alfa", Base)
    with pytest.raises(ValueError, match=r"no method 'os' in methods_found; available: alpha, "):
        registry.load(package, "os", Base)


def test_file_without_its_class(package: str) -> None:
    with pytest.raises(TypeError, match=r"empty must define exactly one public Base, and defines none\.$"):
        registry.load(package, "empty", Base)


def test_a_class_that_lacks_what_its_base_declares(package: str) -> None:
    with pytest.raises(TypeError, match=r"silent\.Silent must define paper\.$"):
        registry.load(package, "silent", Base)


def test_two_classes(package: str, tmp_path: Path) -> None:
    (tmp_path / "methods_found" / "two.py").write_text(
        "import base_of_methods\nclass A(base_of_methods.Base): pass\nclass B(base_of_methods.Base): pass\n"
    )
    with pytest.raises(TypeError, match=r"and defines A, B\.$"):
        registry.load(package, "two", Base)


def test_card_is_read_without_importing(package: str) -> None:
    assert registry.card(package, "alpha") == registry.MethodCard("alpha", "2502.15681", "The first method.")
    assert registry.card(package, "beta").paper == "1"
    assert registry.card(package, "broken") == registry.MethodCard("broken", "", "Breaks when imported.")
