"""`--backend auto`: which candidate is taken and why, what is remembered, and when it is measured anew."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugins import GOOD, Install
from polykern.kernels.errors import BackendUnavailable
from polykern.runtime import choice, measure, opening
from polykern.runtime.choice import Speed, ask, choose, recall
from polykern.runtime.cli import main
from polykern.runtime.config import ModelConfig
from polykern.runtime.gguf import GGUFFile
from polykern.runtime.opening import open_for_model
from polykern.runtime.output import NOTE
from polykern.runtime.settings import Settings
from tiny_llama import valid_llama_gguf

RUNTIME = (sys.executable, "-m", "polykern.runtime")


class World:
    """Two plug-ins that open, with made-up speeds (decode, prompt), and the reference."""

    def __init__(self, model: str) -> None:
        self.settings = Settings(model)
        self.speeds: dict[str, tuple[float, float] | str] = {"steady": (100, 1000), "swift": (200, 800)}
        self.asked: list[str] = []

    def measure(self, settings: Settings, _: Any) -> tuple[Speed, str]:
        self.asked.append(settings.backend)
        found = self.speeds[settings.backend]
        if isinstance(found, str):
            return Speed(settings.backend, problem=found), ""
        return Speed(settings.backend, "null", "", *map(float, found)), "2 of 2"

    def open(self, ctx: int = 256, **changes: Any) -> str:
        """The name of the backend that "auto" opens."""
        settings = replace(self.settings, **changes)
        config = ModelConfig.from_gguf(GGUFFile.open(settings.model))
        backend, _ = open_for_model(settings, config, ctx, measure=self.measure)
        return backend.name


@pytest.fixture
def world(
    nothing_else: None,
    install: Install,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> World:
    install("acme-steady", "steady", GOOD.format(order=-2), site="a")
    install("acme-swift", "swift", GOOD.format(order=-1), site="b")
    monkeypatch.setenv("POLYKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "load", lambda: 0.0)
    caplog.set_level(NOTE, "polykern")
    return World(model)


def remembered(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache/choices").glob("*.json")
    return file


def test_the_fastest_is_taken_and_remembered(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert world.open() == "swift"
    assert world.asked == ["steady", "swift"]
    assert caplog.messages == [
        f"auto chose swift, 200 tok/s decode, 800 prompt (steady 100, 1000), remembered in {remembered(tmp_path)}"
    ]
    caplog.clear()
    assert world.open() == "swift"
    assert world.asked == ["steady", "swift"]
    assert caplog.messages == []
    caplog.set_level(logging.DEBUG, "polykern")
    world.open()
    assert caplog.messages[0].startswith("auto: swift, 200 tok/s decode, 800 prompt (steady 100, 1000), as found on 20")


@pytest.mark.parametrize(
    ("steady", "swift", "taken"),
    [
        ((100, 2000), (200, 500), "swift"),  # decoding takes most of the time
        ((200, 500), (210, 100), "steady"),  # but not all of it
        ((100, 1000), (102, 1020), "steady"),  # equal: the lower order
        ((102, 1020), (100, 1000), "steady"),
        ((100, 1000), (104, 1040), "swift"),
        ("no driver", (1, 1), "swift"),
    ],
)
def test_the_rule(world: World, steady: Any, swift: Any, taken: str) -> None:
    world.speeds = {"steady": steady, "swift": swift}
    assert world.open() == taken


def test_a_candidate_that_fails_is_named(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.speeds["steady"] = "its process died of SIGILL: it said nothing"
    assert world.open() == "swift"
    assert "auto chose swift, 200 tok/s decode, 800 prompt (steady: its process died of SIGILL: it said nothing)" in (
        caplog.text
    )


def test_the_last_resort_where_all_fail(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world.speeds = {"steady": "leaves 61% of the bytes to the host", "swift": "did not answer within 120 s"}
    assert world.open() == "reference"
    assert caplog.messages == [
        "auto chose reference, its last resort: steady: leaves 61% of the bytes to the host;"
        " swift: did not answer within 120 s"
    ]
    assert not list((tmp_path / "cache/choices").glob("*.json"))


def test_a_single_candidate_is_not_measured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = opening.probe

    def probe(entry: Any) -> Any:
        return replace(plain(entry), reason="gone") if entry.name == "swift" else plain(entry)

    monkeypatch.setattr(opening, "probe", probe)
    assert world.open() == "steady"
    assert world.asked == []


@pytest.mark.parametrize("changed", ["precision", "threads", "device", "ctx", "model", "cpu", "packages", "drivers"])
def test_whatever_changes_the_answer_is_measured_anew(
    world: World, changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.open()
    changes: dict[str, Any] = {}
    if changed == "model":
        other = tmp_path / "other.gguf"
        other.write_bytes(valid_llama_gguf(n_layers=3))
        changes["model"] = str(other)
    elif changed in ("cpu", "packages", "drivers"):
        monkeypatch.setattr(choice, changed, lambda: {"apache-tvm": "99"})
    else:
        changes[changed] = {"precision": "exact", "threads": 1, "device": "0", "ctx": 257}[changed]
    assert world.open(**changes) == "swift"
    assert world.asked == ["steady", "swift"] * 2
    assert world.open(**changes) == "swift"
    assert len(world.asked) == 4


def test_a_plugin_of_another_version_is_measured_anew(world: World, tmp_path: Path) -> None:
    world.open()
    (info,) = (tmp_path / "a").glob("*.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-steady\nVersion: 2.0\n")
    world.open()
    assert len(world.asked) == 4


def test_what_changes_nothing(world: World, tmp_path: Path) -> None:
    """The same model elsewhere, a context of the same power of two, the fallback policy."""
    world.open(ctx=200)
    copy = shutil.copy(world.settings.model, tmp_path / "copy.gguf")
    assert world.open(ctx=129, model=str(copy), fallback="allow") == "swift"
    assert len(world.asked) == 2


def test_another_device_behind_the_same_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.open()
    plain = opening.open_backend

    def newer(name: str, **options: Any) -> Any:
        backend: Any = plain(name, **options)
        backend.device = replace(backend.device, driver="2.0")
        return backend

    monkeypatch.setattr(opening, "open_backend", newer)
    world.speeds["steady"] = (900, 900)
    assert world.open() == "steady"
    assert len(world.asked) == 4


def test_a_choice_that_does_not_open_any_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.open()
    plain = opening.open_backend

    def broken(name: str, **options: Any) -> Any:
        if name == "swift":
            raise BackendUnavailable("the card is gone")
        return plain(name, **options)

    monkeypatch.setattr(opening, "open_backend", broken)
    world.speeds["swift"] = "the card is gone"
    assert world.open() == "steady"
    assert len(world.asked) == 4


def damaged(content: dict[str, Any], kind: str) -> bytes:
    """What could stand in the file instead of `content`."""
    if kind == "another question":
        content["asked"]["ctx"] = 512
    elif kind == "unknown backend":
        content["chosen"] = "rm -rf"
    elif kind == "no speed":
        content["speeds"][1]["decode_tps"] = 0.0
    elif kind == "text for a number":
        content["speeds"][0]["decode_tps"] = "fast"
    elif kind == "another field":
        content["speeds"][0]["colour"] = "red"
    elif kind == "layers":
        content["layers"] = "two"
    whole = json.dumps(content).encode()
    texts = {"empty": b"", "cut": whole[:-20], "zeros": bytes(len(whole)), "a list": b"[]", "nested": b"[" * 100000}
    return texts.get(kind, whole)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "Expecting value: line 1 column 1 (char 0)"),
        ("cut", ""),
        ("zeros", ""),
        ("a list", "it answers another question"),
        ("nested", ""),
        ("another question", "it answers another question"),
        ("unknown backend", "the chosen backend was not measured"),
        ("no speed", "the chosen backend was not measured"),
        ("text for a number", "decode_tps is no float"),
        ("another field", ""),
        ("layers", ""),
    ],
)
def test_a_file_that_cannot_be_relied_on(
    world: World, kind: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.open()
    file = remembered(tmp_path)
    whole = json.loads(file.read_bytes())
    file.write_bytes(damaged(json.loads(file.read_bytes()), kind))
    caplog.clear()
    assert world.open() == "swift"
    assert len(world.asked) == 4
    assert caplog.messages[0].startswith(f"{file} is damaged ({reason}")
    assert caplog.messages[0].endswith("): measuring backends again")
    assert json.loads(file.read_bytes())["speeds"] == whole["speeds"]


def test_a_file_that_cannot_be_read(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world.open()
    file = remembered(tmp_path)
    file.unlink()
    file.mkdir()
    caplog.clear()
    assert world.open() == "swift"
    assert caplog.messages[0] == f"{file} cannot be read (Is a directory): measuring backends again"
    assert "not remembered: " in caplog.messages[-1]


def test_a_cache_that_cannot_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POLYKERN_CACHE_DIR", "/proc/nowhere")
    assert world.open() == "swift"
    assert caplog.messages == [
        "auto chose swift, 200 tok/s decode, 800 prompt (steady 100, 1000), not remembered: /proc/nowhere/choices:"
        " No such file or directory; set POLYKERN_CACHE_DIR to a folder that can be written"
    ]


def test_a_full_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full)
    assert world.open() == "swift"
    assert "not remembered: " in caplog.text
    assert "No space left on device" in caplog.text
    assert {path.name for path in (tmp_path / "cache/choices").iterdir()} <= {"measuring.lock"}


def test_two_starts_measure_once(world: World) -> None:
    config = ModelConfig.from_gguf(GGUFFile.open(world.settings.model))
    question = ask(world.settings, config, 256, [("swift", "1"), ("steady", "1")])
    measured, both = [], threading.Barrier(2)

    def slow(name: str) -> tuple[Speed, str]:
        measured.append(name)
        return world.measure(replace(world.settings, backend=name), None)

    def start() -> None:
        both.wait()
        choose(question, ["swift", "steady"], slow)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == ["swift", "steady"]
    assert recall(question) is not None


def test_on_a_busy_machine_it_is_provisional(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "load", lambda: choice.BUSY + 0.1)
    world.open()
    assert caplog.messages[0].endswith(f"remembered in {remembered(tmp_path)} until the machine is less busy")
    world.open()
    assert len(world.asked) == 2
    monkeypatch.setattr(choice, "load", lambda: choice.BUSY)
    world.speeds["steady"] = (900, 900)
    assert world.open() == "steady"
    assert len(world.asked) == 4
    assert caplog.messages[1].endswith(f"remembered in {remembered(tmp_path)}")
    world.open()
    assert len(world.asked) == 4


def test_old_choices_make_room(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "KEPT_FILES", 2)
    for ctx in (1, 2, 4, 8):
        world.open(ctx=ctx)
    assert len(list((tmp_path / "cache/choices").glob("*.json"))) == 2
    world.open(ctx=8)
    assert len(world.asked) == 8


def test_doctor_shows_and_forgets(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.open()
    file = remembered(tmp_path)
    assert main(["doctor", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["choices"]
    assert row["file"] == str(file)
    assert row["chose"] == "swift, 200 tok/s decode, 800 prompt (steady 100, 1000)"
    assert [speed["backend"] for speed in row["speeds"]] == ["steady", "swift"]
    (file.parent / "0.json").write_text("{}")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"  swift, 200 tok/s decode, 800 prompt (steady 100, 1000) ({file})\n" in text
    assert f"  damaged: it will be measured again ({file.parent / '0.json'})\n" in text
    assert main(["doctor", "--forget"]) == 0
    assert capsys.readouterr().out == f"forgot 2 choices in {file.parent}\n"
    assert main(["doctor", "--forget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"forgotten": 0}
    world.open()
    assert len(world.asked) == 4


# In processes of their own

# A step of this backend takes STEP seconds of a clock that only it moves.
TIMED = (
    GOOD
    + """
    import types
    from polykern.runtime import choice, session

    choice.load = lambda: 0.0
    now = vars(session).setdefault('now', [0.0])  # one clock for all
    session.time = types.SimpleNamespace(perf_counter=lambda: now[0])

    def open(self, options):
        backend = NullProvider.open(self, options)
        backend.name = NAME

        def capture(launches):
            def run():
                now[0] += STEP
            return run

        backend.capture = capture
        return backend

    Plugin.open = open
