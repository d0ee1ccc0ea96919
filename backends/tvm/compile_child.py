"""The process that compiles (backends/compile_process.py): TVM takes a second to import and keeps 250 MB."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..compile_process import serve
from .library import without_torch
from .target import BY_NAME


def build(request: Mapping[str, Any]) -> tuple[Mapping[str, Any], bytes]:
    """The object file of a kernel or a driver."""
    from . import driver

    with without_torch():
        importlib.import_module("tvm")  # here, not where it is first used

    target = BY_NAME[request["target"]]
    if "driver" in request:
        return {}, driver.build_driver(request["driver"], target)
    emit = getattr(importlib.import_module(request["module"]), request["emit"])
    return {}, driver.build_kernel(emit, dict(request["options"]), request["symbol"], target)


if __name__ == "__main__":
    serve(build)
