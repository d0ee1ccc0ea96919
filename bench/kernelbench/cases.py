"""What is timed: the calls that real models make, found by building their programs. No op is named here.

A case is a signature. Those of a model come from its own decode and prefill programs (runtime/model.py), fused calls
and the primitives they decompose into alike. An op that no program of the model calls gets the model's sizes for its
axes, by their names; one whose axes no model has, the most expensive of its own conformance cases.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from generate_model import SHAPES, Shape
from polykern.kernels.errors import ContractError, UsageError
from polykern.kernels.op import Case, Op, Param, Signature, TensorType, signature_bytes
from polykern.kernels.ops import OPS, case_signature
from polykern.kernels.program import Call, Program, decompose
from polykern.kernels.quant import FORMATS
from polykern.kernels.rope import RopeScaling
from polykern.runtime.config import ARCHITECTURES, Layer, ModelConfig, Rope, expected_tensors
from polykern.runtime.model import Head, build_program

TOKENS = (1, 8, 512)
CONTEXTS = (128, 4096)


@dataclass(frozen=True)
class Model:
    """The shape of a published model, and the formats its weights usually come in (`head`: the logits' matrix)."""

    name: str
    shape: Shape
    format: str
    head_format: str

    @property
    def head_dim(self) -> int:
        return self.shape.d_model // self.shape.heads

    def config(self, context: int) -> ModelConfig:
        architecture = ARCHITECTURES["llama"]
        layers = (Layer(self.shape.heads, self.shape.kv_heads, self.shape.ff),) * self.shape.layers
        tensors: dict[str, TensorType] = {}
        for name, shape, is_required in expected_tensors(
            architecture, self.shape.vocab, self.shape.d_model, self.head_dim, layers
        ):
            is_head = name == ("token_embd.weight" if self.shape.tied else "output.weight")
            if is_required or is_head:
                dtype = "f32" if len(shape) == 1 else self.head_format if is_head else self.format
                tensors[name] = TensorType(shape, dtype)
        return ModelConfig(
            architecture=architecture,
            context_length=context,
            embedding_length=self.shape.d_model,
            vocab_size=self.shape.vocab,
            head_dim=self.head_dim,
            layers=layers,
            rms_eps=float(np.float32(1e-5)),  # as a file holds it
            rope=Rope(self.head_dim, self.shape.rope_base, RopeScaling()),
            attention_scale=0.0,
            attention_softcap=0.0,
            final_softcap=0.0,
            tensors=tensors,
        )

    def axes(self, tokens: int, context: int, page_size: int) -> dict[str, int]:
        """Lengths of axes by the names that the contract gives them."""
        pages = -(-context // page_size)
        return {
            "tokens": tokens, "rows": 1, "sequences": 1, "vocab": self.shape.vocab,
            "features": self.shape.d_model, "in_features": self.shape.d_model, "out_features": self.shape.ff,
            "heads": self.shape.heads, "kv_heads": self.shape.kv_heads, "head_dim": self.head_dim,
            "rot_dim": self.head_dim, "table_length": context,
            "pages": pages, "max_pages": pages, "page_size": page_size,
        }  # fmt: skip


# Formats: those of the default model's file; Q4_0 throughout; llama.cpp's Q4_K_M, but for the matrices which that keeps
# in Q6_K beside the head.
MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("135M", SHAPES["smollm2-135m"], "Q4_1", "Q8_0"),
        Model("1.7B", SHAPES["smollm2-1.7b"], "Q4_0", "Q4_0"),
        Model("8B", SHAPES["llama-3.1-8b"], "Q4_K", "Q6_K"),
    )
}