"""
)


def measured_plugin(install: Install, model: str, code: str, **changes: Any) -> tuple[Speed, str]:
    install("acme-npu", "npu", code)
    return measure.measure(replace(Settings(model, backend="npu"), **changes), dict(os.environ))


def test_speed_in_a_process_of_its_own(install: Install, model: str) -> None:
    speed, layers = measured_plugin(install, model, TIMED.format(order=1) + "    STEP = 0.01\n")
    # a prompt of 65: one run of a chunk, one of the decode step
    assert (speed.backend, speed.device, speed.problem, layers) == ("npu", "null", "", "2 of 2")
    assert speed.decode_tps == pytest.approx(100)
    assert speed.prompt_tps == pytest.approx(65 / 0.02)


def test_a_slow_one_takes_few_steps(install: Install, model: str, tmp_path: Path) -> None:
    count = f"    import atexit\n    STEP = 0.1\n    log = {str(tmp_path / 'steps')!r}\n"
    code = TIMED.format(order=1).replace("now[0] += STEP", "now[0] += STEP; open_file(log, 'a').write('x')")
    speed, _ = measured_plugin(
        install, model, code.replace("import types", "import types\n    open_file = open") + count
    )
    assert speed.decode_tps == pytest.approx(10)
    assert len((tmp_path / "steps").read_text()) == 2 + 2 * 2  # a token, and a chunk with its token; each warmed up


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("    Plugin.open = lambda self, options: 1 / 0\n", "open() failed: ZeroDivisionError: division by zero"),
        ("    import os\n    Plugin.open = lambda self, options: os.abort()\n", "its process died of SIGABRT: "),
        ("    import os\n    Plugin.open = lambda self, options: os._exit(3)\n", "its process ended with status 3: "),
        (
            "    import os\n    os.write(2, b'driver: boom\\n')\n    Plugin.open = lambda self, options: os._exit(3)\n",
            "its process ended with status 3: driver: boom",
        ),
        ("    import time\n    Plugin.open = lambda self, options: time.sleep(60)\n", "did not answer within 3 s"),
    ],
)
def test_a_candidate_that_breaks(
    install: Install, model: str, monkeypatch: pytest.MonkeyPatch, code: str, problem: str
) -> None:
    monkeypatch.setattr(measure, "TIMEOUT_S", 3)
    speed, layers = measured_plugin(install, model, GOOD.format(order=1) + code)
    assert speed.problem.startswith(problem)
    assert (speed.decode_tps, layers) == (0, "")


def test_what_leaves_the_work_to_the_host(install: Install, model: str) -> None:
    refuse = """
    from polykern.kernels.spi import Unsupported

    def open(self, options):
        backend = NullProvider.open(self, options)
        backend.name = NAME
        plain = backend.supports
        backend.supports = lambda s: Unsupported(s.op, "no") if "gemm" in s.op else plain(s)
        return backend

    Plugin.open = open
