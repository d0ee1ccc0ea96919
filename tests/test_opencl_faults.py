"""The suite rejects wrong OpenCL kernels: each fault is one that a change to the sources could bring in.

The mutants of the contract are wrong in what they compute; these are wrong in how a kernel goes about it (tiles, tails,
halves, 16-bit sums, pages), where only cases of the right shape can tell.

Compiling a faulty program takes seconds, so one in six is tried each time; `make faults` tries all of them.
"""

# ruff: noqa: E501 - one fault, one line

# ruff: noqa: E501 - a fault is one line
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from polykern.backends import open_backend
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
FLUSHES = [
    Fault(f"sums_stay_16_bits_{name}", "gemm", f"{name}-fast", GEMM, "EACH(g, DOT, WIDEN)", "EACH(g, DOT, ) WIDEN")
    for name in ("Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
]
FAULTS = [
    *FLUSHES,
    Fault("widened_half_as_often_Q4_1", "gemm", "Q4_1-fast", FORMATS, "2, 18, 3, 19)   \\\n  FLUSH", "2, 18, 3, 19)"),
    Fault("widened_half_as_often_Q6_K", "gemm", "Q6_K-fast", FORMATS, "TWO(F, g, 1) FLUSH", "TWO(F, g, 1)"),
    Fault("last_block_dropped", "gemm", "Q4_0-exact", GEMM, "block < K / BLOCK;", "block < K / BLOCK - 1;"),
    Fault("odd_column_dropped", "gemm", "F16-exact", GEMM, "if (k < K) {", "if (0) {"),
    Fault("columns_behind_blocks_dropped", "gemm", "F32-exact", GEMM, "for (; k < K; k++)", "for (; 0;)"),
    Fault("high_bits_of_wrong_word", "gemm", "Q5_0-exact", FORMATS, "ha = W(HIGH + 1)", "ha = W(HIGH)"),
    Fault("high_bits_of_wrong_group", "gemm", "Q5_K-exact", FORMATS, "W(8 + (j)) >> LANES(g)", "W(8 + (j)) >> LANES(0)"),
    Fault("min_of_wrong_sign", "gemm", "Q4_K-fast", FORMATS, "(-HALF(1, h) *", "(HALF(1, h) *"),
    Fault("offset_of_wrong_sign", "gemm", "Q5_0-fast", FORMATS, "(-16.0f * HALF", "(16.0f * HALF"),
    Fault("no_sign_extension", "gemm", "Q8_0-exact", FORMATS, "va << (short16)(8) >> (short16)(8)", "va & (short16)(255)"),
    Fault("factor_without_high_bits", "gemm", "Q4_K-exact", FORMATS, "SIX((g) - 4, h) >> LANES(6)", "SIX((g) - 4, h) >> LANES(15)"),
    Fault("high_bits_of_other_half", "gemm", "Q6_K-exact", FORMATS, "64 + 16 * ((g) / 8)", "64 + 16 * (1 - (g) / 8)"),
    Fault("sum_without_scale", "gemm", "Q4_1-fast", GEMM, "groups[1] = scale * sum;", "groups[1] = sum;"),
    Fault("nan_taken_for_0", "gemm", "Q8_0-fast", GEMM, "largest / LEVELS + 0.0f * sum", "largest / LEVELS"),
    Fault("tail_stored_whole", "gemm", "Q4_0-exact", GEMM, "first + 32 <= N", "first + 16 <= N"),
    Fault("tail_stored_short", "gemm", "Q4_0-exact", GEMM, "first + r < N", "first + r < N - 1"),
    Fault("bias_of_first_tile", "gemm", "Q4_0-exact", GEMM, "vload16(0, bias + first)", "vload16(0, bias)"),
    Fault("bias_of_first_half", "gemm", "Q4_0-exact", GEMM, "bias + first + 16", "bias + first"),
    Fault("residual_of_first_tile", "gemm_add", "Q4_0-exact", GEMM, "vload16(0, y + first)", "vload16(0, y)"),
    Fault("y_taken_for_dense", "gemm", "Q4_0-exact", GEMM, "y += y_offset + t * y_stride;", "y += y_offset + t * N;"),
    Fault("x_taken_for_dense", "gemm", "Q4_0-exact", GEMM, "x + x_offset + t * x_stride, w", "x + x_offset + t * K, w"),
    Fault("only_first_tile_of_chunk", "gemm", "Q4_0-exact", GEMM, "tile < min(tiles, first + chunk)", "tile <= first"),
    Fault("chunk_at_wrong_tile", "gemm", "Q4_0-exact", GEMM, "get_group_id(0) * chunk", "get_group_id(0)"),
    Fault("glu_chunk_at_wrong_tile", "rms_norm_gemm_glu", "Q4_0-exact", GEMM, "get_group_id(0) * chunk", "get_group_id(0)"),
    Fault("last_rows_dropped", "gemm", "Q4_0-exact", GEMM, "t < T; t += ROWS", "t + ROWS <= T; t += ROWS"),
    Fault("row_repeated", "gemm", "Q4_0-exact", GEMM, "min(t + 5, T - 1)", "min(t + 4, T - 1)"),
    Fault("first_slice_only", "gemm", "F16-exact", GEMM, "if (!begin) s +=", "if (0) s +="),
    Fault("last_slice_kept_Q4_0", "gemm", "Q4_0-exact", GEMM, "if (!begin) s +=", "if (0) s +="),
    Fault("slices_of_first_weights", "gemm", "Q4_0-exact", GEMM, "p += (size_t)block", "p += (size_t)(block - start / BLOCK)"),
    Fault("gate_and_up_swapped", "rms_norm_gemm_glu", "Q4_1-fast", GEMM, "activation(ga, kind) * ua", "activation(ua, kind) * ga"),
    Fault("up_of_first_rows", "rms_norm_gemm_glu", "F32-exact", GEMM, "vload16(2 * (size_t)t, up_sums)", "vload16(0, up_sums)"),
    Fault("offset_in_first_half_only", "rms_norm_gemm", "Q4_1-fast", GEMM, "weight + k + 16) + weight_offset", "weight + k + 16)"),
    Fault("gelu_kinds_swapped", "rms_norm_gemm_glu", "F16", "activation.h", "GELU_TANH", "GELU_ERF"),
    Fault("tail_not_squared", "rms_norm", "", "lanes.h", "for (; k < K; k++) sum", "for (; 0;) sum"),
    Fault("sum16_drops_a_lane", "rms_norm", "", "lanes.h", "F(v[7], v[15])", "F(v[7], v[7])"),
    Fault("row_of_next_tile", "dequantize", "Q4_0", "rows.cl", "(tile * 32 + r) * y_stride", "(tile * 16 + r) * y_stride"),
    Fault("group_of_first_block", "dequantize", "Q4_K", "rows.cl", "(size_t)(group * GROUP / BLOCK)", "(size_t)(0)"),
    Fault("row_in_tile", "embedding", "Q4_0", "rows.cl", "id % 32", "id % 16"),
    Fault("next_key_seen", "attention", "decode-1", ATTENTION, "min(16, position + 1 - start)", "min(16, position + 2 - start)"),
    Fault("last_block_of_one_key_dropped", "attention", "decode-1", ATTENTION, "start <= position;", "start < position;"),
    Fault("sums_not_rescaled", "attention", "decode-long", ATTENTION, "sums[c] *= shrink", "sums[c] *= 1.0f"),
    Fault("total_not_rescaled", "attention", "decode-long", ATTENTION, "total = fma(total, shrink, ", "total = fma(total, 1.0f, "),
    Fault("tail_not_rescaled", "attention", "head-dim-5", ATTENTION, "tail[d] *= shrink", "tail[d] *= 1.0f"),
    Fault("kv_head_modulo", "attention", "decode-15", ATTENTION, "g = h / (H / G)", "g = h % G"),
    Fault("window_starts_late", "attention", "window", ATTENTION, "position - window + 1)", "position - window + 2)"),
    Fault("tile_not_rescaled", "attention", "prefill", ATTENTION, "if (shrink != 1.0f)", "if (0)"),
    Fault("tile_total_not_rescaled", "attention", "prefill", ATTENTION, "fma(total[r], shrink, ", "fma(total[r], 1.0f, "),
    Fault("tile_spans_sequences", "attention", "prefill", ATTENTION, "seq_ids[end] == seq", "(seq_ids[end] < 0) == (seq < 0)"),
    Fault("tile_query_repeated", "attention", "prefill", ATTENTION, "q + min(t + 3, end - 1)", "q + min(t + 2, end - 1)"),
    Fault("tile_mask_off_by_one", "attention", "prefill", ATTENTION, "lane <= position", "lane < position + 2"),
    Fault("tile_window_one_too_wide", "attention", "window", ATTENTION, "lane > position - window", "lane >= position - window"),
    Fault("tile_unseen_block_is_nan", "attention", "window", ATTENTION, "next == -INFINITY ? 1.0f :", "0 ? 1.0f :"),
    Fault("tile_highest_position_of_last", "attention", "prefill", ATTENTION, "high = max(high, position)", "high = position"),
    Fault("tile_softcap_not_scaled_back", "attention", "prefill-softcap", ATTENTION, "s = softcap * tanh", "s = tanh"),
    Fault("tile_without_tail", "attention", "prefill-head-dim", ATTENTION, "d = 16 * CHUNKS; d < D; d++) {", "d = 0; d < 0; d++) {"),
    Fault("tile_ignores_lost_keys", "attention", "lost", ATTENTION, "last[end - tile] = -1;", "last[end - tile] = position;"),
    Fault("table_row_of_first_sequence", "attention", "decode-ragged", ATTENTION, "+ seq * table_stride", "+ 0 * table_stride"),
    Fault("wrong_direction_of_k", "rope_kv_append", "half", ROPE, "STORE(b * c + a * s", "STORE(b * c - a * s"),
    Fault("past_the_table_not_stored", "rope_kv_append", "half-past", ROPE, "d = rotated; d < D", "d = R; d < D"),
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
                source, options = spec.source()
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
