"""Finding and opening backends: what is listed and refused, how it is said, and that plug-ins cannot do harm."""

from __future__ import annotations

import re
import sys

import pytest
from plugins import GOOD, Install
from polykern.backends import describe, list_backends, load_provider, open_backend, probe
from polykern.kernels import conformance
from polykern.kernels.errors import BackendUnavailable, UsageError
from polykern.kernels.spi import SPI_VERSION, Backend, DeviceInfo, OpenOptions, Provider

# A plug-in as it was written before the first release: launches are bound, and that is all. Frozen: do not modernise.
FROZEN_V0 = """
    import numpy as np
    from polykern.kernels.spi import DeviceInfo, Kernel, Unsupported
    from polykern.kernels.op import Numerics

    class Device:
        name, device, page_size = "tiny", DeviceInfo("tiny device"), 8

        def supports(self, signature):
            if signature.op != "add":
                return Unsupported(signature.op, "tiny adds, and nothing else")
            return Kernel("tiny.add", Numerics(depth=1))

        def alloc(self, kind):
            return np.zeros(int(np.prod(kind.shape)), np.float32)

        def write(self, buffer, array, offset=0):
            buffer[offset : offset + array.size] = array.reshape(-1)

        def read(self, buffer, kind, offset=0):
            return buffer[offset : offset + int(np.prod(kind.shape))].reshape(kind.shape).copy()

        def pack(self, weight):
            return weight

        def bind(self, call):
            def view(t):
                strides = (t.row_stride * 4, 4)
                return np.lib.stride_tricks.as_strided(t.buffer[t.offset :], t.shape, strides)

            x, y = view(call.tensors["x"]), view(call.tensors["y"])
            return lambda: np.add(x, y, out=x)

        def synchronize(self):
            pass

        def close(self):
            pass

    class Tiny:
        spi_version, order = 0, 5

        def devices(self):
            return [Device.device]

        def open(self, options):
            return Device()

        def describe(self):
            return {"tiny": "0.0"}

    provider = Tiny()
"""


def reason(name: str) -> str:
    """Why a backend has no devices; and that naming it, and auto without it, behave accordingly."""
    found = probe(name)
    assert found.devices == ()
    assert "\n" not in found.reason
    with pytest.raises(BackendUnavailable) as error:
        open_backend(name)
    assert str(error.value) == f"backend {name!r} is not available: {found.reason}"
    assert open_backend("reference").name == "reference"
    assert isinstance(open_backend(), Backend)
    return found.reason


def test_own_backends_are_listed_first_and_lazily(install: Install) -> None:
    install("acme-npu", "a_first", "raise RuntimeError('imported')")
    entries = list_backends()
    assert [(e.name, e.distribution) for e in entries] == [
        ("cuda", "polykern"),
        ("null", "polykern"),
        ("opencl", "polykern"),
        ("opencl-tvm", "polykern"),
        ("reference", "polykern"),
        ("tvm", "polykern"),
        ("a_first", "acme-npu"),
    ]
    assert entries[4].value == "polykern.backends.reference:provider"
    assert not [m for m in sys.modules if m.startswith("plugin_") and m.endswith("acme_npu")]


@pytest.mark.parametrize("name", ["reference", "null"])
def test_own_providers_keep_the_protocol(name: str) -> None:
    provider = load_provider(name)
    assert isinstance(provider, Provider)
    assert provider.spi_version == SPI_VERSION
    backend = open_backend(name)
    assert isinstance(backend, Backend)
    assert backend.page_size == 16
    assert probe(name).devices == (backend.device,)
    assert "error" not in describe(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "opncl",
            "unknown backend 'opncl'; did you mean 'opencl'? known: auto, cuda, null, opencl, opencl-tvm, reference,"
            " tvm",
        ),
        (
            "referense",
            "unknown backend 'referense'; did you mean 'reference'?"
            " known: auto, cuda, null, opencl, opencl-tvm, reference, tvm",
        ),
        (
            "Auto",
            "unknown backend 'Auto'; did you mean 'auto'? known: auto, cuda, null, opencl, opencl-tvm, reference, tvm",
        ),
        ("zzz", "unknown backend 'zzz'; known: auto, cuda, null, opencl, opencl-tvm, reference, tvm"),
        ("", "unknown backend ''; known: auto, cuda, null, opencl, opencl-tvm, reference, tvm"),
    ],
)
def test_unknown_name(name: str, text: str) -> None:
    for action in (open_backend, load_provider, probe, describe):
        with pytest.raises(UsageError) as error:
            action(name)
        assert str(error.value) == text