"""
    speed, _ = measured_plugin(install, model, GOOD.format(order=1) + refuse, fallback="error")
    assert speed.problem.startswith("leaves ")
    assert speed.problem.endswith("% of the bytes to the host")


def test_only_as_many_layers_as_fit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_gguf(GGUFFile.open(model))
    config = replace(
        config,
        layers=config.layers[:1] * 9,
        tensors={
            name.replace("blk.0.", f"blk.{i}."): kind
            for name, kind in config.tensors.items()
            if not name.startswith("blk.1.")
            for i in range(9)
        },
    )
    layer = 34 / 32 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 2 * 4 * 64
    rest = 34 / 32 * 320 * 64 + 4 * 64
    for budget, count in ((0, 2), (rest + 2.9 * layer, 2), (rest + 5 * layer, 5), (rest + 99 * layer, 9)):
        monkeypatch.setattr(measure, "MEASURED_BYTES", int(budget))
        small = measure.first_layers(config)
        assert len(small.layers) == count
        assert {name for name in small.tensors if name.startswith("blk.")} == {
            name for name in config.tensors if name.startswith("blk.") and int(name.split(".")[1]) < count
        }


def test_speed_is_that_of_the_whole_model(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the bytes, twice the time."""
    path = tmp_path / "deep.gguf"
    path.write_bytes(valid_llama_gguf(n_layers=8))
    small = measure.first_layers
    monkeypatch.setattr(measure, "MEASURED_BYTES", 0)
    install("acme-npu", "npu", TIMED.format(order=1) + "    STEP = 0.01\n")
    from polykern.runtime import session

    monkeypatch.setattr(session, "time", session.time)
    monkeypatch.setattr(choice, "load", choice.load)
    speed, layers = measure.speed_of(Settings(path, backend="npu"))
    whole = ModelConfig.from_gguf(GGUFFile.open(path))
    share = measure.streamed(small(whole)) / measure.streamed(whole)
    assert layers == "2 of 8"
    assert speed.decode_tps == pytest.approx(100 * share)
    assert 0.2 < share < 0.5


def test_from_the_command_line(install: Install, model: str, tmp_path: Path) -> None:
    """Two plug-ins measured in processes of their own; other backends have no device of that name."""
    install("acme-slow", "slow", TIMED.format(order=-2) + "    STEP = 0.02\n", site="a")
    install("acme-fast", "fast", TIMED.format(order=-1) + "    STEP = 0.01\n", site="b")
    environment = {
        **os.environ,
        "POLYKERN_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "a", tmp_path / "b"))),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*RUNTIME, *arguments, "--device", "null", "-m", model]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=environment)

    done = run("bench", "--json", "-p", "0", "-n", "1", "-r", "1")
    found = json.loads(done.stdout)
    assert found["backend"] == found["choice"]["backend"] == "fast"
    (line,) = done.stderr.splitlines()
    assert line.startswith("runtime: auto chose fast, 100 tok/s decode, ")
    assert "(slow 50, " in line
    assert line.endswith(f"remembered in {remembered(tmp_path)}")
    done = run("plan")
    assert done.stderr == ""
    assert "auto chose fast, 100 tok/s decode, " in done.stdout
    assert "auto: fast, 100 tok/s decode, " in run("plan", "--debug").stderr
