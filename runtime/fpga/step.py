"""Cycles of a decode step, call by call, from the model's own program and the engine of hls/README.md.

A call takes

    max(memory, compute) + depth

memory   what it reads, weights in the engine's beats or keys and values, over what the channels bring: the data sheet's
         rate times the part of it that long sequential reads were measured to get. Rows are dealt to the channels, so
         the one with most rows counts
compute  beats and words of weights (cycles.py); keys over the attention units; passes of 16 floats for the rest
depth    what nothing overlaps: the passes that make x (norm, rounding to int8) before the first weight can be used, the
         memory's latency, the pipeline's latency, and the host's enqueue, if there is one

Calls follow each other, as their data do: no weights are read ahead while one drains. Left out: whatever else uses the
memory, a clock that placement does not reach, and a KV cache that lies across the channels unevenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import ceil, prod

from ...kernels.errors import UsageError
from ...kernels.op import Op, Signature, TensorType
from ...kernels.ops import OPS
from ...kernels.program import Program
from ...kernels.quant import FORMATS
from ..config import ModelConfig
from ..model import build_program
from . import constants as c
from .configuration import Configuration, Widths, resources
from .engine import element_for, row_cycles
from .estimate import CallEstimate, Estimate
from .parts import BEAT_BYTES, Part
from .streams import BEAT_BITS, STREAMS, WHAT_IF, Stream

LOOKUP = "token_embd.weight"
PAGE_SIZE = 16  # tokens; only how the last page is filled up depends on it


@dataclass(frozen=True)
class Kind:
    """Calls of a program that are alike: their op and signature, the first one's label, and how many."""

    op: Op
    signature: Signature
    label: str
    times: int

    @cached_property
    def weights(self) -> list[TensorType]:
        """The matrices that are read as a whole: an embedding looks up one row."""
        names = [param.name for param in self.op.params if param.role == "weight"]
        return [] if self.op.name == "embedding" else [self.signature.tensors[name] for name in names]

    @cached_property
    def text(self) -> str:
        return str(self.signature)

    @cached_property
    def reads_cache(self) -> bool:
        """Whether keys and values are read, rather than appended."""
        return any("pages" in param.axes and not param.is_written for param in self.op.params)


class Step:
    """A model's decode step, ready to be estimated for many configurations.

    `ctx` tokens are in the cache. `fmt`, a name of STREAMS or WHAT_IF, replaces the format of all matrices that
    are multiplied. `kv_bits`:
    of a number in the cache, 16 as in the program, or 8 to compare with what others built.
    """

    def __init__(self, config: ModelConfig, ctx: int, fmt: str | None = None, kv_bits: int = 16) -> None:
        self.kv_bits = kv_bits
        self.streams: dict[str, Stream] = dict(STREAMS)
        if fmt is not None:
            stored = self._replace(fmt)
            kept = "" if config.head == LOOKUP else LOOKUP
            matrices = {name: kind for name, kind in config.tensors.items() if len(kind.shape) == 2 and name != kept}
            changed = {name: _as(stored, kind) for name, kind in matrices.items()}
            config = replace(config, tensors={**config.tensors, **changed})
        program = build_program(config, tokens=1, ctx=ctx, page_size=PAGE_SIZE)
        self.kinds = list(kinds(program))
        matrices = [matrix for kind in self.kinds for matrix in kind.weights]
        self.used_streams = {self.streams[matrix.dtype] for matrix in matrices}
        scratch = [spec for spec in program.buffers.values() if spec.kind == "scratch"]
        self.widths = Widths(
            in_features=max(matrix.shape[1] for matrix in matrices),
            scratch=sum(prod(spec.shape) for spec in scratch) - config.vocab_size,
            vocab=config.vocab_size,
        )
        self.memory = self._memory(program)
        layer = config.layers[0]
        self.heads, self.kv_heads = layer.heads, layer.kv_heads

    def _replace(self, fmt: str) -> str:
        """Make `fmt` the stream of a GGUF format, and name that."""
        if fmt not in STREAMS and fmt not in WHAT_IF:
            raise UsageError(f"no format {fmt!r}; there is {', '.join((*STREAMS, *WHAT_IF))}")
        stored, stream = WHAT_IF.get(fmt) or (fmt, STREAMS[fmt])
        self.streams[stored] = stream
        return stored

    def _memory(self, program: Program) -> dict[str, int]:
        """Bytes in the board's memory: weights in the engine's beats (an embedding that is no head: as in the file)."""
        read = {
            view.buffer
            for call in program.calls
            for name, view in call.args.items()
            if OPS[call.op].param(name).role == "weight" and call.op != "embedding"
        }
        weights = cache = 0
        for spec in program.buffers.values():
            if spec.name in read:
                weights += spec.shape[0] * self.streams[spec.dtype].row_beats(spec.shape[1]) * BEAT_BYTES
            elif spec.kind == "weight":
                rows = spec.shape[0] if len(spec.shape) == 2 else 1
                fmt = FORMATS[spec.dtype.upper()]  # a vector is f32, which is a format's name, too
                weights += rows * fmt.row_bytes(spec.shape[-1])
            elif spec.name.endswith((".k_pages", ".v_pages")):
                cache += prod(spec.shape) * self.kv_bits // 8
        return {"weights": weights, "KV cache": cache}

    def estimate(self, part: Part, configuration: Configuration, launch_us: float = 0.0) -> Estimate:
        """`launch_us`: what the host needs to start one call; 0 where a sequencer on the card runs the whole step."""
        ports = configuration.port_bits or part.port_bits
        at = replace(configuration, kv_bits=self.kv_bits, port_bits=ports)
        calls = tuple(self._call(part, at, launch_us * at.mhz, kind) for kind in self.kinds)
        return Estimate(part, at, calls, resources(at, self.used_streams, self.widths), self.memory)

    def _call(self, part: Part, at: Configuration, launch: float, kind: Kind) -> CallEstimate:
        if kind.weights:
            stream = self.streams[kind.weights[0].dtype]
            cost = product(part, at, stream, kind.weights, "weight" in kind.signature.tensors)
        elif kind.reads_cache:
            cost = attention(part, at, kind)
        else:
            cost = vector(part, at, kind)
        nbytes, memory, compute, depth = cost
        depth += launch + c.MEMORY_LATENCY.value
        return CallEstimate(kind.op.name, kind.label, kind.text, nbytes, memory, compute, depth, kind.times)