def test_auto_takes_the_lowest_order_that_opens(install: Install) -> None:
    install("acme-slow", "slow", GOOD.format(order=-10), site="a")
    install("acme-fast", "fast", GOOD.format(order=-20) + "    Plugin.open = lambda self, options: boom\n", site="b")
    install("acme-never", "never", GOOD.format(order=None), site="c")
    assert open_backend().name == "slow"
    assert open_backend("never").name == "never"


def test_auto_passes_the_options_on(install: Install) -> None:
    install(
        "acme-npu",
        "npu",
        GOOD.format(order=-1)
        + """
    def open(self, options):
        backend = NullProvider.open(self, options)
        backend.name = NAME
        backend.options = options
        return backend

    Plugin.open = open
""",
    )

    def progress(what: str, done: int, total: int) -> None: ...

    backend = open_backend(device="x", threads=3, progress=progress)
    assert vars(backend)["options"] == OpenOptions("x", 3, progress)


def test_auto_names_every_candidate_when_nothing_opens(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-npu", "npu", GOOD.format(order=-1) + "    Plugin.open = lambda self, options: 1 / 0\n")
    with pytest.raises(BackendUnavailable) as error:
        open_backend(device="no such device")
    text = str(error.value)
    assert text.startswith("no backend could be opened: ")
    assert "npu: open() failed: ZeroDivisionError: division by zero; " in text
    assert "reference: no device matches 'no such device': the only one is 0 'host'" in text
    assert "opencl: " in text
    assert "null" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import no_such_vendor", "importing .* failed: ModuleNotFoundError: No module named 'no_such_vendor'"),
        ("def provider(:", "importing .* failed: SyntaxError: .*"),
        ("import sys; sys.exit(3)", "importing .* failed: SystemExit: 3"),
        ("provider_ = 1", "importing .* failed: AttributeError: .* has no attribute 'provider'"),
        ("provider = 1", ".*:provider is no Provider: it has no spi_version, order, devices, open, describe"),
        (GOOD.format(order="'1'"), ".*:provider is no Provider: order is '1', expected an int or None"),
        (
            GOOD.format(order=1) + "    Plugin.spi_version = 9\n",
            "acme-npu speaks SPI version 9, this polykern speaks 1 and 0: upgrade polykern",
        ),
        (
            GOOD.format(order=1) + "    Plugin.spi_version = -1\n",
            "acme-npu speaks SPI version -1, this polykern speaks 1 and 0: upgrade acme-npu",
        ),
        (GOOD.format(order=1) + "    Plugin.devices = lambda self: 1 / 0\n    Plugin.open = Plugin.devices\n", None),
        (GOOD.format(order=1) + "    Plugin.devices = lambda self: ['npu0']\n    Plugin.open = None\n", None),
    ],
)
def test_broken_plugin_is_a_reason(install: Install, code: str, text: str | None) -> None:
    install("acme-npu", "npu", code)
    if text is not None:
        assert re.fullmatch(text, reason("npu"))
        assert "error" in describe("npu")
    else:
        assert probe("npu").reason in (
            "listing devices failed: ZeroDivisionError: division by zero",
            "listing devices returned str, expected DeviceInfo",
        )
        with pytest.raises(BackendUnavailable, match=r"^backend 'npu' is not available: open\(\) failed: TypeError: "):
            open_backend("npu")
    assert isinstance(open_backend(), Backend)


def test_open_that_returns_something_else(install: Install) -> None:
    install("acme-npu", "npu", GOOD.format(order=-1) + "    Plugin.open = lambda self, options: self\n")
    with pytest.raises(
        BackendUnavailable, match=r"open\(\) returned Plugin, which has no name, device, page_size, supp"
    ):
        open_backend("npu")
    assert type(open_backend()).__name__ != "Plugin"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("name = 'null'", "open() returned Odd, whose name is 'null', but it is registered as 'npu'"),
        ("device = 'npu0'", "open() returned Odd, whose device is str, expected DeviceInfo"),
        ("page_size = 0", "open() returned Odd, whose page_size is 0, expected an int of at least 1"),
        ("page_size = 16.0", "open() returned Odd, whose page_size is 16.0, expected an int of at least 1"),
        ("page_size = property(lambda self: 1 / 0)", "looking at it failed: ZeroDivisionError: division by zero"),
    ],
)
def test_open_that_returns_a_backend_with_wrong_values(install: Install, line: str, text: str) -> None:
    code = f"""
    from polykern.backends.null import NullBackend
    from polykern.kernels.spi import DeviceInfo

    class Odd(NullBackend):
        name, device, page_size = NAME, DeviceInfo("npu0"), 16
        __init__ = lambda self: None
        {line}
    """
    install("acme-npu", "npu", code + GOOD.format(order=-1) + "    Plugin.open = lambda self, options: Odd()\n")
    with pytest.raises(BackendUnavailable) as error:
        open_backend("npu")
    assert str(error.value) == f"backend 'npu' is not available: {text}"
    assert open_backend().name != "npu"


