"""`runtime doctor`: the machine, for a bug report, and what to install."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..output import Output, size_text

HELP = "Report versions, drivers, caches and what to install; for bug reports."
EXAMPLE = """\
runtime doctor
runtime doctor --forget"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--forget", action="store_true", help="forget what --backend auto chose: the next start measures again"
    )


def run(args: Namespace, out: Output) -> int:
    if args.forget:
        from ..choice import folder, forget

        count = forget()
        if args.json:
            out.json({"forgotten": count})
        else:
            out.line(f"forgot {count} choice{'' if count == 1 else 's'} in {folder()}")
        return 0
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
    if name == "choices" and isinstance(part, list):
        return [f"{row['chose']} ({row['file']})" for row in part] or ["none"]
    if isinstance(part, list):
        return [", ".join(f"{k} {v}" for k, v in item.items() if v is not None) for item in part]
    return [f"{key}: {_plain(value)}" for key, value in part.items()] if isinstance(part, dict) else []


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
