"""The process that compiles OpenCL programs: a vendor's compiler that aborts or hangs takes only this one along.

Run as a script, so that it imports nothing of this project. It reads one JSON request from stdin,

    {"device": {"platform", "platform_version", "name", "driver"}, "programs": [{"label", "source", "options"}]}

and writes one JSON line to stdout as each step ends: {"start": label}, then {"done": label, "binary": base64, "log"}
or {"failed": label, "log"}. Whatever the compiler itself prints goes to stderr.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyopencl as cl


def build_source(context: cl.Context, source: str, options: Sequence[str]) -> cl.Program:
    """Compiles in this process, past PyOpenCL's own cache on disk. Raises pyopencl.Error."""
    import pyopencl as cl

    program = cl.Program(context, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the compiler said something, and what is meant on the next line
        _ = program.int_ptr  # creates the program now, and `build` then leaves its cache alone
        return program.build(list(options))


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers print to stdout, some of them only from C
    request = json.load(sys.stdin)

    def answer(**message: object) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    import pyopencl as cl

    device = _find(request["device"])
    context = cl.Context([device])
    for wanted in request["programs"]:
        label = wanted["label"]
        answer(start=label)
        try:
            program = build_source(context, wanted["source"], wanted["options"])
        except cl.Error as error:
            answer(failed=label, log=str(error))
            continue
        log = str(program.get_build_info(device, cl.program_build_info.LOG)).strip()
        answer(done=label, binary=base64.b64encode(_binary(program)).decode(), log=log)
    return 0


def _binary(program: Any) -> bytes:
    """The binary, empty if the device has none to give. PoCL generates machine code only here."""
    import pyopencl as cl

    try:
        return bytes(program.get_info(cl.program_info.BINARIES)[0])
    except cl.Error:
        return b""


def _find(wanted: dict[str, str]) -> Any:
    import pyopencl as cl

    for platform in cl.get_platforms():
        for device in platform.get_devices():
            seen = {
                "platform": platform.name.strip(),
                "platform_version": platform.version.strip(),
                "name": device.name.strip(),
                "driver": device.driver_version.strip(),
            }
            if seen == wanted:
                return device
    raise SystemExit(f"the OpenCL device {wanted['name']} is not there in the compile process")


if __name__ == "__main__":
    sys.exit(main())
