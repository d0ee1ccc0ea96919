"""One case on an open backend: data on the device, the check that comes before the clock, and what the clock runs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from polykern.kernels.errors import PolykernError
from polykern.kernels.guards import bits_of, filled
from polykern.kernels.host import dense_stride
from polykern.kernels.judge import Verdict, judge
from polykern.kernels.op import NUMPY_DTYPES, Case, Cost, Op, TensorType, fp64, signature_bytes, type_of
from polykern.kernels.ops import OPS
from polykern.kernels.quant import FORMATS, Array, Weight
from polykern.kernels.spi import Backend, BoundCall, DeviceTensor, Kernel, Launch, Unsupported
from polykern.kernels.testdata import inputs_for, large_weight, part
from polykern.runtime.memory import host_memory

from .cases import BenchCase

STREAM_BYTES = 512 << 20  # what a case rotates over at most: as much as the read probe sweeps (runtime/bandwidth.py)
MOST_COPIES = 1024
POOL_BYTES = 4 << 30  # of weights and pages, as in a file, that are kept for the next case
SPARE_BYTES = 3 << 30  # of the host's memory left free; a backend that unpacks 4 bits to 32 gets fewer copies
CHECKED_WORK = 3e8  # of the float64 reference: flops, and 64 for each byte, most of it dequantisation

ROUND_S = 0.02  # a round shorter than this is repeated launches: the clock and one synchronisation vanish in it
FEWEST_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 3, 5, 50  # the fewest where a call takes longer than the budget
MOST_LAUNCHES = 20_000


Key = tuple[str, TensorType, int]  # "weight" or a parameter's name, its type, and the how manieth of that in a call


class Refused(PolykernError):
    """The backend does not accept the call, with its reason."""


class WrongResult(PolykernError):
    """The kernel's result is not what the contract allows: nothing is timed."""


