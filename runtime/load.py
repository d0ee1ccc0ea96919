"""From a file to a Session, each part once: file, tokenizer, backend, weights, plan."""

from __future__ import annotations

import math
import mmap
import os
import time
from functools import partial
from pathlib import Path

import numpy as np

from ..backends import open_backend
from ..kernels.errors import ModelError
from ..kernels.quant import FORMATS, Array, Weight, concat_rows
from ..kernels.spi import Backend, Progress
from .config import ModelConfig
from .gguf import GGUFFile
from .model import stacked_tensors
from .programs import DECODE, Programs
from .session import Session
from .settings import Settings
from .step import Executable
from .tokenizer import Tokenizer

# Without --ctx: enough for a conversation, and for an 8B Llama 512 MB of cache rather than the 16 GB of its 128k.
DEFAULT_CTX = 4096

MIB = 1 << 20


def load(settings: Settings, *, progress: Progress | None = None) -> Session:
    """Open everything and compile the decode step; prefill programs follow when the first prompt needs them.

    Raises ModelFormatError or ModelError for the model, BackendUnavailable and UsageError for the backend,
    UnsupportedOp where the fallback policy is "error".
    """
    started = time.perf_counter()
    gguf = GGUFFile.open(settings.model)
    config = ModelConfig.from_gguf(gguf)
    ctx = context_size(settings, config, gguf.path)
    tokenizer = Tokenizer.from_metadata(gguf.metadata, gguf.path)
    backend = open_backend(settings.backend, device=settings.device, threads=settings.threads, progress=progress)
    try:
        check_memory(config, ctx, backend, gguf.path)
        programs = Programs(config, Executable(backend, progress), settings, ctx)
        decode = programs.plan(DECODE)
        add_weights(programs.executable, config, gguf)
        programs.step(DECODE, decode)
        if hasattr(mmap, "MADV_DONTNEED"):  # the device has its copy; a call on the host maps its weights again
            gguf.check_unchanged().madvise(mmap.MADV_DONTNEED)
        return Session(programs, decode, tokenizer, gguf, time.perf_counter() - started)
    except BaseException:
        backend.close()
        raise


def add_weights(executable: Executable, config: ModelConfig, gguf: GGUFFile) -> None:
    """Name every weight a program may want: tensors of the file, and Q, K and V stacked. Reads none of them yet."""
    stacked = stacked_tensors(config)
    parts = {name for names in stacked.values() for name in names}
    for name, kind in config.tensors.items():
        if name not in parts:
            executable.add_weight(name, partial(gguf.array if kind.dtype == "f32" else gguf.weight, name))
    for name, names in stacked.items():
        executable.add_weight(name, partial(_stack, config, gguf, names))


def _stack(config: ModelConfig, gguf: GGUFFile, names: tuple[str, ...]) -> Weight | Array:
    """Several matrices, or their biases, as one; a bias that lacks is zeros."""
    if names[0].endswith(".weight"):
        return concat_rows([gguf.weight(name) for name in names])
    return np.concatenate(
        [
            gguf.array(name)
            if name in config.tensors
            else np.zeros(config.tensors[name.replace(".bias", ".weight")].shape[0], np.float32)
            for name in names
        ]
    )


def context_size(settings: Settings, config: ModelConfig, path: str) -> int:
    """Capacity of the KV cache in tokens."""
    limit = config.context_length
    if settings.ctx is None:
        return min(limit, DEFAULT_CTX)
    if settings.ctx > limit:
        raise ModelError(f"{path}: --ctx is {settings.ctx}, the model's maximum is {limit} tokens")
    return settings.ctx


def weight_bytes(config: ModelConfig) -> int:
    """What the weights take in their file formats."""
    return sum(
        math.prod(kind.shape) * 4
        if kind.dtype == "f32"
        else kind.shape[0] * FORMATS[kind.dtype].row_bytes(kind.shape[1])
        for kind in config.tensors.values()
    )


def bytes_per_token(config: ModelConfig) -> int:
    """What one token of context takes: f16 keys and values in each layer, one row of the f32 RoPE table."""
    heads = sum(layer.kv_heads for layer in config.layers)
    return 2 * 2 * heads * config.head_dim + 4 * config.rope.dims


def check_memory(config: ModelConfig, ctx: int, backend: Backend, path: str) -> None:
    """Refuse a context that cannot fit, before anything of its size is allocated."""
    where, available = f"{backend.device.name} has", backend.device.memory_bytes
    if not available:
        where, available = "this machine has", host_memory()
    weights, per_token = weight_bytes(config), bytes_per_token(config)
    if weights + ctx * per_token <= available:
        return
    fits = (available - weights) // per_token // backend.page_size * backend.page_size
    way_out = f"--ctx {fits} fits" if fits > 0 else "no context fits beside the weights"
    raise ModelError(
        f"{path}: --ctx {ctx} takes {ctx * per_token / MIB:.0f} MiB beside {weights / MIB:.0f} MiB of weights,"
        f" {where} {available / MIB:.0f} MiB: {way_out}"
    )


def host_memory() -> int:
    """Memory of this machine in bytes: what is available now (Linux), else all of it."""
    try:
        with Path("/proc/meminfo").open() as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
