// Packed weights: from memory to beats, from header beats to scales, from beats to float32.
#pragma once
#include "dataflow.h"
#include "engine.h"

// A port for each channel's weights. 64 beats are the longest burst, 16 of them in flight hide the latency of HBM.
#define WEIGHT_PORT(C) const beat_t *w##C,
#define WEIGHT_BUNDLE(C)                                                                                              \
    HLS_PRAGMA(HLS interface m_axi port=w##C bundle=w##C offset=slave latency=64 max_read_burst_length=64             \
               num_read_outstanding=16)

// Process: `beats` beats of a channel, `times` times over (once for each tile of tokens).
inline void read_weights(const beat_t *w, int times, int64_t beats, hls::stream<beat_t> &out) {
READ_TIMES:
    for (int time = 0; time < times; time++) {
    READ_WEIGHTS:
        for (int64_t i = 0; i < beats; i++) {
#pragma HLS pipeline II=1
            out.write(w[i]);
        }
    }
}

// What a header says about one block of 32 weights.
struct scales_t {
    float d, m;
    int sub[2], submin;
};

// `block`: its number within the group.
inline scales_t scales_of(const beat_t &header, int kind, int block) {
#pragma HLS inline
    scales_t scales = {0, 0, {1, 1}, 1};
    if (kind == HEADER_S) {
        scales.d = float_of_half(field(header, 16 * block, 16));
    } else if (kind == HEADER_SM) {
        scales.d = float_of_half(field(header, 32 * block, 16));
        scales.m = float_of_half(field(header, 32 * block + 16, 16));
    } else {
        constexpr int BLOCKS = SUPERBLOCK / BLOCK;
        const int inner = block % BLOCKS, base = block / BLOCKS * header_bits(kind) * BLOCKS;
        scales.d = float_of_half(field(header, base, 16));
        if (kind == HEADER_K) {
            scales.m = float_of_half(field(header, base + 16, 16));
            scales.sub[0] = scales.sub[1] = int(field(header, base + 32 + 12 * inner, 6));
            scales.submin = int(field(header, base + 38 + 12 * inner, 6));
        } else {
            scales.sub[0] = int8_t(field(header, base + 16 + 16 * inner, 8));
            scales.sub[1] = int8_t(field(header, base + 24 + 16 * inner, 8));
        }
    }
    return scales;
}

inline bool has_min(int header) { return header == HEADER_SM || header == HEADER_K; }

// The integer in lane `index` of a weight beat.
inline int weight_of(const beat_t &beat, int bits, int offset, int index) {
#pragma HLS inline
    return bits == 4 ? int(field(beat, 4 * index, 4)) - offset : int(int8_t(field(beat, 8 * index, 8)));
}

// Process: `rows` rows of packed weights as float32 words, each row ceil(in_features / 16) of them; `times` over.
inline void expand_weights(hls::stream<beat_t> &beats, int format, int times, int rows, int in_features,
                           hls::stream<word_t> &words) {
    const int bits = FORMATS[format].bits, header = FORMATS[format].header, offset = FORMATS[format].offset;
    const int beat_words = weights_per_beat(bits) / LANES, group_words = group_beats(header, bits) * beat_words;
    const int row_words = up(in_features, LANES), steps = row_words + (header ? up(row_words, group_words) : 0);
    const int64_t all = int64_t(times) * rows * steps;
    int at = 0;  // word of the row; beats and groups are powers of 2 of them
    bool is_header = header != HEADER_NONE;
    beat_t scales_beat = 0, beat = 0;
EXPAND:
    for (int64_t i = 0; i < all; i++) {
#pragma HLS pipeline II=1
        // A header takes a step of its own: two reads of one FIFO in one step would make II 2.
        if (is_header) {
            scales_beat = beats.read();
            is_header = false;
            continue;
        }
        const int part = at & (beat_words - 1);
        if (part == 0) beat = beats.read();
        const int in_group = header ? at & (group_words - 1) : 0;
        const scales_t scales = scales_of(scales_beat, header, in_group / (BLOCK / LANES));
        const float scale = scales.d * float(scales.sub[at % (BLOCK / LANES)]), min = scales.m * float(scales.submin);
        word_t word;
    WEIGHTS:
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS unroll
            const int index = part * LANES + lane;
            float number;
            if (format == FORMAT_F32)
                number = float_of(field(beat, 32 * index, 32));
            else if (format == FORMAT_F16)
                number = float_of_half(field(beat, 16 * index, 16));
            else if (format == FORMAT_BF16)
                number = float_of(field(beat, 16 * index, 16) << 16);
            else
                number = scale * float(weight_of(beat, bits, offset, index)) + min;
            word.lane[lane] = number;
        }
        words.write(word);
        at = at + 1 == row_words ? 0 : at + 1;
        is_header = header != HEADER_NONE && (at & (group_words - 1)) == 0;
    }
}