class Stand:
    """An open backend and the buffers that its cases share: packed weights, and pages of KV caches, by type.

    Everything is drawn once per type. The copies hold the same numbers in other places: what is timed is reading them.
    """

    def __init__(self, backend: Backend, contract: Mapping[str, Op] = OPS) -> None:
        self.backend, self.contract = backend, contract
        self._pool: dict[Key, list[Any]] = {}
        self._hosts: dict[Key, Any] = {}

    def place(self, case: BenchCase) -> Placed:
        """Data, buffers and launches of a case. Raises Refused, or whatever the backend raises."""
        op, signature = self.contract[case.op], case.signature
        answer = self.backend.supports(signature)
        if isinstance(answer, Unsupported):
            raise Refused(f"{self.backend.name} refuses it: {answer.reason}")
        rng = np.random.default_rng([1, *case.name.encode()])
        keys = self._keys(op, case)
        if case.own_case:
            inputs = {n: v for n, v in op.make_inputs(case.own_case).items() if v is not None}
        else:
            weights = {name: self._weight(key, rng) for name, key in keys.items() if key[0] == "weight"}
            inputs = inputs_for(op, signature, rng, weights)
        self.backend.prepare([signature])
        copies = self._copies(case)
        self._make_room(keys.values())
        shared: dict[str, Any] = {}
        for name, kind in signature.tensors.items():
            if name in keys:
                copies = min(copies, self._fill(keys[name], inputs[name], copies, keys.values()))
            elif isinstance(inputs.get(name), Weight):
                shared[name] = self.backend.pack(inputs[name])
            else:
                shared[name] = self.backend.alloc(kind)
        launches: list[Launch] = []
        for i in range(copies):
            buffers = shared | {name: self._pool[key][i] for name, key in keys.items()}
            tensors = {
                name: DeviceTensor(buffers[name], kind.shape, kind.dtype, 0, dense_stride(kind.shape))
                for name, kind in signature.tensors.items()
            }
            launches.append(self.backend.bind(BoundCall(op.name, tensors, signature.attrs, case.name)))
            if i == 0:
                first = tensors
        streamed = copies * signature_bytes(signature, case.streamed)
        return Placed(self.backend, op, case, answer, inputs, first, launches, streamed)

    def release(self) -> None:
        """Forget all buffers: what comes next has other types."""
        self._pool.clear()
        self._hosts.clear()

    def _keys(self, op: Op, case: BenchCase) -> dict[str, Key]:
        """Where in the pool each streamed parameter is found; two of one type in a call are two entries."""
        keys: dict[str, Key] = {}
        for name in case.streamed:
            kind = case.signature.tensors[name]
            what = "weight" if kind.dtype in FORMATS else name
            ordinal = sum(key[:2] == (what, kind) for key in keys.values())
            keys[name] = (what, kind, ordinal)
        return keys

    def _weight(self, key: Key, rng: np.random.Generator) -> Weight:
        if key not in self._hosts:
            self._hosts[key] = large_weight(rng, key[1])
        return self._hosts[key]

    @staticmethod
    def _copies(case: BenchCase) -> int:
        """As many as a step reads other bytes between two uses of the same, up to STREAM_BYTES."""
        per_call = signature_bytes(case.signature, case.streamed)
        wanted = math.ceil(min(case.reach, STREAM_BYTES) / per_call) if per_call else 1
        return max(1, min(wanted, MOST_COPIES))

    def _fill(self, key: Key, value: Any, count: int, needed: Collection[Key]) -> int:
        """Make the pool hold `count` copies of `value`, or as many as the host's memory allows; how many it holds."""
        copies = self._pool.setdefault(key, [])
        while len(copies) < count:
            if copies and host_memory() < SPARE_BYTES and not self._drop(needed):
                break
            if isinstance(value, Weight):
                copies.append(self.backend.pack(value))
            else:
                copies.append(self.backend.alloc(type_of(value)))
                self.backend.write(copies[-1], value)
        return len(copies)

    def _make_room(self, needed: Collection[Key]) -> None:
        """Drop what was used least recently while more than POOL_BYTES are held."""
        for key in needed:
            if key in self._pool:
                self._pool[key] = self._pool.pop(key)  # to the end: most recently used
        while sum(len(copies) * bytes_of(key[1]) for key, copies in self._pool.items()) > POOL_BYTES:
            if not self._drop(needed):
                break

    def _drop(self, needed: Collection[Key]) -> bool:
        """Forget the buffers of one type that are not `needed` now; whether there were any."""
        idle = next((key for key in self._pool if key not in needed), None)
        if idle is not None:
            del self._pool[idle]
        return idle is not None


def bytes_of(kind: TensorType) -> int:
    if kind.dtype in FORMATS:
        return kind.shape[0] * FORMATS[kind.dtype].row_bytes(kind.shape[1])
    return math.prod(kind.shape) * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize


