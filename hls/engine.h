// Types, tile constants and weight formats of the engine; README.md says what they mean.
#pragma once
#include <stdint.h>

#include "ap_int.h"

// How much of it is built: -DCHANNELS=... on the command line of v++ or g++.
#ifndef CHANNELS
#define CHANNELS 4  // memory channels, each with a processing element of its own
#endif
#ifndef TOKENS
#define TOKENS 4  // rows of x that share a weight beat
#endif
#ifndef HEAD_LANES
#define HEAD_LANES 4  // query heads of a kv head that share its keys and values
#endif

// Depths of FIFOs. 64 beats are the longest AXI burst of 512 bit (4 KiB, AMBA AXI4 IHI0022, A3.4.1), so that the next
// one can be under way while the last is used up.
#ifndef WEIGHT_FIFO
#define WEIGHT_FIFO 64
#endif
#ifndef WORD_FIFO
#define WORD_FIFO 32
#endif
#ifndef NORM_FIFO
#define NORM_FIFO 1024  // a row waits here for its norm
#endif
#ifndef RUN_FIFO
#define RUN_FIFO 32  // runs of keys that are planned ahead
#endif

constexpr int BEAT_BITS = 512;            // the widest m_axi port (UG1399, max_widen_bitwidth) and an HBM port's burst unit
constexpr int LANES = BEAT_BITS / 32;     // floats in a beat, and in a word between processes
constexpr int BLOCK = 32;                 // activations that share a step; weights that share a scale
constexpr int HALF = BLOCK / 2;           // weights that share a scale in Q6_K
constexpr int SUPERBLOCK = 256;           // weights of a K block
constexpr int PARTIALS = 8;               // latency of a float32 adder at 300 MHz and above is up to 8 cycles (PG060)
constexpr int MAX_IN_FEATURES = 32768;    // of x on chip: 256 words of 128 int8, half the depth of a BRAM36 (UG573)
constexpr int MAX_BLOCKS = MAX_IN_FEATURES / BLOCK;
constexpr int MAX_WORDS = MAX_IN_FEATURES / LANES;
constexpr int MAX_NORM_FEATURES = 16384;  // of a row that rms_norm holds back
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_HEAD_WORDS = MAX_HEAD_DIM / LANES;
constexpr int KEY_BLOCK = 16;             // keys between two changes of the running maximum
constexpr int KEY_PARTIALS = 4;           // sums of values that take turns, see attention.cpp
constexpr int ACTIVATION_LEVELS = 127;

typedef ap_uint<BEAT_BITS> beat_t;
struct word_t {
    float lane[LANES];
};
struct tokens_t {
    float token[TOKENS];
};

// What stands before each group of weight beats: scales, scales and minima, those of K blocks, those of Q6_K.
enum Header { HEADER_NONE = 0, HEADER_S = 1, HEADER_SM = 2, HEADER_K = 3, HEADER_K6 = 4 };

struct Format {
    int bits;          // of a weight in a beat
    int offset;        // subtracted from it
    int header;        // a Header
    int group_length;  // weights that share a scale
    int block_length;  // weights that share a float16 scale; a row is whole blocks
};

// The order of kernels/quant.py; a kernel's argument `format` counts along it.
constexpr Format FORMATS[] = {
    {32, 0, HEADER_NONE, 1, 1},// F32
    {16, 0, HEADER_NONE, 1, 1},// F16
    {16, 0, HEADER_NONE, 1, 1},// BF16
    {4, 8, HEADER_S, 32, 32},  // Q4_0
    {4, 0, HEADER_SM, 32, 32}, // Q4_1
    {8, 0, HEADER_S, 32, 32},  // Q5_0
    {8, 0, HEADER_SM, 32, 32}, // Q5_1
    {8, 0, HEADER_S, 32, 32},  // Q8_0
    {4, 0, HEADER_K, 32, 256}, // Q4_K
    {8, 0, HEADER_K, 32, 256}, // Q5_K
    {8, 0, HEADER_K6, 16, 256},// Q6_K
};
constexpr int FORMAT_COUNT = sizeof(FORMATS) / sizeof(FORMATS[0]);
enum FormatId { FORMAT_F32 = 0, FORMAT_F16 = 1, FORMAT_BF16 = 2 };  // those that the table does not tell apart

