"""The GGUF reader: which files it accepts, and how it refuses the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import accepted_files, malformed_files, small_image
from gguf_image import Image, Key, Tensor, u32, u64
from polykern.kernels.errors import ModelError, ModelFormatError
from polykern.kernels.quant import FORMATS
from polykern.runtime.gguf import GGUFFile
from tiny_llama import valid_llama_gguf

MALFORMED = malformed_files()
ACCEPTED = accepted_files()
Write = Callable[[Image | bytes], Path]


def refusal(path: Path | str) -> ModelFormatError:
    """The error that opening `path` ends with: one line that names the file."""
    with pytest.raises(ModelFormatError) as caught:
        GGUFFile.open(path)
    assert "\n" not in str(caught.value)
    return caught.value


# Refused and accepted files


@pytest.mark.parametrize(("data", "where"), [pytest.param(d, w, id=i) for i, d, w in MALFORMED])
def test_malformed_file_is_refused(write: Write, data: bytes, where: str) -> None:
    path = write(data)
    error = refusal(path)
    assert re.match(rf"{re.escape(str(path))}: {where}(?!\d)", str(error)), str(error)
    assert error.offset is None or 0 <= error.offset <= len(data)
    assert len(str(error)) < 600 + len(str(path))


@pytest.mark.parametrize("data", [pytest.param(d, id=i) for i, d in ACCEPTED])
def test_file_at_the_edge_is_accepted(write: Write, data: bytes) -> None:
    with GGUFFile.open(write(data)) as model:
        for info in model.tensors.values():
            assert data[info.offset : info.offset + info.nbytes] == model.raw(info.name).tobytes()


def test_all_handcrafted_cases_are_here() -> None:
    """The 33 cases of upstream's test: 26 to refuse, 7 to accept."""
    assert sum(name.split("_")[0] in ("HEADER", "KV", "TENSORS", "DATA") for name, *_ in MALFORMED) == 26
    assert [name for name, _ in ACCEPTED if name.isupper()] == [
        "HEADER_EMPTY",
        "KV_SUCCESS",
        "TENSORS_ZERO_DIM",
        "TENSORS_SUCCESS",
        "TENSORS_CUSTOM_ALIGN",
        "DATA_SUCCESS",
        "DATA_CUSTOM_ALIGN",
    ]
    names = [name for name, *_ in (*MALFORMED, *ACCEPTED)]
    assert len(set(names)) == len(names)


