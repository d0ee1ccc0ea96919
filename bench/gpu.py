"""Everything that only a machine with a GPU can show, in one command and one file: `make gpu`.

    python bench/gpu.py                                  the first GPU; writes bench/results/gpu-NAME.json
    python bench/gpu.py --models tiny --formats Q4_0 --batches 1 --backends tvm    a rehearsal on a CPU

1. conformance on the device, every case and mutant; compute-sanitizer on a small part of it, where it is installed
2. kernels: products with weights of more than 50 MB for 1, 8, 32 and 512 rows, attention at 8192 keys, prompts; each
   is checked against its reference, then timed beside torch on the same shapes (F.linear in bfloat16, SDPA)
3. whole decode steps of a 1B and an 8B Llama shape with random weights, batch 1, 8 and 32, on every backend that opens
   a GPU (cuda, opencl), beside torch in bfloat16 (compiled, in a CUDA graph)

Every figure stands beside what a copy reached in the same run. Nothing is downloaded; torch and compute-sanitizer may
be missing, and are then named in `left_out`. A part that fails says why in its place and does not end the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from generate_model import SHAPES
from kernelbench.cases import BenchCase, Model
from kernelbench.results import Row, rounded
from kernelbench.roofline import Meter
from kernelbench.stand import Stand
from polykern.backends.registry import open_backend
from polykern.kernels.errors import PolykernError
from polykern.kernels.op import TensorType, signature_bytes
from polykern.kernels.ops import OPS
from polykern.kernels.quant import FORMATS
from polykern.kernels.testdata import large_weight
from polykern.runtime.machine import provenance
from polykern.runtime.model import build_program
from polykern.runtime.output import plain
from polykern.runtime.plan import plan
from polykern.runtime.progress import ProgressBars
from polykern.runtime.step import Executable

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"1b": "llama-3.2-1b", "8b": "llama-3.1-8b", "tiny": "tiny"}
# memcheck and racecheck decide; initcheck counts padding that kernels read and mask as errors, and is only kept.
CHECKS, INFORMATIVE = ("memcheck", "racecheck", "initcheck"), ("initcheck",)
CONFORMANCE_S, SANITIZER_S = 3600, 900  # limits, so that a device that hangs does not keep the rest of the run
SANITIZED = ("gemm", "attention", "rope_kv_append", "sample")
CONTEXT = 1024  # tokens the KV cache of a step holds; steps begin in its middle
KEYS = 8192  # of the attention kernels
STEPS, ROUNDS, KERNEL_S = 32, 7, 1.0
VECTOR = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "u32": np.uint32}


def guarded(action: Callable[[], Any]) -> Any:
    """What a part of the run found, or {"problem": why it found nothing}."""
    try:
        return action()
    except PolykernError as error:
        return {"problem": str(error)}
    except Exception as error:  # noqa: BLE001 - an hour's run does not end at the first surprise; the file says so
        return {"problem": f"{type(error).__name__}: {error}"}


# 1. Conformance


def runtime(backend: str, device: str | None, *more: str) -> list[str]:
    on = ["--device", device] if device else []
    return [sys.executable, "-m", "polykern.runtime", "conformance", "--backend", backend, *on, *more]


def conformance(backend: str, device: str | None) -> dict[str, Any]:
    command = runtime(backend, device, "--json")
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=CONFORMANCE_S)
    if not found.stdout:
        return {"problem": found.stderr.strip().splitlines()[-1:]}
    document = json.loads(found.stdout)
    failed = [f"{c['op']} {c['case']}: {c.get('reason')}" for c in document["cases"] if c["status"] == "failed"]
    return {"ok": document["ok"], "summary": document["summary"], "failed": failed}


def sanitizer(backend: str, device: str | None) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"left_out": "compute-sanitizer is not installed"}
    ops = [part for op in SANITIZED for part in ("--op", op)]
    found: dict[str, Any] = {}
    for check in CHECKS:
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            *runtime(backend, device, "--profile", "small", *ops),
        ]
        try:
            run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SANITIZER_S)
        except subprocess.TimeoutExpired:
            found[check] = {"ok": False, "problem": f"did not end within {SANITIZER_S} s"}
            continue
        errors = [line for line in run.stdout.splitlines() if line.startswith("=========") and "rror" in line]
        found[check] = {"ok": run.returncode == 0, "rc": run.returncode, "said": errors[:20]}
    return found


def is_sound(document: Mapping[str, Any], is_skipped: bool) -> bool:
    """Whether conformance passed, and the sanitizer, if it ran, reported nothing that counts."""
    if is_skipped:
        return True
    checks = document["sanitizer"].items()
    failed = [name for name, found in checks if name in CHECKS and name not in INFORMATIVE and not found["ok"]]
    return bool(document["conformance"].get("ok")) and not failed and "problem" not in document["sanitizer"]


# 2. Kernels


def kernel_cases(formats: Sequence[str], page_size: int, model: Model) -> Iterator[BenchCase]:
    """Products in the shapes of `model`'s feed-forward block (gate and up as one), and its attention at KEYS keys."""
    d, ff = model.shape.d_model, model.shape.ff
    for fmt in formats:
        for rows, columns, what in ((2 * ff, d, "ffn_gate_up"), (d, ff, "ffn_down")):
            for tokens in (1, 8, 32, 512):
                kinds = {
                    "x": TensorType((tokens, columns), "f32"),
                    "w": TensorType((rows, columns), fmt),
                    "y": TensorType((tokens, rows), "f32"),
                }
                signature = OPS["gemm"].signature(kinds, {"precision": "fast"})
                yield BenchCase(signature, model.name, tokens, what, streamed=("w",), reach=1 << 30)
    for sequences, tokens in ((1, 1), (8, 8), (32, 32), (1, 512)):
        pages = -(-KEYS // page_size)
        cache = TensorType((sequences * pages, model.shape.kv_heads, page_size, model.head_dim), "f16")
        query = TensorType((tokens, model.shape.heads, model.head_dim), "f32")
        kinds = {
            "q": query, "k_pages": cache, "v_pages": cache, "block_table": TensorType((sequences, pages), "i32"),
            "seq_ids": TensorType((tokens,), "i32"), "positions": TensorType((tokens,), "i32"), "y": query,
        }  # fmt: skip
        streamed = ("k_pages", "v_pages") if tokens == sequences else ()
        signature = OPS["attention"].signature(kinds, {})
        yield BenchCase(signature, model.name, tokens, f"{sequences}x{KEYS}", KEYS, streamed, 1 << 30)


def kernels(backend: Any, formats: Sequence[str], model: Model, torch: Any) -> list[dict[str, Any]]:
    """A row for each case: checked, timed, compared with this run's limits and with torch."""
    meter, stand, rows = Meter(backend), Stand(backend), list[dict[str, Any]]()
    cases = list(kernel_cases(formats, backend.page_size, model))
    with ProgressBars() as bars:
        for done, case in enumerate(cases):
            bars("kernels", done, len(cases))
            meter.measure()
            found = guarded(lambda case=case: kernel(stand, case))
            row = found if isinstance(found, Row) else Row.of(backend.name, backend.device.name, case)
            if row is not found:
                row.reason = found["problem"]
            row.compare_with(meter.roofline())
            document = asdict(row)
            if torch and row.median_s:
                theirs = guarded(lambda case=case: torch_kernel(torch, case))
                document["torch_s"] = theirs
                if isinstance(theirs, float):
                    document["over_torch"] = theirs / row.median_s
            rows.append(document)
    return rows


def kernel(stand: Stand, case: BenchCase) -> Row:
    placed = stand.place(case)
    row, ratio = Row.of(stand.backend.name, stand.backend.device.name, case), placed.check()
    one, calls, rounds = placed.rounds(KERNEL_S)
    one()
    times: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        one()
        times.append((time.perf_counter() - started) / calls)
    row.fill(placed, ratio, times, calls)
    return row


def torch_kernel(torch: Any, case: BenchCase) -> float:
    """Seconds of torch for the same call: F.linear with a bfloat16 weight, or SDPA over a contiguous cache."""
    functional, kinds = torch.nn.functional, case.signature.tensors

    def random(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    if case.op == "gemm":
        x, (rows, columns) = random(*kinds["x"].shape), kinds["w"].shape
        weights = [random(rows, columns) for _ in range(max(1, (512 << 20) // (2 * rows * columns)))]
        runs = [lambda w=w: functional.linear(x, w) for w in weights]
    else:
        sequences, keys = kinds["block_table"].shape[0], case.context
        tokens, heads, head_dim = kinds["q"].shape
        kv_heads = kinds["k_pages"].shape[1]
        q = random(sequences, heads, tokens // sequences, head_dim, dtype=torch.float16)
        each = 2 * 2 * sequences * kv_heads * keys * head_dim  # bytes
        caches = [
            [random(sequences, kv_heads, keys, head_dim, dtype=torch.float16) for _ in range(2)]
            for _ in range(max(1, min(64, (512 << 20) // each)))
        ]
        # The queries are the last tokens. As a bias, not as a matrix, which would rule out flash attention.
        from torch.nn.attention.bias import causal_lower_right

        causal = causal_lower_right(tokens, keys) if tokens > sequences else None
        attend = functional.scaled_dot_product_attention
        runs = [lambda k=k, v=v: attend(q, k, v, attn_mask=causal, enable_gqa=True) for k, v in caches]
    return timed(torch, runs) / len(runs)


def timed(torch: Any, runs: Sequence[Callable[[], Any]], repeats: int = 5) -> float:
    """Seconds for all `runs`, one after the other, from a CUDA graph: torch's time on the GPU, not the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            for run in runs:
                run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for run in runs:
            run()
    times: list[float] = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / repeats)
    return median(times)


# 3. Decode steps


def step(backend: Any, model: Model, batch: int) -> dict[str, Any]:
    """Milliseconds of a whole decode step for `batch` sequences, and the bytes it has to read."""
    config = model.config(CONTEXT)
    program = build_program(
        config, tokens=batch, sequences=batch, ctx=CONTEXT, page_size=backend.page_size, precision="fast"
    )
    planned = plan(program, backend, "error")
    executable, rng = Executable(backend), np.random.default_rng(1)
    for spec in planned.buffers.values():
        if spec.kind == "weight":
            kind = TensorType(spec.shape, spec.dtype)
            value: Any = large_weight(rng, kind) if spec.dtype in FORMATS else np.ones(spec.shape, VECTOR[spec.dtype])
            executable.add_weight(spec.name, value)
    compiled = executable.compile(planned)
    start = CONTEXT // 2
    for spec in planned.buffers.values():
        if spec.kind == "state":
            compiled.write(spec.name, state(spec.name, spec.shape, spec.dtype, start, rng))
    compiled.run()
    backend.synchronize()
    times: list[float] = []
    for _ in range(ROUNDS):
        compiled.write("positions", np.full(batch, start, np.int32))
        started = time.perf_counter()
        for _ in range(STEPS):
            compiled.run()
        backend.synchronize()
        times.append((time.perf_counter() - started) / STEPS)
    ids = compiled.read("token_ids")
    assert ((ids >= 0) & (ids < config.vocab_size)).all(), f"token ids {ids}"
    reads = sum(
        signature_bytes(leaf.signature, [p.name for p in OPS[leaf.signature.op].params if p.role == "weight"])
        for leaf in planned.leaves()
        if leaf.signature.op != "embedding"
    )
    cached = 2 * 2 * batch * start * len(config.layers) * model.shape.kv_heads * model.head_dim
    took = median(times)
    return {
        "ms_median": took * 1e3, "ms_all": [t * 1e3 for t in times], "tokens_per_s": batch / took,
        "bytes": reads + cached, "gb_per_s": (reads + cached) / took / 1e9,
        "native": sum(leaf.native for leaf in planned.leaves()), "calls": len(list(planned.leaves())),
    }  # fmt: skip


def state(name: str, shape: tuple[int, ...], dtype: str, start: int, rng: np.random.Generator) -> Any:
    """Content of a state buffer: every sequence has pages of its own and stands at position `start`."""
    if name == "block_table":
        return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    if name == "positions":
        return np.full(shape, start, np.int32)
    if name == "seq_ids":
        return np.arange(shape[0], dtype=np.int32)
    if dtype in ("i32", "u32"):
        return rng.integers(0, 1000, shape).astype(VECTOR[dtype])
    values = rng.standard_normal(min(int(np.prod(shape)), 1 << 20), np.float32).astype(VECTOR[dtype])
    return np.resize(values, shape)


def torch_step(torch: Any, model: Model, batch: int) -> dict[str, Any]:
    """The same step in torch: bfloat16 weights, SDPA over a contiguous cache, compiled and in a CUDA graph."""
    import torch._dynamo

    torch._dynamo.reset()  # graphs of the steps before, with their memory
    gc.collect()
    torch.cuda.empty_cache()
    functional, s = torch.nn.functional, model.shape
    head_dim, kv = model.head_dim, s.kv_heads * model.head_dim

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    layers = [
        (random(s.d_model + 2 * kv, s.d_model), random(s.d_model, s.d_model), random(2 * s.ff, s.d_model),
         random(s.d_model, s.ff), random(batch, s.kv_heads, CONTEXT // 2, head_dim),
         random(batch, s.kv_heads, CONTEXT // 2, head_dim))
        for _ in range(s.layers)
    ]  # fmt: skip
    table, head = random(s.vocab, s.d_model), random(s.vocab, s.d_model)
    ones = torch.ones(s.d_model, device="cuda", dtype=torch.bfloat16)

    # Else a replay begins with a copy of each into memory of the graph's own: all weights, once more.
    for tensor in (table, head, ones, *(x for layer in layers for x in layer)):
        torch._dynamo.mark_static_address(tensor)

    def forward(ids: Any) -> Any:
        x = functional.embedding(ids, table)
        for qkv, out, gate_up, down, k, v in layers:
            q = functional.linear(functional.rms_norm(x, (s.d_model,), ones), qkv)[:, : s.d_model]
            q = q.reshape(batch, s.heads, 1, head_dim)
            y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).reshape(batch, s.d_model)
            x = x + functional.linear(y, out)
            gate, up = functional.linear(functional.rms_norm(x, (s.d_model,), ones), gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, down)
        return functional.linear(functional.rms_norm(x, (s.d_model,), ones), head).argmax(-1)

    compiled = torch.compile(forward, mode="reduce-overhead", dynamic=False)
    ids = torch.arange(batch, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            compiled(ids)
        times: list[float] = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(STEPS):
                compiled(ids)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / STEPS)
    took = median(times)
    return {"ms_median": took * 1e3, "ms_all": [t * 1e3 for t in times], "tokens_per_s": batch / took}


def find_torch(left_out: dict[str, str]) -> Any:
    try:
        import torch
    except ImportError as error:
        left_out["torch"] = str(error)
        return None
    if not torch.cuda.is_available():
        left_out["torch"] = f"torch {torch.__version__} finds no GPU"
        return None
    return torch


def gpu_backends(wanted: Sequence[str], device: str | None, left_out: dict[str, str]) -> dict[str, Any]:
    """Those of `wanted` that open, the first on `device`, the others on a GPU they list (any device if named so)."""
    found: dict[str, Any] = {}
    for number, name in enumerate(wanted):
        try:
            backend = open_backend(name, device=device if number == 0 else None)
        except PolykernError as error:
            left_out[name] = str(error)
            continue
        if number and backend.device.detail.get("type", "cpu") == "cpu":
            left_out[name] = f"opens {backend.device.name}, which is no GPU"
            backend.close()
            continue
        found[name] = backend
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="of the first backend: a number, or a part of its name")
    parser.add_argument("--backends", default="cuda,opencl,tvm", help="(default: %(default)s)")
    parser.add_argument("--models", default="1b,8b", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--formats", default="Q4_0,Q8_0,BF16", help="(default: %(default)s)")
    parser.add_argument("--batches", default="1,8,32", help="(default: %(default)s)")
    parser.add_argument("--skip-conformance", action="store_true", help="when it was run just before")
    parser.add_argument("-o", "--output", type=Path, help="(default: bench/results/gpu-DEVICE.json)")
    args = parser.parse_args(argv)
    names, formats = args.backends.split(","), args.formats.split(",")
    left_out: dict[str, str] = {}
    torch = find_torch(left_out)
    backends = gpu_backends(names, args.device, left_out)
    if names[0] not in backends:
        print(f"gpu: {names[0]}: {left_out[names[0]]}", file=sys.stderr)
        return 1
    first = backends[names[0]]
    document: dict[str, Any] = {
        "device": first.device.name, "driver": first.device.driver, "detail": dict(first.device.detail), **provenance(),
        "left_out": left_out,
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", first.device.name.lower()).strip("-")
    output = args.output or RESULTS / f"gpu-{slug}.json"
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731

    def save() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rounded(plain(document)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    if not args.skip_conformance:
        say("conformance ...")
        document["conformance"] = guarded(lambda: conformance(names[0], args.device))
        document["sanitizer"] = guarded(lambda: sanitizer(names[0], args.device))
        save()
    peaks = getattr(first, "peaks", dict)
    document["peaks"] = guarded(peaks)
    models = [Model(name, SHAPES[MODELS[name]], formats[0], formats[0]) for name in args.models.split(",")]
    say("kernels ...")
    document["kernels"] = guarded(lambda: kernels(first, formats, models[-1], torch))
    save()
    document["steps"] = rows = list[Mapping[str, Any]]()
    read = document["peaks"].get("read") if isinstance(document["peaks"], dict) else None
    for model in models:
        for batch in map(int, args.batches.split(",")):
            for fmt in formats:
                shaped = Model(model.name, model.shape, fmt, fmt)
                for name, backend in backends.items():
                    say(f"step {model.name} {fmt} batch {batch} {name} ...")
                    found = guarded(lambda b=backend, m=shaped, n=batch: step(b, m, n))
                    if read and name == names[0] and "gb_per_s" in found:
                        found["of_bandwidth"] = found["gb_per_s"] / read
                    rows.append({"model": model.name, "format": fmt, "batch": batch, "side": name, **found})
                    save()
            if torch:
                say(f"step {model.name} batch {batch} torch ...")
                found = guarded(lambda m=model, n=batch: torch_step(torch, m, n))
                rows.append({"model": model.name, "format": "BF16", "batch": batch, "side": "torch", **found})
                save()
    for backend in backends.values():
        backend.close()
    save()
    show(document)
    say(str(output))
    return 0 if is_sound(document, args.skip_conformance) else 1


def show(document: Mapping[str, Any]) -> None:
    """The short of it, on stdout."""
    print(f"{document['device']}, driver {document['driver']}; peaks {document['peaks']}")
    for row in document["kernels"] if isinstance(document["kernels"], list) else []:
        fraction = f"{row['fraction']:.0%} of {row['bound']}" if row.get("fraction") else row["reason"]
        torch = f", {row['over_torch']:.2f} times torch" if row.get("over_torch") else ""
        print(f"{row['case']}: {(row['median_s'] or 0) * 1e6:.1f} us, {fraction}{torch}")
    for row in document["steps"]:
        speed = f"{row['tokens_per_s']:.0f} tok/s" if "tokens_per_s" in row else row["problem"]
        share = f", {row['of_bandwidth']:.0%} of bandwidth" if "of_bandwidth" in row else ""
        print(f"{row['model']} {row['format']} batch {row['batch']} {row['side']}: {speed}{share}")


if __name__ == "__main__":
    sys.exit(main())