// Bits that a header holds per block of 32 weights.
constexpr int header_bits(int header) {
    return header == HEADER_S    ? 16
           : header == HEADER_SM ? 32
           : header == HEADER_K  ? 128 / (SUPERBLOCK / BLOCK)
                                 : 256 / (SUPERBLOCK / BLOCK);
}
constexpr int weights_per_beat(int bits) { return BEAT_BITS / bits; }
// Weight beats behind one header beat.
constexpr int group_beats(int header, int bits) {
    return header == HEADER_NONE ? 0 : BEAT_BITS / header_bits(header) * BLOCK / weights_per_beat(bits);
}
constexpr int up(int count, int unit) { return (count + unit - 1) / unit; }
constexpr int weight_beats(int in_features, int bits) { return up(in_features, weights_per_beat(bits)); }
// Beats of one row, headers included.
constexpr int row_beats(int in_features, int header, int bits) {
    return weight_beats(in_features, bits) +
           (header == HEADER_NONE ? 0 : up(weight_beats(in_features, bits), group_beats(header, bits)));
}
// Rows of W that channel c holds.
constexpr int channel_rows(int channel, int out_features) {
    return channel < out_features ? (out_features - channel - 1) / CHANNELS + 1 : 0;
}

static_assert(CHANNELS >= 1 && CHANNELS <= 32 && (CHANNELS & (CHANNELS - 1)) == 0, "CHANNELS is a power of 2 up to 32");
static_assert(TOKENS >= 1 && HEAD_LANES >= 1, "at least one of each");
static_assert(group_beats(HEADER_S, 4) == 8 && group_beats(HEADER_S, 8) == 16, "32 scales to a beat");
static_assert(group_beats(HEADER_SM, 4) == 4 && group_beats(HEADER_SM, 8) == 8, "16 scales and minima to a beat");
static_assert(group_beats(HEADER_K, 4) == 8 && group_beats(HEADER_K, 8) == 16, "4 superblocks to a beat");
static_assert(group_beats(HEADER_K6, 8) == 8, "2 superblocks to a beat");
static_assert(32 + 12 * (SUPERBLOCK / BLOCK) == 128, "a K header is full");
static_assert(16 + 8 * (SUPERBLOCK / HALF) <= 256, "a K6 header fits");
static_assert(MAX_IN_FEATURES % SUPERBLOCK == 0 && MAX_HEAD_DIM % LANES == 0, "whole blocks and words on chip");
static_assert(2 * 128 * HALF * 32 * ACTIVATION_LEVELS < 1 << 24, "sums of a block are exact in float32 (Q6_K)");
static_assert(HALF * 2 * 31 * 63 * ACTIVATION_LEVELS < 1 << 24, "sums of a block are exact in float32 (Q5_K)");
static_assert(NORM_FIFO >= MAX_NORM_FEATURES / LANES, "a row of rms_norm must fit its FIFO");
static_assert(RUN_FIFO >= KEY_BLOCK + 2, "a block of keys that lie in pages of 1 must be planned before values move on");

// Something for each channel: ports and pragmas have no loops.
#define EACH_1(X) X(0)
#define EACH_2(X) EACH_1(X) X(1)
#define EACH_4(X) EACH_2(X) X(2) X(3)
#define EACH_8(X) EACH_4(X) X(4) X(5) X(6) X(7)
#define EACH_16(X) EACH_8(X) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define EACH_32(X) \
    EACH_16(X)     \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
#define EACH_NAME(COUNT) EACH_##COUNT
#define EACH_OF(COUNT) EACH_NAME(COUNT)
#define EACH_CHANNEL(X) EACH_OF(CHANNELS)(X)

inline float float_of(uint32_t bits) {
    union {
        uint32_t bits;
        float number;
    } both = {bits};
    return both.number;
}

inline uint32_t bits_of(float number) {
    union {
        float number;
        uint32_t bits;
    } both = {number};
    return both.bits;
}

// float16 to float32, subnormals, infinities and NaNs included (IEEE 754).
inline float float_of_half(ap_uint<16> half) {
#pragma HLS inline
    const uint32_t bits = half.to_uint(), sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) {
        const float size = float(int(fraction)) * 5.9604644775390625e-8f;  // 2**-24
        return sign ? -size : size;
    }
    return float_of(sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13);
}

// The number in `width` bits from `low` on.
inline uint32_t field(const beat_t &beat, int low, int width) {
#pragma HLS inline
    return beat.range(low + width - 1, low).to_uint();
}

inline float sum_of(const float (&term)[LANES]) {
#pragma HLS inline
    float level[LANES];
    for (int i = 0; i < LANES; i++) level[i] = term[i];
TREE:
    for (int width = LANES / 2; width; width /= 2) {
#pragma HLS unroll
        for (int i = 0; i < width; i++) level[i] = level[2 * i] + level[2 * i + 1];
    }
    return level[0];
}
