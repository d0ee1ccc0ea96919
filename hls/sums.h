// Sums of a row without a feedback shorter than the adder: partial sums that take turns, and their tree.
#pragma once
#include "dataflow.h"
#include "engine.h"

// Adds value `index` of a row of `count` to its partial sum; in the last PARTIALS steps of the row the sum leaves, so that
// the next row follows without a pause. The same sum comes back after PARTIALS steps:
// `#pragma HLS dependence variable=partial inter distance=8` beside the loop.
inline void add_in_turn(tokens_t (&partial)[PARTIALS], const tokens_t &value, int index, int count,
                        hls::stream<tokens_t> &partials) {
#pragma HLS inline
    const int slot = index % PARTIALS;
    tokens_t sum = value;
TOKEN_SUMS:
    for (int t = 0; t < TOKENS; t++) {
#pragma HLS unroll
        if (index >= PARTIALS) sum.token[t] += partial[slot].token[t];
    }
    partial[slot] = sum;
    if (index + PARTIALS >= count) partials.write(sum);
}

// Process: the sums of `rows` rows of `count` values. Partial sum s of a row of more than 8 values leaves in turn, so
// that its place is (first + i) % 8.
inline void add_partials(hls::stream<tokens_t> &partials, int64_t rows, int count, hls::stream<tokens_t> &sums) {
    const int taken = count < PARTIALS ? count : PARTIALS, first = count < PARTIALS ? 0 : count % PARTIALS;
    int turn = 0;
    tokens_t place[PARTIALS];
#pragma HLS array_partition variable=place complete
ADD_PARTIALS:
    for (int64_t i = 0; i < rows * taken; i++) {
#pragma HLS pipeline II=1
        if (turn == 0) {
            for (int s = 0; s < PARTIALS; s++) place[s] = {};
        }
        place[(first + turn) % PARTIALS] = partials.read();
        turn = turn + 1 == taken ? 0 : turn + 1;
        if (turn) continue;
        tokens_t sum;
        for (int t = 0; t < TOKENS; t++) {
#pragma HLS unroll
            sum.token[t] = ((place[0].token[t] + place[1].token[t]) + (place[2].token[t] + place[3].token[t])) +
                           ((place[4].token[t] + place[5].token[t]) + (place[6].token[t] + place[7].token[t]));
        }
        sums.write(sum);
    }
}

// Process: rows of all channels in their order, plus bias, to y [tokens, out_features].
template <typename Sums>
void write_sums(Sums (&sums)[CHANNELS], const float *bias, bool has_bias, float *y, int64_t y_stride, int tokens,
                int out_features) {
    constexpr int STEPS = TOKENS;  // one number a cycle; a pragma takes a constant, not a macro
WRITE_TILES:
    for (int first = 0; first < tokens; first += TOKENS) {
    WRITE_SUMS:
        for (int row = 0; row < out_features; row++) {
#pragma HLS pipeline II=STEPS
            const tokens_t sum = sums[row % CHANNELS].read();
            const float addend = has_bias ? bias[row] : 0;
            for (int t = 0; t < TOKENS; t++) {
                if (first + t < tokens) y[(first + t) * y_stride + row] = has_bias ? sum.token[t] + addend : sum.token[t];
            }
        }
    }
}