def kinds(program: Program) -> Iterator[Kind]:
    """The calls of a program, those that are alike together, in order of first appearance."""
    made = [
        (OPS[call.op], OPS[call.op].signature({name: v.type for name, v in call.args.items()}, call.attrs), call.label)
        for call in program.calls
    ]
    first = {str(signature): place for place, (_, signature, _) in reversed(list(enumerate(made)))}
    made.sort(key=lambda item: first[str(item[1])])
    for _, same in groupby(made, lambda item: str(item[1])):
        alike = list(same)
        yield Kind(*alike[0], len(alike))


def _as(fmt: str, kind: TensorType) -> TensorType:
    """A matrix's type in another format."""
    block = FORMATS[fmt].block_length
    if kind.shape[1] % block:
        raise UsageError(
            f"{fmt} needs rows of a multiple of {block} numbers, and this model has rows of {kind.shape[1]}"
        )
    return TensorType(kind.shape, fmt)


# What a call reads from memory in bytes, and its cycles: memory, compute, depth.
Cost = tuple[float, float, float, float]


def pace(part: Part, at: Configuration, active: int) -> float:
    """Bytes that each of `active` channels' memory brings in a cycle."""
    return part.channel_gb_per_s(active) * 1e3 / at.mhz


def product(part: Part, at: Configuration, stream: Stream, weights: Sequence[TensorType], normed: bool) -> Cost:
    """Matrices times one x, their rows dealt to the channels."""
    out_features, in_features = sum(kind.shape[0] for kind in weights), weights[0].shape[1]
    rows = ceil(out_features / at.channels)
    beats = stream.row_beats(in_features)
    if stream.is_float:
        cycles = stream.weight_beats(in_features) * stream.weights_per_beat // c.EXACT_LANES.value
    else:
        cycles = row_cycles(stream, at.lanes, in_features)
    compute = rows * max(cycles, beats * BEAT_BITS / at.port_bits)
    # A norm takes two passes, the sum of squares and the product; rounding to int8 is in the last one.
    passes = ceil(in_features / c.FLOATS_PER_CYCLE.value) * (2 if normed else 1)
    depth = passes + 1 + element_for(stream, at.lanes, at.products).latency + (c.ROOT_DEPTH.value if normed else 0)
    return out_features * beats * BEAT_BYTES, rows * beats * BEAT_BYTES / pace(part, at, at.channels), compute, depth


def attention(part: Part, at: Configuration, kind: Kind) -> Cost:
    """As in hls/attention.cpp: a copy has the units of the query heads that share a kv head, and a port each for keys
    and values. Fewer units than such heads read the keys again; more are further copies, for other kv heads."""
    heads, head_dim = kind.signature.tensors["q"].shape[1:]
    kv_heads = kind.signature.tensors["k_pages"].shape[1]
    keys = kind.op.cost(kind.signature).flops // (4 * heads * head_dim)
    group = heads // kv_heads
    copies, rounds = max(1, at.attention_units // group), ceil(group / at.attention_units)
    ports = min(at.channels, 2 * copies)
    nbytes = 2 * keys * kv_heads * rounds * head_dim * at.kv_bits / 8
    # Values are worked on beside the next keys, so a key costs the words of one of them.
    words = keys * rounds * ceil(kv_heads / copies) * ceil(head_dim / c.ATTENTION_LANES.value)
    compute = max(words, nbytes * 8 / (ports * at.port_bits))
    # Two trees of 16 products, the exponential between them; then the heads are put together.
    trees = 2 * (1 + c.ATTENTION_LANES.value.bit_length() - 1) * c.FLOAT_DEPTH.value
    depth = trees + c.EXP_DEPTH.value + ceil(heads * head_dim / c.FLOATS_PER_CYCLE.value)
    return nbytes, nbytes / (ports * pace(part, at, ports)), compute, depth


def vector(part: Part, at: Configuration, kind: Kind) -> Cost:
    """A pass over the longest tensor on the chip; from memory comes a row of the embedding or of the angles."""
    tensors, row, longest = kind.signature.tensors, 0.0, 0
    for param in kind.op.params:
        tensor = tensors.get(param.name)
        if tensor is None or "pages" in param.axes:
            continue
        if param.role == "weight":
            row += FORMATS[tensor.dtype].row_bytes(tensor.shape[1])
        elif param.values == "angles":
            row += 4 * tensor.shape[1]
        else:
            longest = max(longest, prod(tensor.shape))
    is_norm = "weight" in tensors
    passes, depth = (2, c.FLOAT_DEPTH.value + c.ROOT_DEPTH.value) if is_norm else (1, c.FLOAT_DEPTH.value)
    return row, row / pace(part, at, 1), passes * ceil(longest / c.FLOATS_PER_CYCLE.value), depth
