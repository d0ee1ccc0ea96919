"""The GGUF reader under limits on time and memory, and under mutation: a refusal or a sound file, nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import accepted_files, malformed_files, small_image
from gguf_image import Image, Key, Tensor, u32, u64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polykern.kernels.errors import ModelError, ModelFormatError
from polykern.kernels.quant import FORMATS
from polykern.runtime.gguf import GGUFFile
from tiny_llama import random_blocks

# Opens every file named on the command line. A blow-up fails against the limit on address space rather than filling
# the machine; the peak of resident memory is VmHWM, as ru_maxrss would count the parent's. Seconds are of processor
# time, so that a busy machine fails nothing; what waits runs into the timeout of the whole.
OPEN_ALL = """
import json, resource, sys, time
from polykern.kernels.errors import ModelFormatError
from polykern.runtime.gguf import GGUFFile

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

limit = status("VmSize:") + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        GGUFFile.open(path)
        outcome = "accepted"
    except ModelFormatError:
        outcome = "refused"
    print(json.dumps([path, outcome, time.process_time() - start, status("VmHWM:")]), flush=True)
"""


def costliest() -> list[tuple[str, bytes, int, str]]:
    """Files that use up a limit, as (id, start, size, outcome); what follows the start is zeros, and not on disk."""
    keys = [Key(f"k{i}", "u8", 0) for i in range(1 << 14)]
    head = Image(n_tensors=1 << 14).encode()[:24] + b"".join(Tensor(f"t{i}", (0,), 0).encode(0) for i in range(1 << 14))
    names = b"".join(Key(f"{i:065535}", "u8", 0).encode() for i in range(1200))

    def key(kind: str, length: int, count: int = 1) -> bytes:
        array = u32({"bool": 7, "str": 8}[kind]) + u64(count)
        return Image([Key("a", f"array[{kind}]", 0, raw=array + u64(length) * (kind == "str"))], alignment=1).encode()

    return [
        ("most_strings", key("str", 0, 1 << 21), 49 + (8 << 21), "accepted"),
        ("most_keys", Image(keys).encode(), 0, "accepted"),
        ("most_tensors", Image().padded(head), 0, "accepted"),
        ("most_text", key("str", (64 << 20) - 1), 200 << 20, "accepted"),
        ("too_much_text", key("str", 64 << 20), 200 << 20, "refused"),
        ("most_bools", key("bool", 0, (128 << 20) - 49), 200 << 20, "accepted"),
        ("long_names", Image(n_keys=1200).encode()[:24] + names, 0, "refused"),
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
def test_time_and_memory(tmp_path: Path) -> None:
    files = [(name, data, 0, "refused") for name, data, _ in malformed_files()]
    files += [(name, data, 0, "accepted") for name, data in accepted_files()]
    expected: dict[str, str] = {}
    for name, data, size, outcome in files + costliest():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        os.truncate(path, max(size, len(data)))
        expected[str(path)] = outcome
    child = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, *expected], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert {path: outcome for path, outcome, *_ in results} == expected
    slowest = max(results, key=lambda result: result[2])
    assert slowest[2] < 2, slowest
    assert results[-1][3] < 300e6, f"peak resident memory {results[-1][3] >> 20} MiB"


INTERESTING = [0, 1, 2, 4, 7, 8, 9, 13, 31, 32, 33, 64, 255, 256, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61]
INTERESTING += [2**62, 2**63 - 1, 2**63, 2**64 - 1]
numbers = st.sampled_from(INTERESTING) | st.integers(0, 2**64 - 1)
names = st.sampled_from(["", "a", "test.u8", "my_tensor_0", "general.alignment", "split.count", "\n", "n" * 64])


def base_image() -> Image:
    """Every value type, arrays, and tensors in several formats."""
    image, rng = small_image(), np.random.default_rng(0)
    for name in ("F16", "Q4_0", "Q8_0", "Q6_K"):
        data = random_blocks(rng, name, 2, 256, 1.0)
        image.tensors.append(Tensor(f"w.{name}", (256, 2), FORMATS[name].gguf_type, data))
    return image


def mutate_image(image: Image, draw: Callable[..., Any]) -> None:
    """Change one thing in the header, a key or a tensor of `image`."""
    what = draw(st.sampled_from(["count", "version", "alignment", "key", "key_list", "tensor", "tensor_list"]))
    number = draw(numbers)
    if what == "count":
        setattr(image, draw(st.sampled_from(["n_keys", "n_tensors"])), number)
    elif what == "version":
        image.version = number
    elif what == "alignment":
        image.keys.append(Key("general.alignment", draw(st.sampled_from(["u32", "u64"])), number % 2**32))
        image.alignment = draw(st.sampled_from([1, 8, 32, 64]))
    elif what in ("key_list", "tensor_list"):
        records: list[Any] = image.keys if what == "key_list" else image.tensors
        if records:
            index = draw(st.integers(0, len(records) - 1))
            record = records.pop(index)
            records[index:index] = [record] * draw(st.integers(0, 2))
            if draw(st.booleans()):
                records.reverse()
    elif what == "key" and image.keys:
        key = draw(st.sampled_from(image.keys))
        change = draw(st.sampled_from(["name", "name_length", "type_id", "raw", "array"]))
        raw = u32(draw(st.integers(0, 13))) + u64(number) if change == "array" else draw(st.binary(max_size=40))
        new = {"name": draw(names), "name_length": number, "type_id": number % 16, "raw": raw, "array": raw}[change]
        setattr(key, "raw" if change == "array" else change, new)
    elif what == "tensor" and image.tensors:
        tensor = draw(st.sampled_from(image.tensors))
        change = draw(st.sampled_from(["name", "dims", "type_id", "data", "offset", "n_dims"]))
        new = {
            "name": draw(names),
            "dims": draw(st.lists(numbers, max_size=5)),
            "type_id": number % 48,
            "data": draw(st.binary(max_size=600)),
            "offset": number,
            "n_dims": number,
        }[change]
        setattr(tensor, change, new)


def mutate_bytes(data: bytearray, draw: Callable[..., Any]) -> None:
    """Flip, overwrite, insert or cut at one place."""
    at = draw(st.integers(0, len(data)))
    what = draw(st.sampled_from(["flip", "overwrite", "insert", "truncate"]))
    if what == "flip" and at < len(data):
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif what == "overwrite":
        data[at : at + 8] = u64(draw(numbers))
    elif what == "insert":
        data[at:at] = draw(st.binary(max_size=16))
    elif what == "truncate":
        del data[at:]


@st.composite
def mutants(draw: Any) -> bytes:
    image = base_image()
    for _ in range(draw(st.integers(0, 3))):
        mutate_image(image, draw)
    data = bytearray(image.encode())
    for _ in range(draw(st.integers(0, 2))):
        mutate_bytes(data, draw)
    return bytes(data)


def use_everything(model: GGUFFile, data: bytes) -> None:
    """Read all that an accepted file promises; ModelError and ModelFormatError are the only way out."""
    end = model.data_offset
    for name, info in model.tensors.items():
        assert end <= info.offset
        end = info.offset + info.nbytes
        assert end <= len(data)
        assert model.raw(name).tobytes() == data[info.offset : end]
        for read in (model.check_finite, model.weight, model.array):
            with suppress(ModelError, ModelFormatError):
                read(name)
    for key, found in model.metadata_types.items():
        kind: Any = {"f": float, "b": bool, "s": str}.get(found.removeprefix("array[")[0], int)
        with suppress(ModelFormatError):  # a float that is not finite
            assert (model.get_array if found.startswith("array") else model.get)(key, kind) is not None
    assert not [name for name in model.unconsumed() if name.startswith("key ")]


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=mutants())
def test_mutants(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(data)
    refused, model = "", None
    try:
        model = GGUFFile.open(path)
    except ModelFormatError as error:
        refused = str(error)
    if model is None:
        assert refused.startswith(f"{path}: ")
        assert "\n" not in refused
    else:
        with np.errstate(all="ignore"):  # random numbers overflow when they are dequantised
            use_everything(model, data)