def test_auto_is_no_name_for_a_plugin(install: Install) -> None:
    install("acme-npu", "auto", GOOD.format(order=-1))
    assert probe("auto").reason == "the name 'auto' means the first backend that opens: register another"
    assert open_backend("auto").name in ("tvm", "opencl", "reference")


def test_no_devices(install: Install) -> None:
    install("acme-npu", "npu", GOOD.format(order=1) + "    Plugin.devices = lambda self: []\n")
    assert probe("npu").reason == "no device found"


def test_reason_is_one_line(install: Install) -> None:
    install("acme-npu", "npu", "raise RuntimeError('driver log:\\n  line 1\\n  line 2')")
    assert reason("npu").endswith("failed: RuntimeError: driver log: line 1 line 2")


def test_interrupt_passes_through(install: Install) -> None:
    install("acme-npu", "npu", "raise KeyboardInterrupt")
    for action in (lambda: open_backend("npu"), lambda: probe("npu"), open_backend):
        with pytest.raises(KeyboardInterrupt):
            action()


def test_two_plugins_of_one_name(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-npu", "npu", GOOD.format(order=-1), site="a")
    install("other-npu", "npu", GOOD.format(order=-1), site="b")
    claimed = "the name 'npu' is claimed by acme-npu, other-npu: uninstall one, or list one in POLYKERN_BACKENDS"
    assert reason("npu") == claimed
    assert [probe(e).reason for e in list_backends() if e.name == "npu"] == [claimed, claimed]
    monkeypatch.setenv("POLYKERN_BACKENDS", "other-npu")
    assert [e.distribution for e in list_backends() if e.name == "npu"] == ["other-npu"]
    assert open_backend("npu").name == "npu"


def test_plugin_cannot_take_our_name(install: Install) -> None:
    install("acme-npu", "reference", GOOD.format(order=-1))
    entries = [e for e in list_backends() if e.name == "reference"]
    assert [e.distribution for e in entries] == ["polykern", "acme-npu"]
    assert probe(entries[1]).reason.startswith("the name 'reference' is claimed by polykern, acme-npu")
    assert open_backend("reference").name == "reference"


def test_malformed_metadata_harms_nobody(install: Install) -> None:
    install("acme-npu", "npu", "", metadata="[polykern.backends]\nno equals sign\n")
    install("acme-ok", "ok", GOOD.format(order=None), site="b")
    assert reason("acme-npu").startswith("the entry_points.txt of acme-npu is malformed: ")
    assert open_backend("ok").name == "ok"


def test_allow_list(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-a", "a", GOOD.format(order=None), site="a")
    install("acme-b", "b", GOOD.format(order=None), site="b")
    own = ["cuda", "null", "opencl", "opencl-tvm", "reference", "tvm"]
    monkeypatch.setenv("POLYKERN_BACKENDS", "")
    assert [e.name for e in list_backends()] == own
    with pytest.raises(UsageError, match=r"^backend 'a' is switched off by POLYKERN_BACKENDS='': add a to it$"):
        open_backend("a")
    monkeypatch.setenv("POLYKERN_BACKENDS", " b ,c")
    assert [e.name for e in list_backends()] == [*own, "b"]
    monkeypatch.delenv("POLYKERN_BACKENDS")
    assert [e.name for e in list_backends()] == [*own, "a", "b"]


def test_plugin_of_the_previous_spi_version(install: Install) -> None:
    install("tiny-device", "tiny", FROZEN_V0)
    assert probe("tiny").devices == (DeviceInfo("tiny device"),)
    backend = open_backend("tiny")
    assert isinstance(backend, Backend)
    assert (backend.name, backend.page_size) == ("tiny", 8)
    backend.prepare([])
    calls: list[int] = []
    backend.capture([lambda: calls.append(1), lambda: calls.append(2)])()
    assert calls == [1, 2]
    report = conformance.run(backend, ops=["add"])
    assert report.ok, report.failures[:1]
    assert report.summary()["passed"] > 0
    assert all(row["kernel"] == "tiny.add" for row in report.rows())
