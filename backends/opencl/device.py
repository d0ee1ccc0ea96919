"""OpenCL devices: listing them, choosing one by the text of `--device`, opening it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...kernels.errors import BackendUnavailable, DeviceError
from . import environment, runtimes

if TYPE_CHECKING:
    import pyopencl as cl

    from ...kernels.spi import Progress

# The extensions that kernels or the launch layer ask about.
EXTENSIONS = (
    "cl_khr_fp16",
    "cl_khr_fp64",
    "cl_khr_integer_dot_product",
    "cl_khr_subgroups",
    "cl_intel_subgroups",
    "cl_intel_required_subgroup_size",
    "cl_khr_command_buffer",
    "cl_intel_unified_shared_memory",
    "cl_intel_exec_by_local_thread",
    "cl_intel_channels",
)
_TYPES = ("gpu", "accelerator", "cpu")
_RUNTIME_OF_PLATFORM = {
    "Intel(R) OpenCL": "intel",
    "Portable Computing Language": "pocl",
    "Oclgrind": "oclgrind",
    "Intel(R) FPGA Emulation Platform for OpenCL(TM)": "fpga-emu",
}


@dataclass(frozen=True)
class DeviceInfo:
    """What one OpenCL device says about itself. `runtime`: "intel", "pocl", "oclgrind", "fpga-emu" or "" (other)."""

    index: int
    runtime: str
    platform: str
    platform_version: str
    name: str
    vendor: str
    driver: str
    opencl_c: str
    type: str  # "cpu", "gpu", "accelerator" or "custom"
    compute_units: int
    memory_bytes: int
    extensions: frozenset[str]  # those of EXTENSIONS that the device has

    @property
    def is_host(self) -> bool:
        """Whether it is this machine's processor, for which its compiler then generates code."""
        return self.type == "cpu" or self.runtime == "fpga-emu"

    @property
    def label(self) -> str:
        return f"{self.platform} / {self.name}"


@dataclass
class OpenedDevice:
    """A device ready for use: what the kernel layer gets.

    context  pyopencl.Context on this device alone
    queue    in-order pyopencl.CommandQueue, no profiling (it slows every enqueue)
    device   pyopencl.Device
    threads  compute threads a CPU device uses; on other devices its compute units
    """

    info: DeviceInfo
    device: cl.Device
    context: cl.Context
    queue: cl.CommandQueue
    threads: int

    def build_many(
        self, programs: Mapping[str, tuple[str, Sequence[str]]], progress: Progress | None = None
    ) -> dict[str, cl.Program]:
        """Built programs by label, from `{label: (source, options)}`; see `program.build_many`."""
        from . import program

        return program.build_many(self, programs, progress=progress)

    def close(self) -> None:
        """Waits for what is enqueued. PyOpenCL releases the handles with the last reference."""
        with named_errors(f"finishing on {self.info.label}"):
            self.queue.finish()


@contextmanager
def named_errors(what: str) -> Generator[None]:
    """Turns PyOpenCL's errors into `DeviceError`: "OpenCL CL_OUT_OF_RESOURCES (-5) in <what>"."""
    import pyopencl as cl

    try:
        yield
    except cl.Error as error:
        try:
            name = f"CL_{cl.status_code.to_string(error.code)}"
        except ValueError:
            name = "error"
        raise DeviceError(f"OpenCL {name} ({error.code}) in {what}") from error


def list_devices(*, include_oclgrind: bool = False) -> list[DeviceInfo]:
    """Every OpenCL device: GPUs, then Intel's CPU runtime, then PoCL, then others, Oclgrind last. Never empty.

    Raises BackendUnavailable, with each runtime's problem and what to install, if there is none.
    """
    return [info for info, _ in _enumerate(include_oclgrind=include_oclgrind)]


def is_started() -> bool:
    """Whether this process has asked for devices: from then on it has the runtimes that it has."""
    return bool(_enumerated)


def choose(spec: str | None, devices: Sequence[DeviceInfo]) -> DeviceInfo:
    """The device that `spec` means: its index, an alias (intel, pocl, oclgrind, cpu, gpu, accelerator), or part of a
    device, platform or vendor name, in any case. None or "": the first.

    Raises BackendUnavailable, listing all devices, if none matches or if several platforms do.
    """
    there = "; ".join(f"{d.index}: {d.label} ({d.type}, {d.compute_units} units)" for d in devices)
    if not devices:
        raise BackendUnavailable(f"no OpenCL device found. Install a runtime with: {runtimes.INSTALL_ANY}")
    if not spec or not spec.strip():
        return devices[0]
    text = spec.strip().lower()
    for device in devices:
        if text in (str(device.index), device.runtime, device.type):
            return device
    if text in runtimes.INSTALL:
        raise BackendUnavailable(
            f"OpenCL runtime {text!r} is not in use here ({_why_not(text)}); the devices are: {there}"
        )
    number = text.isdecimal() and len(text) < 3  # an index that is not there; "3090" is part of a name
    matches = [d for d in devices if not number and text in f"{d.label} / {d.vendor}".lower()]
    if not matches:
        raise BackendUnavailable(f"no OpenCL device matches {spec!r}; there are: {there}")
    if len({device.platform for device in matches}) > 1:
        indices = ", ".join(str(device.index) for device in matches)
        raise BackendUnavailable(f"{spec!r} means several OpenCL devices ({indices}): use an index; there are: {there}")
    return matches[0]


