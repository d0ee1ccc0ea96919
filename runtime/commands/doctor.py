"""`runtime doctor`: the machine, for a bug report, and what to install."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..output import Output, size_text

HELP = "Report versions, drivers, caches and what to install; for bug reports."
EXAMPLE = "runtime doctor"


def add_arguments(parser: ArgumentParser) -> None:
    """No options of its own."""


def run(args: Namespace, out: Output) -> int:
    from ..doctor import examine

    found = examine()
    if args.json:
        out.json(found)
        return 0
    for name, part in found.items():
        if name == "advice":
            continue
        out.line(f"{name}:" if isinstance(part, dict | list) else f"{name}: {_value(name, part)}")
        for line in _lines(name, part):
            out.line(f"  {line}")
    out.line("what to do:")
    for line in found["advice"] or ["nothing: everything that is installed works"]:
        out.line(f"  {line}")
    return 0


def _value(name: str, value: Any) -> str:
    return size_text(value) if name == "memory_bytes" else str(value)


def _lines(name: str, part: Any) -> list[str]:
    if name == "packages" and isinstance(part, dict):
        return [f"{package} {version or '(not installed)'}" for package, version in part.items()]
    if name == "backends" and isinstance(part, list):
        lines: list[str] = []
        for backend in part:
            lines.append(f"{backend['name']}: {'available' if backend['available'] else backend['reason']}")
            lines += [f"  {d['index']}  {d['name']} ({d['driver']})" for d in backend["devices"]]
            lines += [f"  {key}: {_plain(value)}" for key, value in backend["versions"].items()]
        return lines
    if isinstance(part, list):
        return [", ".join(f"{k} {v}" for k, v in item.items() if v is not None) for item in part]
    return [f"{key}: {_plain(value)}" for key, value in part.items()] if isinstance(part, dict) else []


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
