"""What the GGUF reader hands out: against the gguf package, typed access, accounting, views, checks of values."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import small_image
from gguf_image import F32, VALUE_TYPES, Image, Key, Tensor, string
from polykern.kernels.errors import ModelError, ModelFormatError
from polykern.kernels.quant import FORMATS, dequantize_rows
from polykern.runtime.gguf import GGUFFile
from tiny_llama import bpe_tokenizer, llama_image, random_blocks, valid_llama_gguf

Write = Callable[[Image | bytes], Path]


# Against the gguf package


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    """All value types, arrays, all 11 formats, a custom alignment."""
    path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    scalars = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "u64": 2**64 - 1,
        "i64": -(2**63), "f32": 1.5, "f64": 1e-300, "bool": True, "str": "日本 \n \0 end",
    }  # fmt: skip
    for kind, number in scalars.items():
        writer.add_key_value(f"a.{kind}", number, gguf.GGUFValueType(VALUE_TYPES[kind]))
        array = [number, number]
        element = gguf.GGUFValueType(VALUE_TYPES[kind])
        writer.add_key_value(f"a.list_{kind}", array, gguf.GGUFValueType.ARRAY, sub_type=element)
    stored: dict[str, np.ndarray] = {}
    for name, fmt in FORMATS.items():
        rows = np.frombuffer(random_blocks(rng, name, 3, 512, 1.0), np.uint8).reshape(3, fmt.row_bytes(512))
        stored[name] = rows
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType(fmt.gguf_type))
    cube = rng.normal(size=(2, 3, 5)).astype(np.float32)
    writer.add_tensor("cube", cube)
    writer.add_tensor("vector", cube[0, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile.open(path) as model:
        assert (model.version, model.alignment, model.trailing_bytes) == (3, 64, 0)
        for kind, number in scalars.items():
            python_type: Any = {"f32": float, "f64": float, "bool": bool, "str": str}.get(kind, int)
            found = model.get(f"a.{kind}", python_type)
            assert (found, type(found)) == (number, python_type)
            assert model.metadata_types[f"a.list_{kind}"] == f"array[{kind}]"
            assert list(model.get_array(f"a.list_{kind}", python_type)) == [number, number]
        for name, rows in stored.items():
            weight = model.weight(name)
            assert (weight.format, weight.shape) == (FORMATS[name], (3, 512))
            np.testing.assert_array_equal(weight.data, rows)
            np.testing.assert_array_equal(model.array(name), dequantize_rows(FORMATS[name], rows))
        np.testing.assert_array_equal(model.array("cube"), cube)
        np.testing.assert_array_equal(model.array("vector"), cube[0, 0])


@pytest.mark.parametrize("image", [small_image(), llama_image(weight_format="Q4_1")], ids=["small", "llama"])
def test_agrees_with_the_gguf_package_reader(write: Write, image: Image) -> None:
    path = write(image)
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as model:
        for key, found in model.metadata.items():
            expected = theirs.fields[key].contents()
            assert (list(found) if isinstance(found, np.ndarray | list) else found) == expected
        assert len(model.tensors) == len(theirs.tensors)
        for tensor in theirs.tensors:
            info = model.tensors[tensor.name]
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert (info.shape, info.type_name) == (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name)
            assert model.raw(tensor.name).tobytes() == tensor.data.tobytes()


# Typed access and accounting


@pytest.fixture
def model(write: Write) -> GGUFFile:
    image = small_image()
    image.keys += [Key("test.nan", "f32", float("nan")), Key("test.inf", "f64", float("-inf"))]
    return GGUFFile.open(write(image))


def test_wrong_type_names_key_types_and_record(model: GGUFFile) -> None:
    with pytest.raises(ModelFormatError) as caught:
        model.get("test.u32", str)
    at = model.key_offsets["test.u32"]
    assert str(caught.value) == f"{model.path}: key test.u32 at byte {at}: expected a string, found u32"
    assert Path(model.path).read_bytes()[at : at + 16] == string("test.u32")
    for key, kind, text in (
        ("test.str", int, "expected an integer, found str"),
        ("test.bool", int, "expected an integer, found bool"),
        ("test.u8", bool, "expected a bool, found u8"),
        ("test.u8", float, "expected a float, found u8"),
        ("test.f32", int, "expected an integer, found f32"),
        ("test.list_u8", int, r"expected an integer, found array\[u8\]"),
    ):
        with pytest.raises(ModelFormatError, match=text):
            model.get(key, kind)
    with pytest.raises(ModelFormatError, match=r"expected an array with a string in each place, found array\[i32\]"):
        model.get_array("test.list_i32", str)
    with pytest.raises(ModelFormatError, match="expected an array with an integer in each place, found u8"):
        model.get_array("test.u8", int)


def test_missing_key(model: GGUFFile) -> None:
    with pytest.raises(ModelError, match=r"key no\.such is missing, expected an integer"):
        model.get("no.such", int)
    assert model.get("no.such", int, 7, low=100) == 7
    assert model.get("no.such", str, None) is None
    assert model.get_array("no.such", str, []) == []


def test_range(model: GGUFFile) -> None:
    assert model.get("test.u8", int, low=200, high=200) == 200
    with pytest.raises(
        ModelFormatError, match=r"key test\.u8 at byte 24: is 200, expected at least 201 and at most 300"
    ):
        model.get("test.u8", int, low=201, high=300)
    with pytest.raises(ModelFormatError, match="is 200, expected at most 199"):
        model.get("test.u8", int, high=199)
    with pytest.raises(ModelFormatError, match="is nan, expected a finite number"):
        model.get("test.nan", float)
    with pytest.raises(ModelFormatError, match="is -inf, expected a finite number"):
        model.get("test.inf", float)
    with pytest.raises(ModelFormatError, match="is nan, expected at least 0"):
        model.get("test.nan", float, low=0)


def test_unconsumed(write: Write) -> None:
    image = llama_image(n_layers=1)
    image.keys += [Key("general.alignment", "u32", 32), Key("llama.surprise", "u32", 1)]
    model = GGUFFile.open(write(image))
    everything = model.unconsumed()
    assert "key general.alignment" not in everything  # the reader's own
    assert len(everything) == len(image.keys) - 1 + len(image.tensors)
    model.get("llama.block_count", int)
    model.get_array("tokenizer.ggml.tokens", str)
    model.weight("token_embd.weight")
    model.array("output_norm.weight")
    model.check_finite("blk.0.attn_q.weight")  # looks, but does not use
    model.ignore("general.*", "describes the model")
    model.ignore("blk.0.ffn_*", "not needed here")
    left = model.unconsumed()
    assert not {"key llama.block_count", "tensor token_embd.weight", "tensor output_norm.weight"} & set(left)
    assert "key llama.surprise" in left
    assert "tensor blk.0.attn_q.weight" in left
    assert not [name for name in left if "ffn" in name or "general" in name]
    assert model.ignored["blk.0.ffn_up.weight"] == "not needed here"
    assert left == [name for name in everything if name in left]  # in file order


def test_weights_are_read_only_views(write: Write) -> None:
    path = write(llama_image(weight_format="F32"))
    model = GGUFFile.open(path)
    for view in (
        model.weight("token_embd.weight").data,
        model.array("output_norm.weight"),
        model.raw("blk.0.attn_q.weight"),
    ):
        assert not view.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
    info = model.tensors["token_embd.weight"]
    with path.open("r+b") as other:
        other.seek(info.offset)
        other.write(struct.pack("<f", 1234.5))
    assert model.weight("token_embd.weight").dense()[0, 0] == 1234.5


def test_a_vector_is_no_matrix(write: Write) -> None:
    model = GGUFFile.open(write(small_image()))
    with pytest.raises(ModelFormatError, match=r"tensor my_tensor_0 at byte \d+: expected a matrix, found shape \[5\]"):
        model.weight("my_tensor_0")
    with pytest.raises(ModelFormatError, match=r"expected a matrix, found shape \[2, 1, 3, 2\]"):
        model.weight("my_tensor_2")
    with pytest.raises(ModelError, match="tensor nothing is missing; the file has 3 tensors"):
        model.array("nothing")
    assert model.array("my_tensor_2").shape == (2, 1, 3, 2)
    assert model.weight("my_tensor_1").dense().tolist() == [[0], [1], [2]]


# NaN and infinity


def finite_fields() -> list[Any]:
    """Each field of a format that check_finite reads, as (format, field)."""
    read = [(f.name, p.name) for f in FORMATS.values() for p in f.fields if f.is_float or p.kind in ("scale", "min")]
    return [pytest.param(*names, id=" ".join(names)) for names in read]


@pytest.mark.parametrize(("fmt", "part"), finite_fields())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("block", [0, 1, 5])
def test_not_finite(write: Write, monkeypatch: pytest.MonkeyPatch, fmt: str, part: str, bad: float, block: int) -> None:
    monkeypatch.setattr("polykern.runtime.gguf._CHUNK_BLOCKS", 2)
    f = FORMATS[fmt]
    field = next(p for p in f.fields if p.name == part)
    data = bytearray(random_blocks(np.random.default_rng(0), fmt, 2, 3 * f.block_length, 1.0))
    image = Image(tensors=[Tensor("before", (8,), F32, bytes(32)), Tensor("t", (3 * f.block_length, 2), f.gguf_type)])

    image.tensors[1].data = bytes(data)
    GGUFFile.open(write(image)).check_finite("t")

    at = block * f.block_bytes + field.offset
    code = np.float32(bad).tobytes()
    stored = {"F32": code, "BF16": code[2:]}.get(fmt, np.float16(bad).tobytes())
    data[at : at + len(stored)] = stored
    image.tensors[1].data = bytes(data)
    model = GGUFFile.open(write(image))
    model.check_finite("before")
    what = f"value {block}" if f.is_float else f"field {part} of block {block}"
    offset = model.tensors["t"].offset + at
    with pytest.raises(ModelFormatError, match=f"tensor t at byte {offset}: {what} is NaN or infinite"):
        model.check_finite("t")


def test_largest_finite_numbers_pass(write: Write) -> None:
    numbers = {"F32": np.finfo(np.float32).max, "F16": np.float16(65504), "BF16": np.uint16(0x7F7F)}
    image = Image(tensors=[Tensor(n, (1,), FORMATS[n].gguf_type, x.tobytes()) for n, x in numbers.items()])
    model = GGUFFile.open(write(image))
    for name in numbers:
        model.check_finite(name)


# The builder itself: what other tests rely on


@pytest.mark.parametrize("fmt", FORMATS)
def test_tiny_llama(write: Write, fmt: str) -> None:
    big = FORMATS[fmt].block_length == 256
    sizes = {"hidden": 256, "heads": 4, "head_dim": 64, "ff": 512} if big else {}
    model = GGUFFile.open(write(valid_llama_gguf(weight_format=fmt, tied=False, qkv_bias=True, vocab=300, **sizes)))
    hidden = model.get("llama.embedding_length", int)
    assert model.weight("token_embd.weight").shape == (300, hidden)
    for name, info in model.tensors.items():
        model.check_finite(name)
        if len(info.shape) == 2:
            assert info.type_name == fmt
            gain = 4 if name in ("token_embd.weight", "output.weight") else 1
            dense = model.weight(name).dense() * info.shape[1] ** 0.5 / gain
            assert abs(dense.mean()) < 0.15
            assert 0.8 < dense.std() < 1.25, name
    assert valid_llama_gguf() == valid_llama_gguf()


def test_tiny_tokenizer_is_consistent() -> None:
    tokens, merges = bpe_tokenizer(1000)
    assert len(tokens) == len(set(tokens)) == 1000
    known = set(tokens[:259])
    for merge, token in zip(merges, tokens[259:], strict=True):
        left, right = merge.split(" ")
        assert {left, right} <= known
        assert left + right == token
        known.add(token)
