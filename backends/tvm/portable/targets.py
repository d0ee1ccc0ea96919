"""The text of `--target` as a TVM target: a kind, a tag, JSON, or the classic form "llvm -mcpu=znver4".

TVM 0.27 takes a kind, a tag or JSON, says little about a mistake, compiles for a generic CPU where it does not know
one, and dies of an unknown LLVM triple. So each part is looked up first.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from ....kernels.errors import BackendUnavailable, UsageError
from .machine import MACHINES

EXAMPLES = 'llvm, "llvm -mcpu=znver4", "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1", "cuda -arch=sm_90"'
# Without these TVM looks for an installed toolkit, warns, and takes the oldest device it knows.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {"cuda": {"arch": "sm_80"}, "rocm": {"mcpu": "gfx90a"}}
# Other names of an architecture in a triple -> LLVM's (llvm::Triple::parseArch).
_ARCHITECTURES = ((r"arm64", "aarch64"), (r"i[3-6]86", "i386"), (r"armv\d\w*", "arm"), (r"ppc64le", "powerpc64le"),
                  (r"amd64", "x86_64"))  # fmt: skip


def require_tvm() -> None:
    """Raises BackendUnavailable where TVM is not installed."""
    if find_spec("tvm") is None:
        raise BackendUnavailable("needs TVM, which is not installed: pip install 'polykern[tvm]'")


def version() -> str:
    """TVM's version, without importing it."""
    return metadata.version("apache-tvm") if find_spec("tvm") else "not installed"


def parse(text: str) -> Any:
    """The tvm.target.Target that `text` means. Raises UsageError with what there is instead."""
    require_tvm()
    from tvm.target import Target

    config = _config(text)
    if "tag" in config:
        _check_tag(config["tag"])
    else:
        config = {**_DEFAULTS.get(config["kind"], {}), **config}
        _check_kind(config["kind"])
        for key in config:
            _check_option(config["kind"], key)
        if config["kind"] == "llvm":
            _check_cpu(config)
    try:
        with quiet():
            target: Any = Target(config)
    except Exception as error:
        reason = re.sub(r"\.? *Target creation from .*", "", " ".join(str(error).split()))
        raise UsageError(f"--target {text!r}: TVM refuses it: {reason}; examples: {EXAMPLES}") from error
    _check_kind(str(target.kind.name))
    return target


def _config(text: str) -> dict[str, Any]:
    text = text.strip()
    if text.startswith("{"):
        try:
            config: Any = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--target is no JSON: {error}; examples: {EXAMPLES}") from error
        if not isinstance(config.get("tag", config.get("kind")), str):
            raise UsageError(f'--target has no "kind": known: {", ".join(MACHINES)}')
        return config
    try:
        first, *options = shlex.split(text) or [""]
    except ValueError as error:
        raise UsageError(f"--target {text!r}: {error}; examples: {EXAMPLES}") from error
    config = {"tag" if "/" in first else "kind": first}
    if "kind" in config:
        _check_kind(first)
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or not equals or not value:
            raise UsageError(f"--target {text!r}: {option!r} is no option -name=value; examples: {EXAMPLES}")
        config[name] = _typed(config.get("kind", "llvm"), name, value)
    return config


def _typed(kind: str, name: str, value: str) -> Any:
    """An option's text as what TVM declares it to be."""
    declared = _check_option(kind, name)
    if declared.startswith("Array"):
        return value.split(",")
    if declared == "bool" and value.lower() in ("0", "1", "true", "false"):
        return value.lower() in ("1", "true")
    if declared in ("int", "bool"):
        try:
            return int(value)
        except ValueError as error:
            raise UsageError(f"--target: {name} is {value!r}, expected {declared}") from error
    return value


def _check_kind(kind: str) -> None:
    if kind not in MACHINES:
        raise UsageError(f"unknown target {kind!r}{_meant(kind, MACHINES)} known: {', '.join(MACHINES)}")


def _check_option(kind: str, name: str) -> str:
    from tvm.target import TargetKind

    options = TargetKind.options_from_name(kind)
    if name not in options:
        known = ", ".join(sorted(options))
        raise UsageError(f"--target: {kind} has no option {name!r}{_meant(name, options)} it has {known}")
    return str(options[name])


def _check_tag(tag: str) -> None:
    from tvm.target.tag import list_tags

    with quiet():
        tags = list(list_tags() or {})
    if tag not in tags:
        raise UsageError(
            f"unknown target tag {tag!r}{_meant(tag, tags)} TVM has {len(tags)}; kinds: {', '.join(MACHINES)}"
        )


def _check_cpu(config: dict[str, Any]) -> None:
    """Triple and CPU of an llvm target; -mcpu=native becomes this CPU's name."""
    from tvm.target import Target, codegen

    for name in ("mtriple", "mcpu"):
        if not isinstance(config.get(name, ""), str):
            raise UsageError(f"--target: {name} is {config[name]!r}, expected a text")
    triple = config.setdefault("mtriple", str(codegen.llvm_get_system_triple()))
    architecture = triple.split("-")[0]
    for pattern, name in _ARCHITECTURES:
        architecture = name if re.fullmatch(pattern, architecture) else architecture
    known = [str(name) for name in codegen.llvm_get_targets()]
    if architecture not in known:
        raise UsageError(
            f"--target: -mtriple={triple} names no architecture of this LLVM{_meant(architecture, known)}"
            f" it has {', '.join(known)}"
        )
    if config.get("mcpu") == "native":
        config["mcpu"] = str(codegen.llvm_get_system_cpu())
    cpu = config.get("mcpu")
    with quiet():
        target = Target({"kind": "llvm", "mtriple": triple})
        if not cpu or codegen.llvm_is_valid_cpu(cpu, triple):
            return
        names = sorted(str(name) for name in codegen.llvm_get_cpu_archlist(target))
    raise UsageError(
        f"--target: LLVM knows no CPU {cpu!r} for {triple}{_meant(cpu, names)} {len(names)} known,"
        f" {', '.join(names[-8:])} among them; a CPU of another architecture needs -mtriple, such as aarch64-linux-gnu"
    )


def _meant(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ";"


@contextmanager
def quiet() -> Generator[None]:
    """What TVM's C++ logs on stderr (no CUDA, no ROCm found) is kept from the user; errors come as exceptions."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