def test_accepted_details(write: Write) -> None:
    files = dict(ACCEPTED)
    assert GGUFFile.open(write(files["version_2"])).version == 2
    assert GGUFFile.open(write(files["bytes_after_last_tensor"])).trailing_bytes == 81
    for name, alignment, starts in (("DATA_SUCCESS", 32, [0, 32, 96]), ("DATA_CUSTOM_ALIGN", 1, [0, 20, 56])):
        model = GGUFFile.open(write(files[name]))
        assert model.alignment == alignment
        assert [info.offset - model.data_offset for info in model.tensors.values()] == starts
        for tensor, start in zip(model.tensors, starts, strict=True):
            assert model.raw(tensor).tolist() == [(start + i) % 256 for i in range(model.tensors[tensor].nbytes)]
            assert model.array(tensor).flags.aligned
    zero = GGUFFile.open(write(files["TENSORS_ZERO_DIM"]))
    assert zero.tensors["my_tensor_0"].shape == (0, 32)
    with pytest.raises(ModelFormatError, match=r"tensor my_tensor_0 at byte 24: is empty: shape \[0, 32\]"):
        zero.weight("my_tensor_0")


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"<!DOCTYPE html>" + bytes(50), "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04" + bytes(50), "zip archive"),
        (b"\x80\x02}q\x00" + bytes(50), "pickle"),
        (u64(99) + b'{"__metadata__":{}}', "safetensors"),
        (b"tjgg" + bytes(50), "from before GGUF"),
    ],
    ids=["html", "lfs", "zip", "pickle", "safetensors", "ggml"],
)
def test_what_it_is_instead(write: Write, start: bytes, hint: str) -> None:
    assert hint in str(refusal(write(start)))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("big_endian", "is 0x03000000: a big-endian file, which is not supported"),
        ("HEADER_BAD_VERSION_1", "is 1, supported are 2 and 3"),
        ("HEADER_BAD_N_KV", "is 18446744073709551615, the limit is 16384"),
        ("one_key_too_many_for_file", "is 1, the file has room for 0: malformed, or a truncated download"),
        ("KV_DUPLICATE_KEY", "occurs twice, first at byte 24"),
        ("key_with_escape_sequence", r"its name '\x1b[2Ja' is not printable ASCII without spaces"),
        ("array_of_arrays", "is an array of arrays, which is not supported"),
        (
            "array_length_2_63",
            "takes 9223372036854775808 bytes, the file has 0 left: malformed, or a truncated download",
        ),
        ("bool_2", "is a bool stored as 2, expected 0 or 1"),
        (
            "split_model",
            "is 3: one part of a split model, which is not supported: merge the parts with `llama-gguf-split",
        ),
        ("offset_not_aligned", "data offset 4 is not a multiple of the alignment 32"),
        ("tensors_overlap", "data offset 32 overlaps tensor t, expected 64"),
        ("gap", "data offset 128 leaves a gap after tensor t, expected 64"),
        ("row_not_whole_blocks", "has rows of 48 numbers, not whole Q4_0 blocks of 32"),
        ("data_starts_past_end", "starts at byte 96, the file has 70: truncated download?"),
        ("one_tensor_uncounted", "padding up to byte 96 is not zero: more records than were counted?"),
    ],
)
def test_what_is_wrong_is_said(write: Write, name: str, problem: str) -> None:
    assert problem in str(refusal(write(next(data for case, data, _ in MALFORMED if case == name))))


def test_missing_bytes_are_counted(write: Write) -> None:
    data = valid_llama_gguf()
    assert f"the file has {len(data) - 1000} (1000 are missing in all)" in str(refusal(write(data[:-1000])))


def test_tensor_types_known_removed_unknown(write: Write) -> None:
    def of_type(type_id: int) -> Path:
        return write(Image(tensors=[Tensor("t", (256, 1), type_id, bytes(1024))]))

    assert "is of type 4 (Q4_2), since removed from GGUF" in str(refusal(of_type(4)))
    assert "is of unknown type 255" in str(refusal(of_type(255)))
    model = GGUFFile.open(of_type(10))
    info = model.tensors["t"]
    assert (info.type_name, info.format, info.nbytes) == ("Q2_K", None, 84)
    model.check_finite("t")
    for read in (model.weight, model.array):
        with pytest.raises(ModelError, match=r"tensor t is stored as Q2_K, which is not supported: requantise .* Q6_K"):
            read("t")


