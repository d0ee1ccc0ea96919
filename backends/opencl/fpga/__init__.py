"""FPGAs through OpenCL: single-work-item kernels joined by channels (hls/opencl), on an emulator or from a bitstream.

    --device fpga-emu            the emulator compiles the kernels; `emulator.py` fetches it
    --device fpga-emu:FILE       the emulator runs the program binary FILE
    --device fpga:FILE           a board with the bitstream FILE (.aocx, .xclbin), described by FILE.json

The command line's `--bitstream FILE` is the part behind the colon. Memory, transfers and errors are those of `opencl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....kernels.errors import BackendUnavailable
from ....kernels.op import Signature
from ....kernels.quant import FORMATS, Weight
from ....kernels.spi import DeviceInfo, Kernel, Launch, OpenOptions, Progress, Unsupported
from .. import OpenCLBackend
from ..launch import OpKernel
from . import programs
from .engine import EMULATED, Engine, pack

if TYPE_CHECKING:
    from ..device import OpenedDevice
    from .bitstream import Bitstream
    from .programs import Family

BOARD, EMULATOR = "fpga", "fpga-emu"


def parse(device: str | None) -> tuple[str, str]:
    """(fpga or fpga-emu, file) of a device text; ("", "") if it names neither."""
    name, _, file = (device or "").strip().partition(":")
    return (name.lower(), file) if name.lower() in (BOARD, EMULATOR) else ("", "")


def open_fpga(options: OpenOptions) -> FpgaBackend:
    """Opens what `parse` understands. Raises BackendUnavailable with the way out."""
    from .. import device
    from . import bitstream, emulator

    name, file = parse(options.device)
    if name == BOARD and not file:
        raise BackendUnavailable(
            "a board runs what was built for it: name the bitstream, --device fpga --bitstream FILE.aocx or FILE.xclbin"
            " (without a board: --device fpga-emu)"
        )
    found = bitstream.read(file) if file else None
    if name == EMULATOR or (found and found.platform == emulator.PLATFORM):
        emulator.prepare(options.progress)
        if device.is_started() and EMULATOR not in (info.runtime for info in device.list_devices()):
            raise BackendUnavailable(
                "this process has used other OpenCL runtimes, beside which the FPGA emulator cannot be loaded: open it"
                " first (--backend opencl, not auto), or in a process of its own"
            )
        opened = device.open_device(EMULATOR, options.threads)
    else:
        opened = _open_board(found, options.threads)
    return FpgaBackend(opened, options.progress, bitstream=found)


def _open_board(found: Bitstream | None, threads: int | None) -> OpenedDevice:
    from .. import device

    assert found is not None
    there = device.list_devices()
    boards = [info for info in there if info.platform == found.platform and info.type != "cpu"]
    if not boards:
        seen = ", ".join(info.label for info in there)
        raise BackendUnavailable(
            f"{found.path} is for {found.platform or 'an unnamed platform'}, which is not among the OpenCL devices here"
            f" ({seen}): install the board's OpenCL runtime, or try --device fpga-emu"
        )
    return device.open_device(str(boards[0].index), threads)


@dataclass(frozen=True)
class Task:
    """A launch of one single-work-item kernel. Its arguments are set anew each time, since a kernel object serves all
    launches of its kernel: the emulator took 23 ms to make one of a bitstream for two formats (median of 50).
    """

    queue: Any
    kernel: Any
    args: tuple[Any, ...]

    def __call__(self) -> None:
        self.enqueue(self.queue)

    def enqueue(self, queue: Any, before: Sequence[Any] | None = None) -> Any:
        import pyopencl as cl

        self.kernel.set_args(*self.args)
        return cl.enqueue_nd_range_kernel(queue, self.kernel, (1,), (1,), wait_for=before)


@dataclass(frozen=True)
class Pipeline:
    """Kernels joined by channels, running at once, each in a queue of its own; the main queue waits before and behind.

    Without that wait the next kernel could read what this one's last stage has not written.
    """

    main: Any
    queues: Sequence[Any]
    tasks: Sequence[Task]

    def __call__(self) -> None:
        import pyopencl as cl

        before = [cl.enqueue_marker(self.main)]
        self.main.flush()
        ends = [task.enqueue(queue, before) for queue, task in zip(self.queues, self.tasks, strict=True)]
        for queue in self.queues:
            queue.flush()
        cl.enqueue_barrier(self.main, wait_for=ends)


class FpgaBackend(OpenCLBackend):
    """A board or the emulator. The emulator's kernels of a launch run one after another (see engine.EMULATED)."""

    def __init__(
        self,
        opened: OpenedDevice,
        progress: Progress | None = None,
        *,
        bitstream: Bitstream | None = None,
        engine: Engine = EMULATED,
        is_sequential: bool | None = None,
    ) -> None:
        super().__init__(opened, progress)
        self.bitstream = bitstream
        self.engine = bitstream.engine if bitstream else engine
        self.is_sequential = self.engine.emulated if is_sequential is None else is_sequential
        self.queues = [self._cl.CommandQueue(opened.context, opened.device) for _ in range(3)]
        self._kernel_objects: dict[str, Any] = {}
        info = self.device
        detail = {**info.detail, "engine": vars(self.engine)}
        if bitstream:
            detail["bitstream"] = {"file": str(bitstream.path), "sha256": bitstream.sha256}
            self._loaded = bitstream.load(opened)
        self.device = DeviceInfo(info.name, info.vendor, info.driver, info.memory_bytes, detail)

    def supports(self, signature: Signature) -> Kernel | Unsupported:
        from .ops import REFUSALS

        answer = super().supports(signature)
        if isinstance(answer, Unsupported):
            return answer
        (family,) = self._kernels[signature.op].programs(signature)
        reason = self.bitstream.refusal(family) if self.bitstream else ""  # type: ignore[arg-type]
        if not reason and signature.op in REFUSALS:
            reason = REFUSALS[signature.op](signature, self.engine, self.is_sequential)
        return Unsupported(signature.op, f"{family.label}: {reason}") if reason else answer

    def prepare(self, signatures: Sequence[Signature]) -> None:
        if not self.bitstream:
            super().prepare(signatures)

    def kernels(self) -> dict[str, OpKernel]:
        from .ops import KERNELS

        return {kernel.op: kernel for kernel in KERNELS}

    def packed_bytes(self, fmt: str, shape: tuple[int, ...]) -> int:
        return self.engine.packed_bytes(FORMATS[fmt], *shape)

    def pack(self, weight: Weight) -> Any:
        """Beats by memory channel (engine.py)."""
        packed = pack(weight, self.engine).reshape(-1)
        buffer = self._buffer(packed.nbytes, f"{weight.format.name} {list(weight.shape)}")
        self.write(buffer, packed)
        return buffer

    def source(self, spec: Any) -> tuple[str, list[str]]:
        return programs.source([spec]), self.engine.options()

    def close(self) -> None:
        self._kernel_objects.clear()
        super().close()

    # What ops.py uses

    def single(self, family: Family, name: str, *args: Any) -> Task:
        """A launch of one kernel; `name` is without the family's suffix."""
        full = f"{name}_{family.suffix}" if family.suffix else name
        if full not in self._kernel_objects:
            program = self._loaded if self.bitstream else self._programs[family]  # type: ignore[index]
            self._kernel_objects[full] = self._cl.Kernel(program, full)
        return Task(self.opened.queue, self._kernel_objects[full], args)

    def pipeline(self, family: Family, *stages: tuple[Any, ...]) -> list[Launch]:
        """Launches of kernels joined by channels: each (name, *arguments), from the reader to the writer."""
        tasks = [self.single(family, *stage) for stage in stages]
        return [*tasks] if self.is_sequential else [Pipeline(self.opened.queue, self.queues, tasks)]