@dataclass
class Placed:
    """A case on the device. `launches` differ in the copies of what is streamed; `streamed` counts their bytes."""

    backend: Backend
    op: Op
    case: BenchCase
    kernel: Kernel
    inputs: dict[str, Any]
    tensors: Mapping[str, DeviceTensor]  # of the first launch
    launches: Sequence[Launch]
    streamed: int

    @property
    def cost(self) -> Cost:
        return self.op.cost_of(self.case.signature, self.inputs)

    def check(self) -> float:
        """Largest error as a part of its bound, from one run on fresh inputs; raises WrongResult.

        Every element must have been written and be finite; as many as the float64 reference can do in a moment are
        compared with it (`CHECKED_WORK`): the first, the last and some between, along the axes that the op splits.
        """
        got = self._run()
        verdict = self._judge(got)
        if verdict.reason:
            raise WrongResult(f"{self.kernel.name} is wrong, not timed: {verdict.reason}")
        return verdict.ratio

    def _run(self) -> dict[str, Array]:
        for param in self.op.params:
            tensor = self.tensors.get(param.name)
            if tensor is not None and param.role != "weight":
                value = self.inputs.get(param.name)
                if value is None:
                    value = filled(math.prod(tensor.shape), tensor.dtype, True).reshape(tensor.shape)
                self.backend.write(tensor.buffer, np.ascontiguousarray(value))
        self.backend.capture([self.launches[0]])()
        self.backend.synchronize()
        return {
            param.name: self.backend.read(self.tensors[param.name].buffer, self.tensors[param.name].type)
            for param in self.op.params
            if param.is_written and param.name in self.tensors
        }

    def _judge(self, got: dict[str, Array]) -> Verdict:
        for name, value in got.items():
            poison = bits_of(filled(1, self.tensors[name].dtype, True))[0]
            unwritten = int(np.count_nonzero(bits_of(value) == poison)) if name not in self.inputs else 0
            if unwritten:
                return Verdict(math.inf, f"{unwritten} of {value.size} elements of {name} were not written")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                where = ", ".join(map(str, np.argwhere(~np.isfinite(value))[0]))
                return Verdict(math.inf, f"{name}[{where}] is not finite")
        inputs, outputs = self._sample(got)
        types = {name: type_of(value) for name, value in {**inputs, **outputs}.items()}
        signature = self.op.signature(types, self.case.signature.attrs)
        wide = fp64(inputs)
        with np.errstate(all="ignore"):
            expected = self.op.reference(wide, signature.attrs)
            as_case = Case(self.case.name, {}, signature.attrs)
            return judge(self.op, as_case, signature, wide, expected, outputs, self.kernel.numerics)

    def _sample(self, got: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
        """Inputs and outputs, cut along the axes that the op splits until the reference has no more than its work."""
        dims = self.op.bind(self.case.signature.tensors)
        counts = {axis: dims[axis] for axis in self.op.splits if axis in dims}
        while True:
            kinds = {
                name: TensorType(
                    tuple(counts.get(axis, n) for axis, n in zip(self.op.param(name).axes, kind.shape, strict=True)),
                    kind.dtype,
                )
                for name, kind in self.case.signature.tensors.items()
            }
            cost = self.op.cost(self.op.signature(kinds, self.case.signature.attrs))
            largest = max(counts, key=lambda axis: counts[axis], default=None)
            if largest is None or counts[largest] <= 4 or cost.flops + 64 * cost.nbytes <= CHECKED_WORK:
                break
            counts[largest] = max(4, counts[largest] // 2)
        taken = {axis: spread(dims[axis], count) for axis, count in counts.items() if count < dims[axis]}
        return part(self.op, self.inputs, taken), part(self.op, got, taken)

    def rounds(self, budget_s: float) -> tuple[Callable[[], None], int, int]:
        """(one round, calls in it, how many rounds): what the clock runs, in about `budget_s` seconds in all.

        A round launches each copy in turn, several times over if that takes less than ROUND_S, and waits once at its
        end; where a few launches take that long, the next round goes on with the next copies.
        """
        took = self._estimate()
        copies, calls = len(self.launches), max(1, min(MOST_LAUNCHES, round(ROUND_S / max(took, 1e-9))))
        if calls >= copies:
            groups = [list(self.launches) * (calls // copies)]
        else:
            groups = [list(self.launches[i : i + calls]) for i in range(0, copies - calls + 1, calls)]
        calls, synchronize = len(groups[0]), self.backend.synchronize
        wanted = int(budget_s / max(calls * took, 1e-9))
        least = LEAST_ROUNDS if calls * took * LEAST_ROUNDS < 4 * budget_s else FEWEST_ROUNDS
        rounds = max(least, min(MOST_ROUNDS, wanted))
        captured = itertools.cycle([self.backend.capture(group) for group in groups[: rounds + 1]])

        def one() -> None:
            next(captured)()
            synchronize()

        return one, calls, rounds

    def _estimate(self) -> float:
        """About how long a launch takes: of few if they are long, since each may take a second."""
        count, took = 1, 0.0
        while True:
            probe = self.backend.capture(list(self.launches[:count]))
            started = time.perf_counter()
            probe()
            self.backend.synchronize()
            took = time.perf_counter() - started
            if took > ROUND_S / 4 or count >= min(64, len(self.launches)):
                return took / count
            count = min(4 * count, 64, len(self.launches))


def spread(length: int, count: int) -> Array:
    """`count` different indices below `length`, in order: the first, the last, and some that no tile size divides."""
    rng = np.random.default_rng(length)
    inner = rng.choice(np.arange(1, length - 1), count - 2, replace=False)
    return np.sort(np.concatenate([[0, length - 1], inner]))
