"""The suite rejects wrong OpenCL kernels: each fault is one that a change to the sources could bring in.

The mutants of the contract are wrong in what they compute; these are wrong in how a kernel goes about it (tiles, tails,
halves, 16-bit sums, pages), where only cases of the right shape can tell.

Compiling a faulty program takes seconds, so one in six is tried each time; `make faults` tries all of them.
"""

# ruff: noqa: E501 - one fault, one line
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from polykern.backends import open_backend, opencl
from polykern.backends.opencl import OpenCLBackend, launch
from polykern.kernels.conformance import run
from polykern.kernels.errors import BackendUnavailable
from polykern.kernels.op import Op
from polykern.kernels.ops import OPS, case_signature

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Fault:
    """`right` in a source file, everywhere it stands, replaced by `wrong`; the cases `cases`* of `op` show it."""

    name: str
    op: str
    cases: str
    file: str
    right: str
    wrong: str


GEMM, FORMATS, ATTENTION, ROPE = "gemm.cl", "formats.h", "attention.cl", "rope.cl"
FAULTS = [
    Fault("last_block_dropped", "gemm", "Q4_0-exact", GEMM, "block < K / BLOCK;", "block < K / BLOCK - 1;"),
    Fault("odd_column_dropped", "gemm", "F16-exact", GEMM, "if (k < K) {", "if (0) {"),
    Fault("columns_behind_blocks_dropped", "gemm", "F32-exact", GEMM, "for (; k < K; k++)", "for (; 0;)"),
    Fault("high_bits_of_wrong_pair", "gemm", "Q5_0-exact", FORMATS, "FIELDS(high, i, 1)", "FIELDS(high, 15 - i, 1)"),
    Fault("high_bits_of_wrong_group", "gemm", "Q5_K-exact", FORMATS, "(g) + (s), 1)", "(s), 1)"),
    Fault("min_of_wrong_sign", "gemm", "Q4_K-fast", FORMATS, "(-HALF(1, h) *", "(HALF(1, h) *"),
    Fault("offset_of_wrong_sign", "gemm", "Q5_0-fast", GEMM, "-OFFSET * (int)part", "OFFSET * (int)part"),
    Fault("offset_of_both_halves", "gemm", "Q6_K-fast", GEMM, "32 / GROUP == 1 ? sum : sums[i]", "sum"),
    Fault("offset_forgotten", "gemm", "Q8_0-exact", FORMATS, ">> (int16)(16)) - (int16)(OFFSET)", ">> (int16)(16))"),
    Fault("factor_without_high_bits", "gemm", "Q4_K-exact", FORMATS, "| TOP(SIX((g) - 4, h))", "| TOP(SIX((g) - 4, h) & (int16)(63))"),
    Fault("high_bits_of_other_half", "gemm", "Q6_K-exact", FORMATS, "64 + 16 * ((g) / 8)", "64 + 16 * (1 - (g) / 8)"),
    Fault("bytes_not_paired", "gemm", "Q4_1-fast", FORMATS, "F(2 * (j) + 1, FIELDS(v, 8, 15))", "F(2 * (j) + 1, FIELDS(v, 4, 15))"),
    Fault("pairs_of_neighbours", "gemm", "Q4_1-fast", GEMM, ".s021346578a9bcedf", ""),
    Fault("second_products_dropped", "gemm", "Q8_0-fast", GEMM, "add_products(q, pairs[i], sa)", "add_products(q & (int16)(0xffff), pairs[i], sa)"),
    Fault("sum_without_scale", "gemm", "Q4_1-fast", GEMM, "group->sum = scale * part;", "group->sum = part;"),
    Fault("nan_taken_for_0", "gemm", "Q8_0-fast", GEMM, "scale += 0.0f * sum;", ""),
    Fault("tail_stored_whole", "gemm", "Q4_0-exact", GEMM, "first + 16 <= N", "first + 8 <= N"),
    Fault("tail_stored_short", "gemm", "Q4_0-exact", GEMM, "first + r < N", "first + r < N - 1"),
    Fault("bias_of_first_tile", "gemm", "Q4_0-exact", GEMM, "vload16(0, bias + first)", "vload16(0, bias)"),
    Fault("bias_of_first_half", "gemm", "Q4_0-exact", GEMM, "bias + bias_offset, tile * 32 + 16, N", "bias + bias_offset - 16, tile * 32 + 16, N"),
    Fault("residual_of_first_tile", "gemm_add", "Q4_0-exact", GEMM, "vload16(0, y + first)", "vload16(0, y)"),
    Fault("y_taken_for_dense", "gemm", "Q4_0-exact", GEMM, "y += y_offset + t * y_stride;", "y += y_offset + t * N;"),
    Fault("x_taken_for_dense", "gemm", "Q4_0-exact", GEMM, "x + x_offset + t * x_stride, w", "x + x_offset + t * K, w"),
    Fault("only_first_tile_of_chunk", "gemm", "Q4_0-exact", GEMM, "tile < min(tiles, first + chunk)", "tile <= first"),
    Fault("chunk_at_wrong_tile", "gemm", "Q4_0-exact", GEMM, "get_group_id(0) * chunk", "get_group_id(0)"),
    Fault("glu_chunk_at_wrong_tile", "rms_norm_gemm_glu", "Q4_0-exact", GEMM, "get_group_id(0) * chunk", "get_group_id(0)"),
    Fault("last_rows_dropped", "gemm", "Q4_0-exact", GEMM, "t < in.end; t += ROWS", "t + ROWS <= in.end; t += ROWS"),
    Fault("rows_of_first_chunk", "gemm", "Q4_0-exact-33", GEMM, "begin = get_group_id(1) * rows", "begin = 0 * rows"),
    Fault("row_repeated", "gemm", "Q4_0-exact", GEMM, "min(t + r, in->T - 1)", "min(t + r, in->T - 2)"),
    Fault("slices_not_added", "gemm", "F16-exact", GEMM, "if (start) {", "if (0) {"),
    Fault("groups_of_first_slice", "gemm", "Q4_K-fast", GEMM, "GROUPS + start / GROUP", "GROUPS"),
    Fault("weights_of_first_slice", "gemm", "Q4_K-fast", GEMM, "const int block = k / BLOCK", "const int block = (k - start) / BLOCK"),
    Fault("group_of_first_panel", "gemm", "Q4_0-fast", GEMM, "panel_a->factors[g]", "panel_a->factors[0]"),
    Fault("half_of_first_panel", "gemm", "Q4_0-fast", GEMM, "panel_b->pairs[i]", "panel_a->pairs[i]"),
    Fault("gate_and_up_swapped", "rms_norm_gemm_glu", "Q4_1-fast", GEMM, "activation(ga, kind) * ua", "activation(ua, kind) * ga"),
    Fault("gate_and_up_swapped_in_tiles", "rms_norm_gemm_glu", "Q4_1-fast", GEMM, "activation(done_a[r], in->kind) * done_b[r]", "activation(done_b[r], in->kind) * done_a[r]"),
    Fault("up_of_first_half", "rms_norm_gemm_glu", "Q4_1-fast", GEMM, "ups + h, start", "ups, start"),
    Fault("offset_in_first_half_only", "rms_norm_gemm", "Q4_1-fast", GEMM, "weight + k + 16) + weight_offset", "weight + k + 16)"),
    Fault("gelu_kinds_swapped", "rms_norm_gemm_glu", "F16", "activation.h", "GELU_TANH", "GELU_ERF"),
    Fault("tail_not_squared", "rms_norm", "", "lanes.h", "for (; k < K; k++) sum", "for (; 0;) sum"),
    Fault("sum16_drops_lanes", "rms_norm", "", "lanes.h", "F(v2.x, v2.y)", "F(v2.x, v2.x)"),
    Fault("row_of_next_tile", "dequantize", "Q4_0", "rows.cl", "(tile * 32 + r) * y_stride", "(tile * 16 + r) * y_stride"),
    Fault("group_of_first_block", "dequantize", "Q4_K", "rows.cl", "(size_t)(group * GROUP / BLOCK)", "(size_t)(0)"),
    Fault("row_in_tile", "embedding", "Q4_0", "rows.cl", "id % 32", "id % 16"),
    Fault("next_key_seen", "attention", "decode-1", ATTENTION, "end = min(position + 1, begin +", "end = min(position + 2, begin +"),
    Fault("last_block_of_one_key_dropped", "attention", "decode-1", ATTENTION, "start < end; start += 16", "start + 1 < end; start += 16"),
    Fault("sums_not_rescaled", "attention", "decode-long", ATTENTION, "sums[r * CHUNKS + c] *= shrink", "sums[r * CHUNKS + c] *= 1.0f"),
    Fault("total_not_rescaled", "attention", "decode-long", ATTENTION, "total[r] = fma(total[r], shrink, ", "total[r] = fma(total[r], 1.0f, "),
    Fault("tail_not_rescaled", "attention", "head-dim-5", ATTENTION, "tail[r * TAIL + d] *= shrink", "tail[r * TAIL + d] *= 1.0f"),
    Fault("heads_of_first_kv_head", "attention", "decode-15", ATTENTION, "q_stride + g * R * D", "q_stride"),
    Fault("keys_repeated_in_block", "attention", "decode-15", ATTENTION, "LANE < count", "LANE < 16"),
    Fault("window_starts_late", "attention", "window", ATTENTION, "position - window + 1)", "position - window + 2)"),
    Fault("last_part_dropped", "attention", "decode-long", ATTENTION, "i < part_count; i++) {", "i < part_count - 1; i++) {"),
    Fault("parts_not_rescaled", "attention", "decode-long", ATTENTION, "exp(part[i * next] - largest)", "1.0f"),
    Fault("part_too_short", "attention", "decode-flat", ATTENTION, "(n + 16 * count - 1) / (16 * count) * 16", "n / (16 * count) * 16"),
    Fault("parts_of_first_head", "attention", "decode-long", ATTENTION, "part_count * R + r)", "part_count * R)"),
    Fault("tile_not_rescaled", "attention", "prefill", ATTENTION, "sums) * shrink_a", "sums)"),
    Fault("tile_total_not_rescaled", "attention", "prefill", ATTENTION, "total_a *= shrink_a;", ""),
    Fault("tile_spans_sequences", "attention", "prefill", ATTENTION, "seqs[end] == seq", "(seqs[end] < 0) == (seq < 0)"),
    Fault("tile_second_rows_see_first_keys", "attention", "prefill", ATTENTION, "last_b = vload16(1, lasts)", "last_b = vload16(0, lasts)"),
    Fault("tile_mask_off_by_one", "attention", "prefill", ATTENTION, "last >= key", "last + 1 >= key"),
    Fault("tile_window_one_too_wide", "attention", "window", ATTENTION, "last - window < key", "last - window <= key"),
    Fault("tile_unseen_block_is_nan", "attention", "window", ATTENTION, "select(next_a, (float16)(0.0f), next_a == NOTHING_SEEN)", "next_a"),
    Fault("tile_highest_position_of_last", "attention", "prefill-shuffled", ATTENTION, "high = max(high, last[end])", "high = last[end]"),
    Fault("tile_softcap_not_scaled_back", "attention", "prefill-softcap", ATTENTION, "s = softcap * tanh", "s = tanh"),
    Fault("tile_without_tail", "attention", "prefill-head-dim", ATTENTION, "d = 16 * CHUNKS; d < D; d++) {", "d = 0; d < 0; d++) {"),
    Fault("tile_ignores_lost_keys", "attention", "lost", ATTENTION, "? position : -1;", "? position : position;"),
    Fault("tile_rows_of_next_token", "attention", "prefill", ATTENTION, "h = g * R + tile + i - t * R", "h = g * R + (tile + i + 1) % R"),
    Fault("table_row_of_first_sequence", "attention", "decode-ragged", ATTENTION, "+ seq * table_stride", "+ 0 * table_stride"),
    Fault("wrong_direction_of_k", "rope_kv_append", "half", ROPE, "PUT8(b8 * c8 + a8 * s8", "PUT8(b8 * c8 - a8 * s8"),
    Fault("wrong_direction_of_interleaved_k", "rope_kv_append", "interleaved", ROPE, "v.odd * c8 + v.even", "v.odd * c8 - v.even"),
    Fault("pairs_behind_the_vectors_dropped", "rope_kv_append", "half", ROPE, "for (; i < rotated / 2; i++)", "for (; 0;)"),
    Fault("past_the_table_not_stored", "rope_kv_append", "half-past", ROPE, "d = first; d < D", "d = D; d < D"),
    Fault("slot_by_power_of_2", "kv_append", "page-size-5", ROPE, "position % S", "(position & (S - 1))"),
    Fault("truncated_to_half", "kv_append", "decode-1", ROPE, "vstore_half_rte", "vstore_half_rtz"),
    Fault("ties_broken_high", "argmax", "", "sample.cl", "isgreater(v, best)", "isgreaterequal(v, best)"),
    Fault("ties_between_lanes_broken_high", "argmax", "", "sample.cl", "at < id", "at > id"),
    Fault("top_k_one_too_many", "sample", "", "sample.cl", ">= enough", "> enough"),
    Fault("threshold_above_all", "sample", "", "sample.cl", "as_uint(1.0f) + 1", "0x7f800000u"),
    Fault("min_p_above_all", "sample", "", "sample.cl", "fmin(min_p, 1.0f)", "min_p"),
]  # fmt: skip


