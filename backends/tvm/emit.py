"""Writing a kernel in TIR: memory, vectors and loops for the op files of this folder.

A kernel is a C function `void kernel(int64 *arguments, int32 worker, int32 workers)`: its arguments lie in one array of
64-bit slots, read in the order in which the emitting function asks for them, and each of `workers` threads calls it
with its own number and does its share. That is what lets one call run a whole decode step (driver.py).

Only here is TVM imported, and only while a kernel is compiled: a start from the cache needs no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .target import VNNI512, HostTarget

Expr = Any  # a tirx expression
LANES = 16  # of every vector: what AVX-512 holds; LLVM splits them where registers are shorter

DEALT_ROWS = 128
MANY_ROWS = 192  # for each worker

_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "uint16": 2, "int32": 4, "uint32": 4, "float32": 4, "int64": 8}


def _exp2_polynomial(degree: int) -> Any:
    """Factors of the powers of r, the highest first, of 2**r on |r| <= 1/2."""
    zeros = np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1)) / 2
    return np.polyfit(zeros, np.exp2(zeros), degree)


class Memory:
    """Elements of one dtype from an address on. Indices are int32 expressions.

    TVM tells LLVM that two of them do not overlap: what is written through one must not be read through another in the
    same kernel, an `at` of it included.
    """

    def __init__(self, k: Emitter, address: Expr, dtype: str) -> None:
        self._k, self._address, self.dtype = k, address, dtype
        pointer = k.T.handle(dtype)
        k.T.Bind(k.T.reinterpret(pointer.ty, address), var=pointer)
        self._buffer = k.T.decl_buffer((1 << 40,), dtype, data=pointer)

    def at(self, element: Expr) -> Memory:
        """The memory from `element` on (an int32 or int64 expression)."""
        offset = self._k.wide(element) * self._k.T.int64(_BYTES[self.dtype])
        return Memory(self._k, self._k.let(self._address + offset), self.dtype)

    def as_dtype(self, dtype: str) -> Memory:
        """The same memory as elements of another dtype."""
        return Memory(self._k, self._address, dtype)

    def __getitem__(self, index: Expr) -> Expr:
        return self._buffer[index]

    def __setitem__(self, index: Expr, value: Expr) -> None:
        self._k.T.buffer_store(self._buffer, value, [index])

    def load(self, index: Expr, lanes: int = LANES) -> Expr:
        """`lanes` elements as a vector."""
        return self._k.let(self._buffer[self._k.T.ramp(index, 1, lanes)])

    def store(self, index: Expr, value: Expr, lanes: int = LANES) -> None:
        self._k.T.buffer_store(self._buffer, value, [self._k.T.ramp(index, 1, lanes)])

    def prefetch(self, index: Expr) -> None:
        """Ask for the cache line of `index`, into the second level.

        The first has few fill buffers, and code waits for them while all lead to memory: a 1.7B model decoded 21.6
        tokens a second that way, 24.8 this way (bench/README.md, Notebook).
        """
        T = self._k.T
        address = T.address_of(self._buffer[index])
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(2), T.int32(1)))


class Local:
    """A variable, scalar or vector; LLVM keeps it in a register."""

    def __init__(self, k: Emitter, dtype: str, value: Expr) -> None:
        self._k, self._buffer = k, k.T.alloc_buffer((1,), dtype)
        self.set(value)

    def get(self) -> Expr:
        return self._k.T.Bind(self._buffer[0])

    def set(self, value: Expr) -> None:
        self._k.T.buffer_store(self._buffer, value, [0])


class Emitter:
    """One kernel being written. `T` is TVM's builder; `worker` and `workers` are int32 expressions."""

    def __init__(self, target: HostTarget, T: Any) -> None:
        self.target, self.T = target, T
        arguments = T.arg("arguments", T.handle("int64"))
        self.worker = T.arg("worker", T.int32())
        self.workers = T.arg("workers", T.int32())
        self._slots = T.decl_buffer((256,), "int64", data=arguments)
        self._taken = 0

    # Arguments, in order

    def _slot(self) -> Expr:
        self._taken += 1
        return self.let(self._slots[self._taken - 1])

    def pointer(self, dtype: str) -> Memory:
        return Memory(self, self._slot(), dtype)

    def integer(self) -> Expr:
        return self.let(self.T.Cast("int32", self._slot()))

    def real(self) -> Expr:
        """A float32, which launch.py stores as the bits of a float64."""
        return self.let(self.T.Cast("float32", self.T.reinterpret("float64", self._slot())))

    # Statements

    def let(self, value: Expr) -> Expr:
        """Compute once, here.

        Through a variable: a value that only has a name TVM puts back where it is used, the same sum twice at each step
        of a tree, and divisions into inner loops. LLVM makes a register of it.
        """
        dtype = str(getattr(value, "ty", "bool"))  # `==` has no type yet
        return self.T.Bind(value) if dtype.startswith("bool") else Local(self, dtype, value).get()

    def local(self, dtype: str, value: Expr) -> Local:
        return Local(self, dtype, value)

    def spill(self, value: Expr) -> Any:
        """The lanes of a float vector in memory, to be indexed."""
        lanes = self.T.alloc_buffer((LANES,), "float32")
        self.T.buffer_store(lanes, value, [self.T.ramp(0, 1, LANES)])
        return lanes

    def loop(self, start: Expr, stop: Expr) -> Any:
        return self.T.serial(start, stop)

    @contextmanager
    def when(self, condition: Expr) -> Generator[None]:
        with self.T.If(condition), self.T.Then():
            yield

    @contextmanager
    def branches(self, condition: Expr) -> Generator[tuple[Any, Any]]:
        """`with branches(c) as (yes, no): with yes: ...; with no: ...`"""
        with self.T.If(condition):
            yield self.T.Then(), self.T.Else()

    def share(self, count: Expr) -> Any:
        """The loop over this worker's part of `count` items: one consecutive run, so that memory streams."""
        return self.loop(*self.part(count, self.worker, self.workers))

    def part(self, count: Expr, number: Expr, parts: Expr) -> tuple[Expr, Expr]:
        """Where part `number` of `parts` of `count` items begins and ends."""
        count, parts, number = self.wide(count), self.wide(parts), self.wide(number)

        def bound(number: Expr) -> Expr:
            return self.let(self.cast(self.div(count * number, parts), "int32"))

        return bound(number), bound(number + self.T.int64(1))

    @contextmanager
    def dealt(self, count: Expr, size: Expr, worker: Expr = None, workers: Expr = None) -> Generator[Expr]:
        """The loop over this worker's part of `count` items, dealt out `size` at a time, forwards and backwards.

        `worker` of `workers`: another number than its own, where several share a part.
        """
        worker, workers = (self.worker if worker is None else worker), (self.workers if workers is None else workers)
        shares = self.div(count + (size - 1), size)
        with self.loop(0, self.div(shares + (workers - 1), workers)) as turn:
            place = self.T.Select(self.mod(turn, 2) == 0, worker, workers - 1 - worker)
            first = self.let((turn * workers + place) * size)
            with self.loop(self.T.min(first, count), self.T.min(first + size, count)) as item:
                yield item

    def rows_at_once(self, rows: Expr) -> Expr:
        """How many of the rows of a matrix are dealt out together.

        With many rows DEALT_ROWS, the same in every kernel: a worker finds in its second level what it wrote there
        itself, and attention, whose later rows cost more, is shared out evenly. Of few each worker has equal parts.
        """
        return self.let(
            self.T.Select(
                rows >= self.workers * MANY_ROWS,
                self.T.int32(DEALT_ROWS),
                self.div(rows + self.workers - 1, self.workers),
            )
        )

    def upper_halves(self, low: Expr, high: Expr) -> Expr:
        """uint32x16: of each lane the upper 16 bits of `low` below those of `high`.

        The fence keeps LLVM from making one permutation of shift and mask, vpermt2w, three operations on one port.
        """
        T = self.T
        moved = self.let(T.shift_right(low, self.splat(T.uint32(16))))
        floats = self.bits(moved, f"float32x{LANES}")
        fenced = self.let(T.call_llvm_pure_intrin(floats.ty, "llvm.arithmetic.fence.v16f32", floats))
        return self.let(
            T.bitwise_or(self.bits(fenced, "uint32x16"), T.bitwise_and(high, self.splat(T.uint32(0xFFFF0000))))
        )

    def copy(self, source: Memory, target: Memory, start: Expr, stop: Expr) -> None:
        """target[start:stop] = source[start:stop], in the dtype of `target`."""
        whole = self.div(stop - start, LANES)
        with self.loop(0, whole) as i:
            target.store(start + LANES * i, self.cast(source.load(start + LANES * i), f"{target.dtype}x{LANES}"))
        with self.loop(start + LANES * whole, stop) as i:
            target[i] = self.cast(source[i], target.dtype)

    # Numbers

    def wide(self, value: Expr) -> Expr:
        return self.T.Cast("int64", value)

    def f32(self, value: float) -> Expr:
        return self.T.float32(value)

    def div(self, a: Expr, b: Expr) -> Expr:
        """a / b of integers that are not negative: TVM's // also handles others, at the price of branches."""
        return self.let(self.T.truncdiv(a, b))

    def mod(self, a: Expr, b: Expr) -> Expr:
        return self.let(self.T.truncmod(a, b))

    def splat(self, value: Expr, lanes: int = LANES) -> Expr:
        if isinstance(value, float):
            value = self.f32(value)
        return self.T.broadcast(value, lanes)

    def cast(self, value: Expr, dtype: str) -> Expr:
        return self.T.Cast(dtype, value)

    def floats(self, value: Expr) -> Expr:
        return self.let(self.T.Cast(f"float32x{LANES}", value))

    def bits(self, value: Expr, dtype: str) -> Expr:
        return self.T.reinterpret(dtype, value)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        return self.let(self.T.fma(a, b, c))

    def rint(self, value: Expr) -> Expr:
        return self.T.nearbyint(value)

    def abs(self, value: Expr) -> Expr:
        return self.T.abs(value)

    def max(self, a: Expr, b: Expr) -> Expr:
        """The larger; the other one where either is NaN."""
        return self.let(self.T.call_llvm_pure_intrin(a.ty, "llvm.maxnum", a, b))

    def halves(self, value: Expr, lanes: int, dtype: str = "float32") -> tuple[Expr, Expr]:
        half = f"{dtype}x{lanes // 2}"
        return self.let(self.T.vectorlow(half, value)), self.let(self.T.vectorhigh(half, value))

    def lane(self, value: Expr, index: int) -> Expr:
        return self.shuffle([value], [index])

    def vector(self, values: Sequence[Expr]) -> Expr:
        """A vector of scalars."""
        return self.shuffle(values, range(len(values)))

    def shuffle(self, vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
        """The chosen lanes of the vectors laid end to end; a scalar where it is one."""
        from tvm import tirx

        shuffled: Any = tirx.Shuffle
        return self.let(shuffled(list(vectors), list(lanes)))

    def interleave(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """a0 b0 a1 b1 ... of the lower lanes of two vectors, and of the upper ones."""
        order = [lane + LANES * side for lane in range(LANES) for side in (0, 1)]
        low, high = (self.shuffle([a, b], half) for half in (order[:LANES], order[LANES:]))
        return low, high

    def transpose(self, rows: list[Expr]) -> list[Expr]:
        """Columns of LANES vectors: four rounds of interleaving row i with row i + 8 turn (row, lane) into
        (lane, row)."""
        half = LANES // 2
        for _ in range(4):
            rows = [v for i in range(half) for v in self.interleave(rows[i], rows[i + half])]
        return rows

    def sum_lanes(self, value: Expr, dtype: str = "float32") -> Expr:
        """The sum of the lanes of a vector, as a tree: log2(LANES) additions deep."""
        lanes = LANES
        while lanes > 2:
            low, high = self.halves(value, lanes, dtype)
            value, lanes = self.let(low + high), lanes // 2
        return self.let(self.lane(value, 0) + self.lane(value, 1))

    def larger(self, a: Expr, b: Expr) -> Expr:
        """The larger; b where either is NaN. One instruction, `max` takes three."""
        return self.let(self.T.Select(a > b, a, b))

    def max_lanes(self, value: Expr, pick: Callable[[Expr, Expr], Expr] | None = None) -> Expr:
        """The largest lane by `max`, or by `larger`."""
        pick, lanes = pick or self.max, LANES
        while lanes > 2:
            value = pick(*self.halves(value, lanes))
            lanes //= 2
        return pick(self.lane(value, 0), self.lane(value, 1))

    def min_lanes(self, value: Expr) -> Expr:
        """The smallest lane of int32x16."""
        lanes = LANES
        while lanes > 2:
            value = self.let(self.T.min(*self.halves(value, lanes, "int32")))
            lanes //= 2
        return self.let(self.T.min(self.lane(value, 0), self.lane(value, 1)))

    def all(self, *conditions: Expr) -> Expr:
        """Whether all hold. All are computed: one must not read what another one forbids."""
        result = conditions[0]
        for condition in conditions[1:]:
            result = self.T.And(result, condition)
        return result

    def exp(self, x: Expr) -> Expr:
        """e**x of float32x16: within 2 ulp, 0 below -87.3, infinity above 88.7, NaN for NaN.

        2**n * p(r), x = n ln 2 + r: Cody and Waite's reduction (Software Manual for the Elementary Functions, 1980,
        chapter 6) with ln 2 in two parts, p the Taylor polynomial of degree 7 on |r| <= ln 2 / 2 (its remainder is
        5e-9, a tenth of an ulp). 2**n is built from bits in two factors, so that n = 128 and n = -127 come out right.
        """
        n, p = self._reduced(x)
        # Outside this range the result is 0 or infinity whatever the polynomial says; NaN keeps its own p.
        n = self.let(self.T.Select(n < self.splat(-160.0), self.splat(-160.0), n))
        n = self.let(self.T.Select(n > self.splat(160.0), self.splat(160.0), n))
        whole = self.let(self.cast(n, f"int32x{LANES}"))
        first = self.let(self.T.shift_right(whole, self.splat(self.T.int32(1))))
        scaled = p
        for part in (first, whole - first):
            exponent = self.let((part + self.splat(self.T.int32(127))) * self.splat(self.T.int32(1 << 23)))
            scaled = self.let(scaled * self.bits(exponent, f"float32x{LANES}"))
        scaled = self.let(self.T.Select(x < self.splat(-104.0), self.splat(0.0), scaled))
        return self.let(self.T.Select(x > self.splat(89.0), self.splat(float("inf")), scaled))

    def exp_falling(self, x: Expr) -> Expr:
        """`exp` where x is not above 80, in two thirds of the instructions; 0 below -87.3."""
        n, p = self._reduced(x)
        whole = self.let(self.cast(n, f"int32x{LANES}"))
        exponent = self.let((whole + self.splat(self.T.int32(127))) * self.splat(self.T.int32(1 << 23)))
        scaled = self.let(p * self.bits(exponent, f"float32x{LANES}"))
        return self.let(self.T.Select(x < self.splat(-87.3), self.splat(0.0), scaled))

    def exp2(self, x: Expr) -> Expr:
        """2**x of float32x16 where x is not above 100: within 3 ulp, 0 below -127, NaN for NaN.

        2**n * p(r), x = n + r: p meets 2**r at the zeros of a Chebyshev polynomial on |r| <= 1/2, within 1.02e-7 (1.7
        ulp). n comes out in the last bits of x + 1.5 * 2**23; with n = -127 the bits of 2**n are those of 0.
        """
        T = self.T
        least, magic = self.splat(-127.0), self.splat(1.5 * 2.0**23)
        x = self.let(T.Select(least > x, least, x))  # which keeps NaN
        moved = self.let(x + magic)
        r = self.let(x - self.let(moved - magic))
        p, *rest = (self.splat(float(factor)) for factor in _exp2_polynomial(5))
        for factor in rest:
            p = self.fma(p, r, factor)
        bits = T.shift_left(self.let(self.bits(moved, "uint32x16")), self.splat(T.uint32(23)))
        return self.let(p * self.bits(self.let(bits + self.splat(T.uint32(0x3F800000))), f"float32x{LANES}"))

    def reciprocal(self, x: Expr) -> Expr:
        """1 / x of float32x16 within 1.5 ulp, for finite x that is not denormal."""
        if self.target.dot != VNNI512:
            return self.let(self.splat(1.0) / x)
        # 14 bits and Newton's step: 4 instructions, where a division of 16 numbers has the port for 16 cycles.
        T = self.T
        every = T.Cast("int16", T.int32(-1))
        guess = self.let(T.call_llvm_pure_intrin(x.ty, "llvm.x86.avx512.rcp14.ps.512", x, x, every))
        left = self.fma(self.let(self.splat(0.0) - x), guess, self.splat(1.0))
        return self.fma(guess, left, guess)

    def _reduced(self, x: Expr) -> tuple[Expr, Expr]:
        """(n, e**(x - n ln 2)), n whole: see `exp`."""
        n = self.let(self.rint(x * self.splat(1.4426950408889634)))
        r = self.fma(n, self.splat(-0.693359375), x)
        r = self.fma(n, self.splat(2.12194440e-4), r)
        p = self.splat(1 / 5040)
        for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = self.fma(p, r, self.splat(factor))
        return n, p

    def libm(self, name: str, value: Expr) -> Expr:
        """A function of the C library, one number at a time: for what no common model calls in its inner loops."""
        return self.let(self.T.call_pure_extern("float32", name, value))