def test_every_foreign_type_has_a_size(write: Write) -> None:
    """Each type of the gguf package that is not ours can be listed, with the size that package gives it."""
    for known, (block_length, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        model = GGUFFile.open(write(Image(tensors=[Tensor("t", (block_length, 3), known, bytes(3 * block_bytes))])))
        info = model.tensors["t"]
        assert (info.type_name, info.nbytes, info.format is None) == (
            known.name,
            3 * block_bytes,
            known.name not in FORMATS,
        )


# What is no regular file


def test_missing_file(tmp_path: Path) -> None:
    assert str(refusal(tmp_path / "no.gguf")).endswith("no.gguf: file: cannot be opened: No such file or directory")


def test_directory(tmp_path: Path) -> None:
    assert str(refusal(tmp_path)).endswith(": file: is a directory: name a .gguf file")


def test_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in str(refusal(tmp_path / "pipe"))


def test_device() -> None:
    assert "is not a regular file" in str(refusal("/dev/zero"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(write: Write) -> None:
    path = write(small_image())
    path.chmod(0)
    assert "cannot be opened: Permission denied" in str(refusal(path))


def test_symlink_loop(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be opened: Too many levels of symbolic links" in str(refusal(tmp_path / "loop"))


@pytest.mark.parametrize("path", ["", "a\0b", "no such\nfile", "n" * 5000, "\udcff.gguf"])
def test_odd_path(path: str) -> None:
    error = refusal(path)
    assert "cannot be opened" in str(error)
    assert str(error).isprintable()


# Limits that only large files reach. Sparse files: only the header is on disk, and it must not matter what follows.


MOST_TEXT = (64 << 20) - 1  # beside the one byte of the key's name


@pytest.mark.parametrize(("length", "accepted"), [(MOST_TEXT, True), (MOST_TEXT + 1, False), (MOST_TEXT + 2, False)])
def test_text_limit(write: Write, length: int, accepted: bool) -> None:
    path = write(Image([Key("a", "str", "", raw=u64(length))], alignment=1))
    with path.open("r+b") as file:
        file.truncate(45 + length)
    if accepted:
        assert GGUFFile.open(path).get("a", str) == "\0" * length
    else:
        assert re.search(r"key a at byte 45: .* bytes.*, the limit is 67108864$", str(refusal(path)))


@pytest.mark.parametrize(("second", "accepted"), [(MOST_TEXT - (40 << 20), True), (MOST_TEXT - (40 << 20) + 1, False)])
def test_text_limit_in_an_array(write: Write, second: int, accepted: bool) -> None:
    path = write(Image([Key("a", "array[str]", [], raw=u32(8) + u64(2) + u64(40 << 20))], alignment=1))
    with path.open("r+b") as file:
        file.seek(49 + 8 + (40 << 20))
        file.write(u64(second))
        file.truncate(49 + 16 + (40 << 20) + second)
    if accepted:
        assert [len(text) for text in GGUFFile.open(path).get_array("a", str)] == [40 << 20, second]
    else:
        assert "brings names and strings to 67108865 bytes, the limit is 67108864" in str(refusal(path))


@pytest.mark.parametrize(("length", "accepted"), [((128 << 20) - 49, True), ((128 << 20) - 48, False)])
def test_header_limit(write: Write, length: int, accepted: bool) -> None:
    path = write(Image([Key("a", "array[u8]", 0, raw=u32(0) + u64(length))], alignment=1))
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    if accepted:
        assert GGUFFile.open(path).get_array("a", int).shape == (length,)
    else:
        assert f"key a at byte 49: {length} bytes would exceed the limit of {128 << 20}" in str(refusal(path))


# The file changes while it is open


@pytest.mark.parametrize("change", [-1, 1])
def test_size_changes_after_open(write: Write, change: int) -> None:
    data = valid_llama_gguf()
    path = write(data)
    model = GGUFFile.open(path)
    os.truncate(path, len(data) + change)
    problem = f"file: changed from {len(data)} to {len(data) + change} bytes while it was open"
    for read in (model.weight, model.array, model.raw, model.check_finite):
        with pytest.raises(ModelFormatError, match=problem):
            read("token_embd.weight")


def test_file_shrinks_while_it_is_opened(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(small_image())
    read = os.read

    def truncating_read(fd: int, count: int) -> bytes:
        os.truncate(path, 40)
        return read(fd, count)

    monkeypatch.setattr(os, "read", truncating_read)
    assert "file: cannot be read: mmap length is greater than file size" in str(refusal(path))


def test_views_outlive_close(write: Write) -> None:
    model = GGUFFile.open(write(valid_llama_gguf(weight_format="F32")))
    weight, expected = model.weight("token_embd.weight"), model.array("token_embd.weight").copy()
    model.close()
    model.close()
    np.testing.assert_array_equal(weight.dense(), expected)
    with pytest.raises(ModelError, match="already closed"):
        model.weight("token_embd.weight")