@dataclass(frozen=True)
class BenchCase:
    """One call to time.

    what      where in a model it stands ("ffn_down"); "" for an op that no program calls
    tokens    rows; 0 where the op has none
    context   keys that the last row sees, itself included; 0 where that makes no difference
    streamed  parameters that are others in every layer, so that a step finds none of their bytes in a cache
    reach     bytes that a step reads between two uses of the same weight: all of the model's weights and KV cache
    """

    signature: Signature
    model: str
    tokens: int
    what: str = ""
    context: int = 0
    streamed: tuple[str, ...] = ()
    reach: int = 0
    own_case: Case | None = None

    @property
    def op(self) -> str:
        return self.signature.op

    @property
    def shape(self) -> str:
        """The tensor that says most: the first weight, or the first tensor of floats."""
        tensors = self.signature.tensors.values()
        kinds = [k for k in tensors if k.dtype in FORMATS] or [k for k in tensors if k.dtype.startswith("f")]
        kind = (kinds or list(tensors))[0]
        size = "x".join(map(str, kind.shape))
        return f"{size} {kind.dtype}" if kind.dtype in FORMATS else size

    @property
    def name(self) -> str:
        """Unique among the cases of a run, and the same in every run."""
        rows, context = f"M{self.tokens}" if self.tokens else "", f"ctx{self.context}" if self.context else ""
        parts = [self.op, self.what, self.model, rows, context, self.shape.replace(" ", "-")]
        return "-".join(part for part in parts if part)


def build_cases(
    page_size: int,
    *,
    models: Iterable[str] = tuple(MODELS),
    tokens: Sequence[int] = TOKENS,
    contexts: Sequence[int] = CONTEXTS,
    ops: Iterable[str] | None = None,
    weight_format: str | None = None,
    precision: str = "fast",
    contract: Mapping[str, Op] = OPS,
) -> list[BenchCase]:
    """Every case there is for a device of this page size: by model, then rows, then op in the contract's order.

    ops            only these; None: all
    weight_format  this format for every weight instead of the models' own
    contract       the ops there are, by name

    Raises UsageError for a name that nobody knows.
    """
    wanted = [known("op", name, contract) for name in (contract if ops is None else ops)]
    if weight_format is not None:
        known("weight format", weight_format, FORMATS)
    order = list(contract)
    cases: list[BenchCase] = []
    for name in models:
        model = MODELS[known("model", name, MODELS)]
        if weight_format:
            model = replace(model, format=weight_format, head_format=weight_format)
        # Also of rows that are not asked for: so that a case has the same name whatever else runs.
        all_tokens = sorted({*TOKENS, *tokens})
        found = [
            case for rows in all_tokens for case in _of_model(model, rows, contexts, page_size, precision, contract)
        ]
        called = {case.op for case in found}
        uncalled = [op for op in contract.values() if op.name not in called]
        found += [
            _uncalled(op, model, rows, max(contexts), page_size, precision) for op in uncalled for rows in all_tokens
        ]
        different = {str(case.signature): case for case in reversed(found)}.values()
        cases += sorted(
            (case for case in different if case.op in wanted and case.tokens in (0, *tokens)),
            key=lambda case: (case.tokens, order.index(case.op), found.index(case)),
        )
    return cases


def known(what: str, name: str, names: Iterable[str]) -> str:
    """`name` if it is one of `names`; a UsageError that suggests one if not."""
    names = list(names)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1)
    raise UsageError(
        f"unknown {what} {name!r}{f'; did you mean {close[0]!r}?' if close else ';'} known: {', '.join(names)}"
    )


@dataclass
class _Found:
    """A signature in the programs of a model: where it stands, and the buffers each of its parameters is bound to."""

    signature: Signature
    what: str
    context: int
    reach: int = 0
    buffers: dict[str, set[str]] = field(default_factory=dict[str, "set[str]"])


