// Rows of numbers in global memory to and from words of 16 floats, through 512-bit beats wherever the rows begin.
//
// A tensor of the contract is aligned to nothing but its element, a burst wants whole beats: what a row needs is read from
// the beat that it begins in, and a shifter moves it to lane 0. Beats that a row shares with others are written back with the
// others' bytes as they were.
#pragma once
#include "dataflow.h"
#include "engine.h"

// The beats with `count` elements of BITS bits from element `start` on.
template <int BITS>
void read_run(const beat_t *memory, int64_t start, int64_t count, hls::stream<beat_t> &beats) {
    const int64_t first = start * BITS / BEAT_BITS, end = count ? ((start + count) * BITS + BEAT_BITS - 1) / BEAT_BITS : first;
READ_RUN:
    for (int64_t i = first; i < end; i++) {
#pragma HLS pipeline II=1
        beats.write(memory[i]);
    }
}

template <int BITS>
float element(const beat_t &beat, int index) {
#pragma HLS inline
    const uint32_t bits = field(beat, index * BITS, BITS);
    return BITS == 16 ? float_of_half(bits) : float_of(bits);
}

// Words of `rows` rows of `length` elements that lie in `beats` one after the other from element `start` of memory on;
// the last word of each row is filled up with zeros.
template <int BITS>
void cut_run(hls::stream<beat_t> &beats, int64_t start, int rows, int length, hls::stream<word_t> &words) {
    constexpr int ELEMENTS = BEAT_BITS / BITS;
    const int row_words = up(length, LANES);
    int at = int(start % ELEMENTS), index = 0;
    bool is_loaded = false;
    beat_t low = 0, high = 0;
CUT_RUN:
    for (int i = 0; i < rows * row_words; i++) {
#pragma HLS pipeline II=1
        const int left = length - index * LANES, count = left < LANES ? left : LANES;
        if (!is_loaded) low = beats.read();
        is_loaded = at + count > ELEMENTS;
        if (is_loaded) high = beats.read();
        word_t word;
    SHIFT:
        for (int lane = 0; lane < LANES; lane++) {
#pragma HLS unroll
            const int from = at + lane;
            const float number = from < ELEMENTS ? element<BITS>(low, from) : element<BITS>(high, from - ELEMENTS);
            word.lane[lane] = lane < count ? number : 0;
        }
        words.write(word);
        at += count;
        if (at > ELEMENTS) low = high;
        if (at < ELEMENTS) is_loaded = true;
        if (at >= ELEMENTS) at -= ELEMENTS;
        index = index + 1 == row_words ? 0 : index + 1;
    }
}

// Two processes that load float32 rows [rows, length], `stride` apart, `times` times over.
inline void read_rows(const beat_t *memory, int64_t offset, int64_t stride, int rows, int length, hls::stream<beat_t> &beats) {
READ_ROWS:
    for (int row = 0; row < rows; row++) read_run<32>(memory, offset + row * stride, length, beats);
}

inline void cut_rows(hls::stream<beat_t> &beats, int64_t offset, int64_t stride, int rows, int length,
                     hls::stream<word_t> &words) {
CUT_ROWS:
    for (int row = 0; row < rows; row++) cut_run<32>(beats, offset + row * stride, 1, length, words);
}

// The next 16 lanes of memory: words moved up by `shift` lanes.
inline word_t next_lanes(hls::stream<word_t> &words, word_t &low, word_t &high, bool has_more, int shift) {
#pragma HLS inline
    low = high;
    if (has_more) high = words.read();
    word_t lanes;
    for (int lane = 0; lane < LANES; lane++) lanes.lane[lane] = lane < shift ? low.lane[LANES - shift + lane] : high.lane[lane - shift];
    return lanes;
}

inline beat_t placed(beat_t beat, const word_t &lanes, int from, int to) {
#pragma HLS inline
    for (int lane = 0; lane < LANES; lane++) {
#pragma HLS unroll
        if (lane >= from && lane < to) beat.range(32 * lane + 31, 32 * lane) = bits_of(lanes.lane[lane]);
    }
    return beat;
}

// Words of a float32 row to `length` elements from element `start` on. Only whole beats are written in the loop: a read of
// the same port there would make each write wait for the one before.
inline void write_row(hls::stream<word_t> &words, beat_t *memory, int64_t start, int length) {
    const int64_t first = start / LANES;
    const int shift = int(start % LANES), end = shift + length, row_words = up(length, LANES);
    word_t low = {}, high = {};
    int i = 0;
    if (shift || end < LANES) {
        const word_t lanes = next_lanes(words, low, high, true, shift);
        memory[first] = placed(memory[first], lanes, shift, end < LANES ? end : LANES);
        i = 1;
    }
WRITE_ROW:
    for (; i < end / LANES; i++) {
#pragma HLS pipeline II=1
        memory[first + i] = placed(0, next_lanes(words, low, high, i < row_words, shift), 0, LANES);
    }
    if (i < up(end, LANES)) {
        const word_t lanes = next_lanes(words, low, high, i < row_words, shift);
        memory[first + i] = placed(memory[first + i], lanes, 0, end - i * LANES);
    }
}

// The process that stores float32 rows [rows, length], `stride` apart.
inline void write_rows(hls::stream<word_t> &words, beat_t *memory, int64_t offset, int64_t stride, int rows, int length) {
WRITE_ROWS:
    for (int row = 0; row < rows; row++) write_row(words, memory, offset + row * stride, length);
}
