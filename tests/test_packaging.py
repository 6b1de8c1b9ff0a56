"""The wheel holds everything, and what it installs runs from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("assets", "cli", "configs", "diffusion", "erasure", "evaluation", "pipelines", "training")
# Data at several depths, whatever the assets of the day are.
PROBES = ("assets/probe.json", "assets/probe/unet/probe.safetensors", "assets/probe/tokenizer/probe.txt")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what is packaged: no build/ and no egg-info of earlier builds."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    for probe in PROBES:
        (copy / probe).parent.mkdir(parents=True, exist_ok=True)
        (copy / probe).write_text("{}")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel, built from the source distribution, with the build tools that are installed."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment that holds the wheel, and borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    scripts = folder / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    # Written last, or pip would find this environment's own sublimate and be content. Site folders named in a .pth
    # file do not have their own .pth files read, so an editable install here does not reach there.
    site = Path(
        run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    )
    borrowed = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return scripts


def test_wheel_holds_exactly_the_tree(source: Path, wheel: Path) -> None:
    expected = {
        f"sublimate/{file.relative_to(source).as_posix()}"
        for folder in FOLDERS
        for file in (source / folder).rglob("*")
        if file.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_installed_command_runs_elsewhere(scripts: Path, tmp_path: Path) -> None:
    assert "f_distill" in run(scripts / "sublimate", "methods", cwd=tmp_path)
    assert run(scripts / "python", "-m", "sublimate.cli", "--version", cwd=tmp_path).startswith("sublimate ")


def test_installed_data_is_found(scripts: Path, source: Path, tmp_path: Path) -> None:
    code = """
from importlib import resources
from sublimate.training.config_files import find_config, packaged_configs
import sublimate.training.registry
print(sublimate.training.registry.__file__)
print(*[name for name in packaged_configs() if find_config(name)[0]])
print(*[resources.files("sublimate").joinpath(probe).is_file() for probe in %r])
"""
    origin, names, probes = run(scripts / "python", "-c", code % (PROBES,), cwd=tmp_path).splitlines()
    assert Path(origin).is_relative_to(scripts.parent)
    configs = source / "configs"
    assert names.split() == sorted(
        path.relative_to(configs).with_suffix("").as_posix() for path in configs.rglob("*.yaml")
    )
    assert set(probes.split()) == {"True"}


def test_modules_import_from_the_wheel(scripts: Path, source: Path, tmp_path: Path) -> None:
    modules = [
        "sublimate." + ".".join(file.relative_to(source).with_suffix("").parts)
        for folder in FOLDERS
        for file in (source / folder).rglob("*.py")
        if file.stem not in ("__init__", "__main__")
    ]
    code = f"import importlib\nfor module in {modules}: importlib.import_module(module)"
    run(scripts / "python", "-c", code, cwd=tmp_path, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("launcher", [(), ("-m", "accelerate.commands.launch", "--cpu")])
def test_module_runs_from_the_repository_root(launcher: tuple[str, ...]) -> None:
    assert "f_distill" in run(sys.executable, *launcher, "-m", "sublimate.cli", "methods", cwd=ROOT)
