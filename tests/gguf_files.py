"""Collections of GGUF files: those that must open and those that must be refused.

The cases with capital names are those of tests/test-gguf.cpp in ggml-org/llama.cpp at 03f94f1, built here from their
description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf_image import F32, I8, I64, Image, Key, Tensor, string, u32, u64
from tiny_llama import llama_image, valid_llama_gguf

__all__ = ["accepted_files", "llama_image", "malformed_files", "small_image", "valid_llama_gguf"]


def small_image() -> Image:
    """One key of each value type and of each array type, and three float tensors."""
    samples = {
        "u8": 200, "i8": -100, "u16": 60000, "i16": -30000, "u32": 4000000000, "i32": -2000000000, "f32": 0.5,
        "bool": True, "str": "grüße", "u64": 2**63 + 1, "i64": -(2**62), "f64": 1e300,
    }  # fmt: skip
    keys = [Key(f"test.{kind}", kind, sample) for kind, sample in samples.items()]
    keys += [Key(f"test.list_{kind}", f"array[{kind}]", [sample] * 3) for kind, sample in samples.items()]
    keys += [Key("test.list_empty", "array[f32]", []), Key("test.no_strings", "array[str]", [])]
    return Image(keys, _floats((5,), (1, 3), (2, 3, 1, 2)))


def _floats(*shapes: Sequence[int]) -> list[Tensor]:
    return [
        Tensor(f"my_tensor_{i}", shape, F32, np.arange(int(np.prod(shape)), dtype="<f4").tobytes())
        for i, shape in enumerate(shapes)
    ]


def _pattern(tensors: list[Tensor], alignment: int) -> list[Tensor]:
    """The tensors with bytes that count on through padding, as DATA_SUCCESS has them."""
    start = 0
    for tensor in tensors:
        size = len(tensor.data)
        tensor.data = bytes((start + i) % 256 for i in range(size))
        start += -(-size // alignment) * alignment
    return tensors


def accepted_files() -> list[tuple[str, bytes]]:
    """Files at the edge of what must open, as (id, bytes); the seven accepted HANDCRAFTED_ cases come first."""
    align_1, align_1_mib = (Key("general.alignment", "u32", alignment) for alignment in (1, 1 << 20))
    unsupported = Tensor("my_tensor", (256, 2), 10, bytes(2 * 84))  # Q2_K
    return [
        ("HEADER_EMPTY", Image().encode()),
        ("KV_SUCCESS", Image(small_image().keys).encode()),
        ("TENSORS_ZERO_DIM", Image(tensors=[Tensor(f"my_tensor_{i}", (32, 0), 8) for i in range(3)]).encode()),
        ("TENSORS_SUCCESS", Image(tensors=_floats((5,), (7, 2), (1, 1, 3), (2, 1, 1, 2))).encode()),
        ("TENSORS_CUSTOM_ALIGN", Image([align_1], _floats((5,), (7, 2), (1, 1, 3)), alignment=1).encode()),
        ("DATA_SUCCESS", Image(small_image().keys, _pattern(_floats((5,), (9,), (64,)), 32), padding=b"\0").encode()),
        ("DATA_CUSTOM_ALIGN", Image([align_1], _pattern(_floats((5,), (9,), (64,)), 1), alignment=1).encode()),
        ("header_only_24_bytes", Image().encode()[:24]),
        ("version_2", Image(version=2, tensors=_floats((5,))).encode()),
        ("largest_alignment", Image([align_1_mib], _floats((5,)), alignment=1 << 20).encode()),
        ("no_padding_after_last_tensor", Image(tensors=_floats((5,))).encode()[:-12]),
        ("bytes_after_last_tensor", Image(tensors=_floats((8,))).encode() + b"signature" * 9),
        ("name_of_63_bytes", Image(tensors=[Tensor("n" * 63, (8,), F32, bytes(32))]).encode()),
        ("key_of_65535_bytes", Image([Key("k" * 65535, "u8", 1)]).encode()),
        ("not_split", Image([Key("split.count", "u16", 1)]).encode()),
        ("unsupported_tensor_type", Image(tensors=[unsupported]).encode()),
        ("tiny_llama", valid_llama_gguf()),
    ]  # fmt: skip


def malformed_files() -> list[tuple[str, bytes, str]]:
    """Files that must be refused, as (id, bytes, regular expression for the field and offset that the error names)."""
    cases: list[tuple[str, bytes, str]] = []

    def add(name: str, data: Image | bytes, where: str) -> None:
        cases.append((name, data.encode() if isinstance(data, Image) else data, where))

    def key(name: str, where: str, kind: str, content: Any = 0, key_name: str | bytes = "a", **other: Any) -> None:
        add(name, Image([Key(key_name, kind, content, **other)], alignment=1), where)

    def tensor(name: str, where: str, *tensors: Tensor, **other: Any) -> None:
        add(name, Image(tensors=list(tensors), **other), where)

    small, llama = small_image().encode(), valid_llama_gguf()
    minus_1 = 2**64 - 1

    # Not a GGUF file, or not all of its header
    add("empty", b"", "file")
    add("one_byte", b"G", "header at byte 0")
    add("header_cut", small[:23], "header at byte 0")
    add("text", b"Hello, world.\n", "header magic at byte 0")
    add("web_page", b"<!DOCTYPE html><html><body>404</body></html>", "header magic at byte 0")
    add("git_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header magic at byte 0")
    add("zip_archive", b"PK\x03\x04" + bytes(60), "header magic at byte 0")
    add("pickle", b"\x80\x02}q\x00." + bytes(60), "header magic at byte 0")
    add("safetensors", u64(8) + b'{"a":{}}', "header magic at byte 0")
    add("zeros", bytes(4096), "header magic at byte 0")
    add("HEADER_BAD_MAGIC", Image(magic=b"FUGG"), "header magic at byte 0")
    add("HEADER_BAD_VERSION_0", Image(version=0), "header version at byte 4")
    add("HEADER_BAD_VERSION_1", Image(version=1), "header version at byte 4")
    add("HEADER_BAD_VERSION_FUTURE", Image(version=4), "header version at byte 4")
    add("big_endian", Image(version=3 << 24), "header version at byte 4")
    add("HEADER_BAD_N_TENSORS", Image(n_tensors=minus_1), "header tensor count at byte 8")
    add("HEADER_BAD_N_KV", Image(n_keys=minus_1), "header key count at byte 16")
    add("n_tensors_over_limit", Image(n_tensors=16385).encode() + bytes(33 * 16385), "header tensor count at byte 8")
    add("n_keys_over_limit", Image(n_keys=16385).encode() + bytes(14 * 16385), "header key count at byte 16")
    add("one_key_too_many_for_file", Image(n_keys=1).encode()[:37], "header key count at byte 16")

    # Keys
    key("KV_BAD_KEY_SIZE", "key #0 at byte 32", "u8", name_length=minus_1)
    key("KV_EMPTY_KEY", "key #0 at byte 24", "u32", key_name="")
    key("KV_BAD_TYPE", "key a at byte 33", "u8", type_id=13)
    add("KV_DUPLICATE_KEY", Image([Key("a", "u8", 0), Key("b", "u8", 0), Key("a", "u8", 0)]), "key a at byte 52")
    key("KV_BAD_ALIGN", "key general.alignment at byte 24", "u32", 13, "general.alignment")
    key("KV_WRONG_TYPE_ALIGN", "key general.alignment at byte 24", "i32", 32, "general.alignment")
    key("align_0", "key general.alignment at byte 24", "u32", 0, "general.alignment")
    key("align_2_mib", "key general.alignment at byte 24", "u32", 2 << 20, "general.alignment")
    key("align_1_gib", "key general.alignment at byte 24", "u32", 1 << 30, "general.alignment")
    key("align_is_string", "key general.alignment at byte 24", "str", "32", "general.alignment")
    key("key_of_65536_bytes", "key #0 at byte 32", "u8", key_name="k" * 65536)
    key("key_past_end", "key #0 at byte 32", "u8", name_length=100)
    key("key_not_utf8", "key #0 at byte 34", "u8", key_name=b"ab\xff")
    key("key_not_ascii", "key #0 at byte 24", "u8", key_name="schlüssel")
    key("key_with_nul", "key #0 at byte 24", "u8", key_name="a\0b")
    key("key_with_newline", "key #0 at byte 24", "u8", key_name="a\nb")
    key("key_with_escape_sequence", "key #0 at byte 24", "u8", key_name="\x1b[2Ja")
    key("key_with_space", "key #0 at byte 24", "u8", key_name="a b")
    key("value_type_minus_1", "key a at byte 33", "u8", type_id=-1)
    key("value_missing", "key a at byte 37", "u64", raw=b"\0")
    key("bool_2", "key a at byte 37", "bool", raw=b"\x02")
    key("string_length_2_64", "key a at byte 45", "str", raw=u64(minus_1) + b"abc")
    key("string_past_end", "key a at byte 45", "str", raw=u64(4) + b"abc")
    key("string_not_utf8", "key a at byte 46", "str", b"a\xc3(")
    key("array_of_unknown_type", "key a at byte 37", "array[u8]", raw=u32(13) + u64(0))
    key("array_of_arrays", "key a at byte 37", "array[u8]", raw=u32(9) + u64(1) + u32(0) + u64(1) + b"\0")
    key("array_nested_100000_deep", "key a at byte 37", "array[u8]", raw=(u32(9) + u64(1)) * 100_000)
    key("array_length_2_63", "key a at byte 49", "array[u8]", raw=u32(0) + u64(2**63))
    key("array_bytes_wrap_2_64", "key a at byte 49", "array[u64]", raw=u32(10) + u64(2**61 + 1) + bytes(8))
    key("array_one_short", "key a at byte 49", "array[u32]", raw=u32(4) + u64(4) + bytes(15))
    key("array_bool_7", "key a at byte 49", "array[bool]", raw=u32(7) + u64(3) + b"\1\0\7")
    key("strings_length_2_63", "key a at byte 41", "array[str]", raw=u32(8) + u64(2**63))
    key("strings_one_short", "key a at byte 41", "array[str]", raw=u32(8) + u64(2) + string("x"))
    two = u32(8) + u64(2)
    key("strings_length_lies", "key a, string 1 at byte 66", "array[str]", raw=two + string("x") + u64(2**60))
    key("strings_end_in_length", "key a, string 1 at byte 64", "array[str]", raw=two + string("1234567") + b"1")
    key("strings_not_utf8", "key a, string 1 at byte 66", "array[str]", [b"x", b"\xff"])
    many = (1 << 21) + 1
    key("strings_over_limit", "key a at byte 41", "array[str]", raw=u32(8) + u64(many) + bytes(8 * many))
    key("split_model", "key split.count at byte 24", "u16", 3, "split.count")
    key("split_count_is_string", "key split.count at byte 24", "str", "3", "split.count")

    # Counts that do not agree with the records
    two_keys = [Key("a", "u32", 1), Key("b", "u32", 2)]
    add("one_key_uncounted", Image(two_keys, _floats((64,)), n_keys=1), "tensor b at byte")
    add("one_key_overcounted", Image(two_keys, _floats((64,)), n_keys=3), "tensor #0 at byte 82")
    add("one_tensor_uncounted", Image([], _floats((64,), (64,)), n_tensors=1), "tensor data at byte 67")
    add("one_tensor_overcounted", Image([], _floats((64,)), n_tensors=2), "tensor #1 at byte")

    # Tensor table: the first record at byte 24, its name at 32
    zeros = bytes(32)
    tensor("TENSORS_BAD_NAME_SIZE", "tensor #0 at byte 32", Tensor("n" * 64, (8,), F32, zeros))
    tensor("TENSORS_BAD_N_DIMS", "tensor t at byte 33", Tensor("t", (1,) * 5, F32, zeros))
    tensor("TENSORS_BAD_SHAPE", "tensor t at byte 37", Tensor("t", (minus_1, minus_1), F32, zeros))
    tensor("TENSORS_NE_TOO_BIG", "tensor t at byte 37", Tensor("t", (4 * (2**31 - 1),) * 2, F32, zeros))
    tensor("TENSORS_NBYTES_TOO_BIG", "tensor t at byte", Tensor("t", (1533916891,) * 2, I64, zeros))
    tensor("TENSORS_BAD_TYPE", "tensor t at byte 45", Tensor("t", (8,), 255, zeros))
    tensor("TENSORS_BAD_OFFSET", "tensor t at byte 49", Tensor("t", (8,), F32, zeros, offset=minus_1))
    tensor("TENSORS_DUPLICATE_NAME", "tensor t at byte 57", *[Tensor("t", (8,), F32, zeros)] * 2)
    align_13 = Key("general.alignment", "u32", 13)
    for group, tensors in (("TENSORS", _floats((5,), (9,))), ("DATA", _pattern(_floats((5,), (9,)), 13))):
        add(f"{group}_BAD_ALIGN", Image([align_13], tensors, alignment=13), "key general.alignment at byte 24")
        tensor(f"{group}_INCONSISTENT_ALIGN", "tensor my_tensor_1 at byte 102", *tensors, alignment=1)
    tensor("name_empty", "tensor #0 at byte 24", Tensor("", (8,), F32, zeros))
    tensor("name_not_utf8", "tensor #0 at byte 32", Tensor(b"\xfe", (8,), F32, zeros))
    tensor("name_is_path", "tensor #0 at byte 24", Tensor("../../etc/passwd", (8,), F32, zeros))
    tensor("name_has_control_character", "tensor #0 at byte 24", Tensor("a\rb", (8,), F32, zeros))
    cut = Image(tensors=[Tensor("t", (8,), F32, zeros)]).encode()
    add("name_length_2_64", cut[:24] + u64(minus_1) + cut[32:], "tensor #0 at byte 32")
    tensor("n_dims_0", "tensor t at byte 33", Tensor("t", (), F32, zeros, n_dims=0))
    tensor("n_dims_2_32", "tensor t at byte 33", Tensor("t", (8,), F32, zeros, n_dims=-1))
    tensor("zero_times_huge", "tensor t at byte 37", Tensor("t", (0, 2**62, 2**62), F32, zeros))
    tensor("type_removed_q4_2", "tensor t at byte 45", Tensor("t", (32,), 4, zeros))
    tensor("type_removed_iq4_nl_4_4", "tensor t at byte 45", Tensor("t", (32,), 36, zeros))
    tensor("type_2_31", "tensor t at byte 45", Tensor("t", (8,), 1 << 31, zeros))
    tensor("row_not_whole_blocks", "tensor t at byte 45", Tensor("t", (48,), 2, zeros))
    tensor("row_not_whole_k_blocks", "tensor t at byte 45", Tensor("t", (128,), 12, zeros))
    tensor("offset_not_aligned", "tensor t at byte 49", Tensor("t", (8,), F32, zeros, offset=4))
    first = Tensor("t", (16,), F32, bytes(64))
    tensor("tensors_overlap", "tensor u at byte 82", first, Tensor("u", (8,), F32, zeros, offset=32))
    tensor("tensors_on_one_place", "tensor u at byte 82", first, Tensor("u", (16,), F32, bytes(64), offset=0))
    tensor("gap", "tensor u at byte 82", first, Tensor("u", (8,), F32, bytes(128), offset=128))
    swapped = Tensor("t", (8,), F32, zeros, offset=32), Tensor("u", (8,), F32, zeros, offset=0)
    tensor("tensors_out_of_order", "tensor t at byte 49", *swapped)
    add("table_cut", Image([], _floats((64,))).encode()[:60], "tensor my_tensor_0 at byte 59")

    # Tensor data
    whole = Image([], _pattern(_floats((5,), (9,), (64,)), 32)).encode()
    add("DATA_NOT_ENOUGH_DATA", whole[:-1], "tensor my_tensor_2 at byte")
    huge = 2**63 - 64
    huge_tensors = Tensor("a", (huge,), I8, zeros, 0), Tensor("b", (huge,), I8, b"", huge)
    tensor("DATA_MEM_SIZE_OVERFLOW", "tensor a at byte 96", *huge_tensors)
    tensor("exabyte_tensor", "tensor t at byte 96", Tensor("t", (2**31, 2**31), F32, zeros))
    add("no_data", whole[: len(whole) - 32 - 64 - 256], "tensor my_tensor_0 at byte")
    add("data_starts_past_end", Image([], _floats((64,))).encode()[:70], "tensor data at byte 67")
    add("padding_not_zero", Image([], _floats((64,)), padding=b"x"), "tensor data at byte 67")
    add("download_cut_in_keys", llama[:2000], "key tokenizer.ggml.tokens at byte")
    add("download_cut_in_strings", llama[:3600], r"key tokenizer.ggml.tokens, string \d+ at byte")
    add("download_cut_in_data", llama[: len(llama) // 2], "tensor blk.0")
    add("download_cut_one_byte", llama[:-1], "tensor output_norm.weight at byte")
    return cases
