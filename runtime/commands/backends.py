"""`runtime backends`: what can run here, and why the rest cannot."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..output import Output, size_text

HELP = "List the backends: available with which devices, or the reason why not."
EXAMPLE = "runtime backends"


def add_arguments(parser: ArgumentParser) -> None:
    """No options of its own."""


def survey() -> list[dict[str, Any]]:
    """Every registered backend with its devices and versions, or its reason."""
    from ...backends import describe, list_backends, probe

    found: list[dict[str, Any]] = []
    for entry in list_backends():
        seen = probe(entry.name)
        devices = [
            {"index": index, "name": d.name, "vendor": d.vendor, "driver": d.driver, "memory_bytes": d.memory_bytes}
            for index, d in enumerate(seen.devices)
        ]
        found.append(
            {
                "name": entry.name,
                "available": not seen.reason,
                "reason": entry.problem or seen.reason or None,
                "distribution": entry.distribution,
                "devices": devices,
                "versions": describe(entry.name),
            }
        )
    return found


def run(args: Namespace, out: Output) -> int:
    found = survey()
    if args.json:
        out.json(found)
        return 0
    for backend in found:
        status = "available" if backend["available"] else f"not available: {backend['reason']}"
        origin = "" if backend["distribution"] == "polykern" else f" (from {backend['distribution']})"
        out.line(f"{backend['name']}{origin}: {status}")
        for device in backend["devices"]:
            memory = size_text(device["memory_bytes"]) if device["memory_bytes"] else ""
            detail = ", ".join(part for part in (device["vendor"], device["driver"], memory) if part)
            out.line(f"  {device['index']}  {device['name']}{f' ({detail})' if detail else ''}")
    return 0