def _of_model(
    model: Model, tokens: int, contexts: Sequence[int], page_size: int, precision: str, contract: Mapping[str, Op]
) -> list[BenchCase]:
    """The cases of the model's programs for `tokens` rows.

    A chunk of 512 tokens fills a context of 128 four times over: what it is then timed at is 512. Where a longer
    context does not even double what a call has to do, the longest stands for all.
    """
    found: list[list[_Found]] = []
    kinds: dict[str, str] = {}
    for context in sorted({max(context, tokens) for context in contexts}):
        calls: dict[str, _Found] = {}
        for program in _programs(model, tokens, context, page_size, precision):
            kinds.update({name: spec.kind for name, spec in program.buffers.items()})
            reach = _streamed_bytes(program)
            for signature, call in _calls(program, contract):
                what = call.label.split(".", 2)[-1]
                entry = calls.setdefault(str(signature), _Found(signature, what, context))
                entry.reach = max(entry.reach, reach)
                for name, view in call.args.items():
                    entry.buffers.setdefault(name, set()).add(view.buffer)
        found.append(list(calls.values()))
    cases: list[BenchCase] = []
    for entries in zip(*found, strict=True):  # the same call in every context
        op = contract[entries[0].signature.op]
        costs = [op.cost(entry.signature) for entry in entries]
        grows = costs[-1].nbytes >= 2 * costs[0].nbytes or costs[-1].flops > 2 * costs[0].flops
        for entry in entries if grows else entries[-1:]:
            streamed = tuple(param.name for param in op.params if _is_streamed(param, entry, kinds))
            rows = op.bind(entry.signature.tensors).get("tokens", 0)
            context = entry.context if grows else 0
            what = "" if entry.what == op.name else entry.what
            cases.append(BenchCase(entry.signature, model.name, rows, what, context, streamed, entry.reach))
    return cases


def _is_streamed(param: Param, entry: _Found, kinds: Mapping[str, str]) -> bool:
    """Whether a step reads another buffer here at each use: a weight, or state that each layer has of its own."""
    buffers = entry.buffers.get(param.name, set())
    if param.role == "weight":
        return bool(buffers)
    return len(buffers) > 1 and all(kinds.get(buffer) == "state" for buffer in buffers)


def _programs(model: Model, tokens: int, context: int, page_size: int, precision: str) -> Iterator[Program]:
    """What a runtime runs at so many rows: a decode step in each of its kinds, or a chunk of a prompt."""
    config = model.config(context)
    kinds: list[tuple[ModelConfig, Head]] = [(config, "argmax")]
    if tokens == 1:
        kinds += [(config, "sample"), (replace(config, final_softcap=30.0), "argmax")]
    for kind, head in kinds:
        yield build_program(kind, tokens=tokens, ctx=context, page_size=page_size, head=head, precision=precision)


def _calls(program: Program, contract: Mapping[str, Op]) -> Iterator[tuple[Signature, Call]]:
    """Every call of a program, and the calls that fused ones decompose into."""
    pending = list(program.calls)
    while pending:
        call = pending.pop(0)
        op = contract.get(call.op)
        if op is None:
            continue
        signature = op.signature({name: view.type for name, view in call.args.items()}, call.attrs)
        yield signature, call
        if op.decompose:
            pending += decompose(op, call, signature)[0]


def _streamed_bytes(program: Program) -> int:
    """Bytes of weights and of state that belongs to a layer: what a step reads once."""
    kept = [spec for spec in program.buffers.values() if spec.kind == "weight" or spec.name.startswith("blk.")]
    kinds = {spec.name: TensorType(spec.shape, spec.dtype) for spec in kept}
    return signature_bytes(Signature("", kinds), kinds)


def _uncalled(op: Op, model: Model, tokens: int, context: int, page_size: int, precision: str) -> BenchCase:
    """An op that the model's programs do not call, at the model's sizes."""
    axes = model.axes(tokens, context, page_size)
    attrs = {"precision": precision} if "precision" in op.attrs else {}
    try:
        tensors = {
            param.name: TensorType(
                tuple(int(axis) if axis.isdigit() else axes[axis] for axis in param.axes),
                model.format if param.role == "weight" else param.dtypes[0],
            )
            for param in op.params
            if not param.optional
        }
        signature = op.signature(tensors, attrs)
    except (KeyError, ContractError):
        largest = max(op.cases, key=lambda case: op.cost(case_signature(op, case)).nbytes)
        signature = case_signature(op, largest)
        return BenchCase(signature, model.name, op.bind(signature.tensors).get("tokens", 0), "", own_case=largest)
    streamed = tuple(param.name for param in op.params if param.role == "weight")
    reach = _streamed_bytes(next(_programs(model, tokens, context, page_size, precision)))
    return BenchCase(signature, model.name, tokens if "tokens" in op.bind(tensors) else 0, "", 0, streamed, reach)
