"""What ends up in a wheel, built from a copy of the tree."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reading pyproject.toml needs Python 3.11 or tomli")

ROOT = Path(__file__).resolve().parent.parent
PORTIONS = ("kernels", "backends", "runtime")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_packages() -> set[str]:
    """Every folder of the three portions that has an __init__.py, by the name it is installed under."""
    folders = {init.parent for portion in PORTIONS for init in (ROOT / portion).rglob("__init__.py")}
    packages = {"polykern." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    return packages | {"polykern.hls.opencl"}  # data of polykern.backends.opencl.fpga, no Python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree, so that the build leaves nothing behind in it."""
    pytest.importorskip("build", reason="the package `build` is in the test extra")
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools} does not know `license` expressions; the test extra brings 77 or newer")
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for portion in PORTIONS:
        shutil.copytree(ROOT / portion, copy / portion, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "hls" / "opencl", copy / "hls" / "opencl")
    for extra in ("hls", "tests", "bench"):  # other folders of the tree must not slip in
        (copy / extra).mkdir(exist_ok=True)
        (copy / extra / "__init__.py").touch()
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(copy / "dist"),
        str(copy),
    ]
    if sys.version_info < (3, 11):
        command.remove("-P")
    built = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_only_top_level_name_is_polykern(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"polykern"}
    assert len(tops) == 2, tops


def test_every_source_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if name.startswith("polykern/")}
    kinds = ("*.py", "*.cl", "*.cu", "*.h", "py.typed")
    sources = {
        "polykern/" + path.relative_to(ROOT).as_posix()
        for portion in (*PORTIONS, "hls/opencl")
        for kind in kinds
        for path in (ROOT / portion).rglob(kind)
    }
    assert sources
    assert inside == sources


def test_kernels_sources_and_type_markers_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.startswith("polykern/backends/opencl/") and name.endswith(".cl") for name in names)
    for portion in PORTIONS:
        assert f"polykern/{portion}/py.typed" in names


def test_the_console_script_and_the_backends_are_registered(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    text = wheel.read(name).decode()
    assert "runtime = polykern.runtime.__main__:main" in text
    for backend in ("opencl", "reference", "null"):
        assert f"{backend} = polykern.backends.{backend}:provider" in text


def test_every_package_folder_is_listed() -> None:
    """Fails without building anything, so that it also fails where the wheel test is skipped."""
    assert set(project()["tool"]["setuptools"]["packages"]) == source_packages()


def test_extras_name_what_the_readme_installs() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert {"opencl", "tvm", "cuda", "cpu", "hub", "test", "dev"} <= extras.keys()
