"""From a file to a Session, each part once: file, tokenizer, backend, weights, plan."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..kernels.errors import ModelError
from ..kernels.quant import Array, Weight, concat_rows
from ..kernels.spi import Progress
from .config import ModelConfig
from .gguf import GGUFFile
from .memory import PackingGuard, bytes_per_token, check_host_share, check_memory, tensor_bytes, weight_bytes
from .model import stacked_tensors
from .opening import open_for_model
from .programs import DECODE, Programs
from .session import Session
from .settings import Settings
from .step import Executable
from .tokenizer import Tokenizer

# Without --ctx: enough for a conversation, and for an 8B Llama 512 MB of cache rather than the 16 GB of its 128k.
DEFAULT_CTX = 4096

Cut = Callable[[ModelConfig], ModelConfig]


def load(
    settings: Settings,
    *,
    progress: Progress | None = None,
    cut: Cut = lambda config: config,
) -> Session:
    """Open everything and compile the decode step; prefill programs follow when the first prompt needs them.

    `cut` makes the model smaller than its file, for measuring.
    Raises ModelFormatError or ModelError for the model, BackendUnavailable and UsageError for the backend,
    UnsupportedOp where the fallback policy is "error".
    """
    with _collector_paused():
        return _load(settings, progress, cut)


@contextmanager
def _collector_paused() -> Generator[None]:
    """Nothing here is garbage yet; looking for it while 100000 strings and pairs are made took 50 ms."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load(settings: Settings, progress: Progress | None, cut: Cut) -> Session:
    started = time.perf_counter()
    gguf = GGUFFile.open(settings.model)
    config = cut(ModelConfig.from_gguf(gguf))
    ctx = context_size(settings, config, gguf.path)
    tokenizer = Tokenizer.from_metadata(gguf.metadata, gguf.path)
    backend, choice = open_for_model(settings, config, ctx, progress=progress)
    try:
        check_memory(config, ctx, backend, gguf.path)
        programs = Programs(config, Executable(backend, progress), settings, ctx)
        decode = programs.plan(DECODE)
        check_host_share(decode, gguf.path)
        add_weights(programs.executable, config, gguf, ctx)
        programs.step(DECODE, decode)
        gguf.release()  # and what was read of the header
        return Session(programs, decode, tokenizer, gguf, time.perf_counter() - started, choice)
    except BaseException:
        backend.close()
        raise


def add_weights(executable: Executable, config: ModelConfig, gguf: GGUFFile, ctx: int = 0) -> None:
    """Name every weight a program may want: tensors of the file, and Q, K and V stacked. Reads none of them yet.

    Each tensor's part of the file leaves memory as soon as the device has its copy. `ctx` tokens must fit beside all.
    """
    stacked = stacked_tensors(config)
    parts = {name for names in stacked.values() for name in names}
    guard = PackingGuard(weight_bytes(config), gguf.path, ctx, bytes_per_token(config))
    for name in config.tensors:
        if name not in parts:
            executable.add_weight(name, partial(_single, config, gguf, guard, name), partial(gguf.release, [name]))
    for name, names in stacked.items():
        present = [part for part in names if part in config.tensors]
        executable.add_weight(name, partial(_stack, config, gguf, guard, names), partial(gguf.release, present))


def _single(config: ModelConfig, gguf: GGUFFile, guard: PackingGuard, name: str) -> Weight | Array:
    kind = config.tensors[name]
    guard.hand_out(tensor_bytes(kind.shape, kind.dtype))
    return gguf.array(name) if kind.dtype == "f32" else gguf.weight(name)


def _stack(config: ModelConfig, gguf: GGUFFile, guard: PackingGuard, names: tuple[str, ...]) -> Weight | Array:
    """Several matrices, or their biases, as one; a bias that lacks is zeros."""
    if names[0].endswith(".weight"):
        guard.hand_out(sum(tensor_bytes(config.tensors[name].shape, config.tensors[name].dtype) for name in names))
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
