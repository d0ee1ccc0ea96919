"""Whether a model fits, found out before the machine runs out of memory: a process that is killed says nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..kernels.errors import ModelError
from ..kernels.quant import FORMATS
from ..kernels.spi import Backend
from .config import ModelConfig
from .plan import Plan

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

# How much of a model must be packed before `PackingGuard` extrapolates, how often it looks (0.6 ms each), and what it
# takes for temporary arrays.
GUARD_AFTER_BYTES = 64 * MIB
GUARD_EVERY_BYTES = 16 * MIB
GUARD_SLACK_BYTES = 256 * MIB


def weight_bytes(config: ModelConfig) -> int:
    """What the weights take in their file formats."""
    return sum(tensor_bytes(kind.shape, kind.dtype) for kind in config.tensors.values())


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """What one tensor takes in its file format."""
    return math.prod(shape) * 4 if dtype == "f32" else shape[0] * FORMATS[dtype].row_bytes(shape[1])


def bytes_per_token(config: ModelConfig) -> int:
    """What one token of context takes: f16 keys and values in each layer, one row of the f32 RoPE table."""
    heads = sum(layer.kv_heads for layer in config.layers)
    return 2 * 2 * heads * config.head_dim + 4 * config.rope.dims


def check_memory(config: ModelConfig, ctx: int, backend: Backend, path: str) -> None:
    """Refuse a context that cannot fit, before anything of its size is allocated."""
    where, available = f"{backend.device.name} has", backend.device.memory_bytes
    if not available:
        where, available = "this machine has", host_memory()
    weights, per_token = weight_bytes(config), bytes_per_token(config)
    if weights + ctx * per_token <= available:
        return
    fits = (available - weights) // per_token // backend.page_size * backend.page_size
    way_out = f"--ctx {fits} fits" if fits > 0 else "no context fits beside the weights"
    raise ModelError(
        f"{path}: --ctx {ctx} takes {ctx * per_token / MIB:.0f} MiB beside {weights / MIB:.0f} MiB of weights,"
        f" {where} {available / MIB:.0f} MiB: {way_out}"
    )


def check_host_share(plan: Plan, path: str) -> None:
    """Refuse a plan whose calls on the host do not fit: there each weight is unpacked to float32 on its first use."""
    refused = [leaf for leaf in plan.leaves() if not leaf.native]
    buffers = {view.buffer for leaf in refused for view in leaf.call.args.values()}
    matrices = [spec for name, spec in plan.buffers.items() if name in buffers and spec.kind == "weight"]
    needed, available = sum(4 * math.prod(spec.shape) for spec in matrices), host_memory()
    if needed > available:
        raise ModelError(
            f"{path}: {len(refused)} calls that {plan.backend.name} refuses would run on the host and unpack"
            f" {needed / MIB:.0f} MiB of weights, this machine has {available / MIB:.0f} MiB:"
            " `runtime plan` has the reasons, another --backend may run them"
        )


class PackingGuard:
    """Refuses a model while it is packed, as soon as the rest cannot fit.

    How large a weight becomes is the backend's affair (the reference unpacks 4 bits to 32, a GPU takes nothing of the
    host's memory), so it is measured: the growth of this process over what was handed out of the file so far.
    """

    def __init__(self, total_bytes: int, path: str, ctx: int = 0, per_token: int = 0) -> None:
        self.total, self.path = total_bytes, path
        self.ctx, self.per_token = ctx, per_token
        self.given = 0
        self._before: int | None = None
        self._next = max(GUARD_AFTER_BYTES, total_bytes // 16)

    def hand_out(self, nbytes: int) -> None:
        """To be called before `nbytes` of the file are given to the backend. Raises ModelError with the numbers."""
        now = anonymous_memory()
        if self._before is None:
            self._before = now
        if self.given >= self._next:
            self._next = self.given + GUARD_EVERY_BYTES
            grown = max(0, now - self._before - GUARD_SLACK_BYTES)
            needed, available = grown / self.given * (self.total - self.given), host_memory()
            loaded = (
                f"{self.path}: {self.given / MIB:.0f} of {self.total / MIB:.0f} MiB of weights are loaded, the rest"
            )
            if needed > available:
                raise ModelError(
                    f"{loaded} would take {needed / MIB:.0f} MiB, this machine has {available / MIB:.0f} MiB left:"
                    " take a smaller model, or a --backend that keeps weights packed (`runtime backends` lists them)"
                )
            cache = self.ctx * self.per_token if grown else 0  # which lives where the weights do
            if needed + cache > available:
                fits = int(available - needed) // self.per_token
                raise ModelError(
                    f"{loaded} and --ctx {self.ctx} would take {(needed + cache) / MIB:.0f} MiB, this machine has"
                    f" {available / MIB:.0f} MiB left: --ctx {fits} fits"
                )
        self.given += nbytes


def host_memory() -> int:
    """Memory in bytes: what is available now on this machine (Linux), else all of it; less if a container has less."""
    return min([_machine_memory(), *_container_memory()])


def _container_memory() -> list[int]:
    """What is left of each limit of this process's control groups, version 2 and 1: beyond, it would be killed.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html: pages of files count as used, but are
    given back first.
    """
    found: list[int] = []
    with suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:
                found += _left(CGROUPS, name, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                found += _left(CGROUPS / "memory", name, *names)
    return found


def _left(root: Path, group: str, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    """What is left in the group and in those around it; inside a container only its root may be visible."""
    folder = root / group.lstrip("/")
    for place in dict.fromkeys((folder, *folder.parents, root)):
        if root not in (place, *place.parents):
            continue
        with suppress(OSError, ValueError):  # "max" is no number
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            free = int((place / limit).read_text()) - int((place / used).read_text())
            yield max(0, free + int(statistics[reclaimable]))


def _machine_memory() -> int:
    try:
        with Path("/proc/meminfo").open() as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def anonymous_memory() -> int:
    """Bytes of memory this process holds that no file backs (Linux), else 0."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
