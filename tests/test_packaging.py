"""The wheel, the sdist and the editable install hold every package, and importing kvmlx has no effects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES: list[str] = SETTINGS["packages"]
MAPPED: dict[str, str] = SETTINGS["package-dir"]
FRAMEWORKS = {"mlx", "mlx_lm", "torch", "triton", "transformers"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


SELFTEST = """
from kvmlx import selftest
from kvmlx.backends.numpy import BACKEND
what = [check for check in selftest.checks_for(BACKEND, quick=True) if check.primitive == "affine"]
assert what and all(outcome.problem is None for outcome in selftest.run(BACKEND, what))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that builds leave nothing in the real one and take nothing stale from it."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("kvmlx", *MAPPED.values()):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def artifacts(checkout: Path) -> dict[str, Path]:
    out = checkout.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", out, cwd=checkout)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz")), "editable": checkout}


def fresh_venv(folder: Path) -> Path:
    """Return the Python of a new environment that sees this one's dependencies, but not its kvmlx."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A path in a .pth file comes last and has its own .pth files, such as an editable kvmlx's, ignored.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_every_package_imports_from_a_fresh_environment(kind: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    python = fresh_venv(tmp_path / "venv")
    pip = f"-m pip --python {python} install -q --no-deps --no-index --no-build-isolation --ignore-installed"
    run(sys.executable, *pip.split(), *(["-e"] if kind == "editable" else []), artifacts[kind], cwd=tmp_path)

    script = f"""
import importlib, importlib.resources, pathlib, kvmlx
for name in {PACKAGES!r}:
    importlib.import_module(name)
assert importlib.resources.files("kvmlx").joinpath("py.typed").is_file()
print(*sorted(p.name for p in importlib.resources.files("kvmlx.metal_kernels").iterdir()
              if p.name.endswith(".metal")))
print(*sorted(p.name for p in importlib.resources.files("kvmlx.vectors").iterdir()
              if p.name.endswith(".safetensors")))
from kvmlx import checks
assert all(checks.cases_of(name) for name in checks.CHECKS)
print(pathlib.Path(kvmlx.__file__).parent)
"""
    kernels, vectors, where = run(python, "-I", "-c", script, cwd=tmp_path).splitlines()
    assert kernels.split() == sorted(path.name for path in (ROOT / "metal_kernels").glob("*.metal"))
    assert vectors.split() == sorted(path.name for path in (ROOT / "tests" / "vectors").glob("*.safetensors"))
    assert Path(where).is_relative_to(artifacts["editable"] if kind == "editable" else tmp_path / "venv")
    command = tmp_path / "venv" / "bin" / "kvmlx"
    assert command.exists()
    if kind == "wheel":
        # The whole chain on the vectors that were installed; the doctor's own tests run all of it.
        run(python, "-I", "-c", SELFTEST, cwd=tmp_path)


def test_every_package_folder_is_listed() -> None:
    found = set()
    for name, folder in {"kvmlx": "kvmlx", **MAPPED}.items():
        for path, _, files in os.walk(ROOT / folder):  # does not follow the links in kvmlx/
            if "__init__.py" in files:
                found.add(".".join((name, *Path(path).relative_to(ROOT / folder).parts)))
    assert sorted(found) == sorted(PACKAGES)


def test_links_point_to_the_mapped_folders() -> None:
    for name, folder in MAPPED.items():
        link = ROOT / name.replace(".", "/")
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"


def test_backends_have_one_name() -> None:
    script = """
import sys, kvmlx.backends, kvmlx.metal_kernels
print({"backends", "metal_kernels"} & sys.modules.keys())"""
    assert run(sys.executable, "-c", script, cwd=ROOT) == "set()\n"


def test_import_loads_no_framework_and_prints_nothing() -> None:
    script = f"import sys, kvmlx; loaded = {FRAMEWORKS!r} & sys.modules.keys(); assert not loaded, loaded"
    assert run(sys.executable, "-W", "error", "-c", script, cwd=ROOT) == ""