def open_device(spec: str | None = None, threads: int | None = None) -> OpenedDevice:
    """Opens the device that `spec` means (see `choose`), a CPU device with `threads` threads; None: all it has.

    A CPU runtime reads its number of threads when it starts, so the first open of a process decides it.
    Raises BackendUnavailable if no device fits, or `threads` does not fit the device.
    """
    processors = len(os.sched_getaffinity(0))
    if threads is not None and threads < 1:
        raise BackendUnavailable(f"cannot use {threads} threads: give at least 1")
    # PoCL counts the machine's processors, not those this process may use (a cpuset, `taskset`).
    wanted = processors if threads is None and processors < (os.cpu_count() or 1) else threads
    if wanted is not None and wanted <= processors and not _enumerated:
        environment.limit_threads(wanted)
    wants_oclgrind = spec is not None and spec.strip().lower() == "oclgrind"
    devices = _enumerate(include_oclgrind=wants_oclgrind)
    info = choose(spec, [info for info, _ in devices])
    used = info.compute_units
    if info.type == "cpu":
        used = min(used, environment.thread_limit(info.runtime) or used)
        _check_threads(info, threads, used, processors)
    elif threads is not None:
        warnings.warn(f"{threads} threads: no meaning for {info.label}, a {info.type}; ignored", stacklevel=2)

    import pyopencl as cl

    device = next(device for candidate, device in devices if candidate == info)
    with named_errors(f"opening {info.label}"):
        context = cl.Context([device])
        queue = cl.CommandQueue(context, device)
    return OpenedDevice(info, device, context, queue, used)


def _check_threads(info: DeviceInfo, threads: int | None, used: int, processors: int) -> None:
    if threads is None or threads == used:
        return
    if threads > processors:
        raise BackendUnavailable(f"cannot use {threads} threads: this process may run on {processors} processors")
    if not environment.THREAD_VARIABLES.get(info.runtime):
        raise BackendUnavailable(f"cannot use {threads} threads: {info.label} always uses {used}")
    raise BackendUnavailable(
        f"cannot use {threads} threads: {info.label} already runs with {used} in this process, which its first "
        "use decides"
    )


def _why_not(name: str) -> str:
    """Why runtime `name` gave no device."""
    runtime = next((r for r in runtimes.find(include_oclgrind=True) if r.name == name), None)
    if runtime is None:
        chosen = runtimes.user_choice()
        if not chosen and runtimes.restricted_to():
            return f"this process was opened for {runtimes.restricted_to()} alone"
        return f"not in OCL_ICD_VENDORS={chosen}" if chosen else f"install it with: {runtimes.INSTALL[name]}"
    late = "this process used OpenCL before it was asked for" if name == "oclgrind" else "it offers no device"
    return runtimes.diagnose(runtime).problem or late


_enumerated: list[tuple[DeviceInfo, Any]] = []  # the loader reads its environment once, so neither can this change


def _enumerate(*, include_oclgrind: bool) -> list[tuple[DeviceInfo, Any]]:
    if not _enumerated:
        runtimes.prepare(include_oclgrind=include_oclgrind)
        try:
            import pyopencl as cl
        except ImportError as error:
            raise BackendUnavailable(f"OpenCL needs PyOpenCL ({error}): pip install 'polykern[opencl]'") from error
        found = sorted(_all_devices(cl), key=lambda pair: _rank(pair[0]))
        _enumerated.extend((replace(info, index=i), device) for i, (info, device) in enumerate(found))
    if not _enumerated:
        raise BackendUnavailable(f"no OpenCL device found: {runtimes.explain_absence()}")
    return _enumerated


def _all_devices(cl: Any) -> Iterator[tuple[DeviceInfo, Any]]:
    try:
        platforms = cl.get_platforms()
    except cl.Error:  # CL_PLATFORM_NOT_FOUND_KHR
        return
    for platform in platforms:
        with suppress(cl.Error):  # a driver without its hardware
            yield from [(_info(platform, device), device) for device in platform.get_devices()]


def _info(platform: Any, device: Any) -> DeviceInfo:
    import pyopencl as cl

    kinds = cl.device_type
    kind = next((name for name in _TYPES if device.type & getattr(kinds, name.upper())), "custom")
    extensions = frozenset(device.extensions.split())
    return DeviceInfo(
        index=0,
        runtime=_RUNTIME_OF_PLATFORM.get(platform.name.strip(), ""),
        platform=platform.name.strip(),
        platform_version=platform.version.strip(),
        name=device.name.strip(),
        vendor=device.vendor.strip(),
        driver=device.driver_version.strip(),
        opencl_c=device.opencl_c_version.strip(),
        type=kind,
        compute_units=device.max_compute_units,
        memory_bytes=device.global_mem_size,
        extensions=extensions.intersection(EXTENSIONS),
    )


def _rank(info: DeviceInfo) -> tuple[int, str, str]:
    """GPUs, then what decodes fastest on a CPU, then the unknown, then the checker, which nobody wants by accident."""
    if info.runtime == "oclgrind":
        kind = 4
    elif info.type == "gpu":
        kind = 0
    elif info.type == "cpu":
        kind = {"intel": 1, "pocl": 2}.get(info.runtime, 3)
    else:
        kind = 3
    return kind, info.platform, info.name