CHOSEN = FAULTS if os.environ.get("POLYKERN_ALL_FAULTS") else FAULTS[::6]


def read_with(fault: Fault) -> Callable[[str], str]:
    """`launch.read_source`, with the fault."""
    read = launch.read_source
    assert fault.right in read(fault.file), fault.name
    return lambda name: read(name).replace(fault.right, fault.wrong) if name == fault.file else read(name)


def shown_by(fault: Fault) -> Op:
    """The fault's op with those cases only that should show it."""
    op = OPS[fault.op]
    return replace(op, cases=tuple(case for case in op.cases if case.name.startswith(fault.cases)), mutants=())


def programs_of(backend: OpenCLBackend, op: Op) -> set[launch.ProgramSpec]:
    kernel = backend._kernels[op.name]
    return {spec for case in op.cases for spec in kernel.programs(case_signature(op, case))}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenCLBackend]:
    """One device, its programs in a temporary folder: nobody else should find the faulty ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYKERN_CACHE_DIR", str(tmp_path_factory.mktemp("faults")))
        patch.setattr(opencl, "DEPTHS", (64,))  # so that K of the cases is more than one slice
        try:
            opened: Any = open_backend("opencl")
        except BackendUnavailable as error:
            pytest.skip(str(error))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def built(backend: OpenCLBackend) -> Mapping[str, Any]:
    """Every faulty program, all compiled by one process."""
    sources: dict[str, tuple[str, Sequence[str]]] = {}
    for fault in CHOSEN:
        for spec in programs_of(backend, shown_by(fault)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch, "read_source", read_with(fault))
                source, options = backend.source(spec)
                # unoptimised: a third of the compiler's time, and what a fault computes is the same
                sources[f"{fault.name}: {spec.label}"] = source, [*options, "-cl-opt-disable"]
    return backend.opened.build_many(sources)


@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: fault.name)
def test_a_fault_is_rejected(
    fault: Fault, backend: OpenCLBackend, built: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = shown_by(fault)
    faulty = {spec: built[f"{fault.name}: {spec.label}"] for spec in programs_of(backend, op)}
    assert run(backend, ops=[op]).ok
    monkeypatch.setattr(backend, "_programs", faulty)
    failures = run(backend, ops=[op]).failures
    assert failures, f"{len(op.cases)} cases let it pass"
    assert all("raised" not in failure.reason for failure in failures), failures[0].reason
