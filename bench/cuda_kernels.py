"""Every kernel of the cuda backend, compiled for several architectures without a GPU: registers, spills, shared memory.

    python bench/cuda_kernels.py            compiles, writes bench/results/kernels-cuda-compiled.json and the table in
                                            backends/cuda/README.md
    python bench/cuda_kernels.py --check    says whether table and budget hold for today's sources; compiles nothing

The kernels are those that an 8B model needs in every weight format and both precisions, in decode steps, batches and
prompts, whichever of several candidates the GPU will find faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernelbench.cases import MODELS
from polykern.backends.cuda.aot import Generator, parse
from polykern.backends.cuda.compiler import Compiler, compilers, sources
from polykern.backends.cuda.launch import KernelSpec
from polykern.kernels.gemm import PRECISIONS
from polykern.kernels.op import Signature
from polykern.kernels.program import Program
from polykern.kernels.quant import FORMATS
from polykern.runtime.config import ModelConfig
from polykern.runtime.machine import provenance
from polykern.runtime.model import build_program
from polykern.runtime.plan import plan
from polykern.runtime.programs import DECODE, DECODE_SAMPLING, PREFILL_CHUNKS, prefill
from polykern.runtime.progress import ProgressBars

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "kernels-cuda-compiled.json"
PAGE = ROOT / "backends" / "cuda" / "README.md"
BEGIN, END = "<!-- compiled kernels: bench/cuda_kernels.py -->", "<!-- end of compiled kernels -->"
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
CONTEXT = 4096
BATCHES = (8, 32)
# Bytes of local memory for a thread: what a decode kernel may spill, and any other.
DECODE_BUDGET, BUDGET = 0, 256

Row = Mapping[str, Any]


def programs(config: ModelConfig) -> Iterator[Program]:
    """Decode steps, of one sequence and of batches, and prompts, in both precisions."""
    for precision in PRECISIONS:
        common: dict[str, Any] = {"ctx": CONTEXT, "page_size": 32, "precision": precision}
        for bucket in (DECODE, DECODE_SAMPLING, *map(prefill, PREFILL_CHUNKS)):
            yield build_program(config, **bucket._asdict(), **common)
        for batch in BATCHES:
            yield build_program(config, tokens=batch, sequences=batch, **common)


def signatures() -> dict[str, tuple[str, Signature]]:
    """What the 8B model's programs call in every format: text -> ("decode" or "prefill", signature)."""
    generator: Any = Generator(parse(TARGETS[1]))
    found: dict[str, tuple[str, Signature]] = {}
    for fmt in FORMATS:
        config = replace(MODELS["8B"], format=fmt, head_format=fmt).config(CONTEXT)
        for program in programs(config):
            stage = "decode" if program.name.startswith("decode") else "prefill"
            for leaf in plan(program, generator, "allow").leaves():
                found.setdefault(f"{stage} {leaf.signature}", (stage, leaf.signature))
    return found


def specs(target: str, called: Mapping[str, tuple[str, Signature]]) -> dict[KernelSpec, tuple[str, str]]:
    """Kernel -> op and stage; one that both stages use counts as a decode kernel."""
    generator = Generator(parse(target))
    found: dict[KernelSpec, tuple[str, str]] = {}
    for stage, signature in called.values():
        for launch in generator.launches(signature):
            if launch.spec not in found or stage == "decode":
                found[launch.spec] = (signature.op, stage)
    return found


def compile_all(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    called, rows = signatures(), list[dict[str, Any]]()
    for name in targets:
        wanted = specs(name, called)
        compiler = Compiler(parse(name))
        with ProgressBars() as bars:
            binaries = compiler.binaries(
                list(wanted), lambda done, total, name=name: bars(f"compile {name}", done, total)
            )
        compiler.close()
        for (spec, (op, stage)), binary in zip(wanted.items(), binaries, strict=True):
            row = {"target": name, "op": op, "stage": stage, **described(spec), **binary.about}
            rows.append(row | {"code_bytes": len(binary.code)})
    return rows


def problems(document: Mapping[str, Any]) -> list[str]:
    """Where the document is of other sources than these, or a kernel is over its budget."""
    found: list[str] = []
    if document["sources"] != sources():
        found.append("kernels were changed since: run `make cuda-kernels`")
    for row in document["kernels"]:
        limit = DECODE_BUDGET if row["stage"] == "decode" else BUDGET
        if row["local_bytes"] > limit:
            found.append(
                f"{row['target']}: {label(row)} spills {row['local_bytes']} bytes a thread, its budget is {limit}"
            )
        shared, most = row["shared"] + row["static_shared"], parse(row["target"]).shared_bytes
        if shared > most:
            found.append(f"{row['target']}: {label(row)} takes {shared} bytes of shared memory, there are {most}")
    return found


def key(row: Row) -> str:
    """What tells the kernels of a target apart."""
    return json.dumps([row[name] for name in ("file", "function", "params", "constants", "warps", "stages")])


def key_of(spec: KernelSpec) -> str:
    return key(json.loads(json.dumps(described(spec))))


def described(spec: KernelSpec) -> dict[str, Any]:
    return {
        "file": spec.file, "function": spec.function, "params": [kind for _, kind in spec.params],
        "constants": dict(spec.constants), "warps": spec.warps, "stages": spec.stages,
    }  # fmt: skip


def label(row: Row) -> str:
    return "-".join([row["function"], *(f"{name.lower()}{value}" for name, value in row["constants"].items() if value)])


def table(document: Mapping[str, Any]) -> str:
    """One line for each kernel function and target: how many variants, and the most that any takes."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in document["kernels"]:
        groups[row["function"], row["stage"], row["target"]].append(row)
    lines = [
        "| kernel | used in | target | variants | registers | spilled bytes | shared KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (function, stage, target), rows in sorted(groups.items()):
        registers = [row["registers"] for row in rows]
        spilled = max(row["local_bytes"] for row in rows)
        shared = max(row["shared"] + row["static_shared"] for row in rows) / 1024
        span = f"{min(registers)}–{max(registers)}" if len(set(registers)) > 1 else f"{registers[0]}"
        lines.append(f"| `{function}` | {stage} | {target} | {len(rows)} | {span} | {spilled} | {shared:.0f} |")
    made = ", ".join(f"{name} {version}" for name, version in document["compilers"].items())
    return "\n".join([*lines, "", f"{len(document['kernels'])} binaries, {made}; {document['date'][:10]}."])


def with_table(page: str, content: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    args = parser.parse_args(argv)
    if not args.check:
        document: dict[str, Any] = {"sources": sources(), "compilers": compilers(), **provenance()}
        document["kernels"] = compile_all()
        RESULT.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    document = json.loads(RESULT.read_text())
    page = PAGE.read_text(encoding="utf-8")
    found = problems(document)
    if not args.check:
        PAGE.write_text(with_table(page, table(document)), encoding="utf-8")
    elif with_table(page, table(document)) != page:
        found.append(f"the table in {PAGE.relative_to(ROOT)} is out of date: run `make cuda-kernels`")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
