// gemm, fast: the engine. Weights in groups, activations rounded to int8 per block of 32.
//
// Built twice, -DWEIGHT_BITS=4 and 8: gemm_int4 for Q4_0, Q4_1 and Q4_K, gemm_int8 for Q8_0, Q5_0, Q5_1, Q5_K and Q6_K.
#include "hls_math.h"
#include "memory.h"
#include "sums.h"
#include "weights.h"

#if WEIGHT_BITS == 4
#define GEMM gemm_int4
#elif WEIGHT_BITS == 8
#define GEMM gemm_int8
#else
#error "WEIGHT_BITS is 4 or 8"
#endif
constexpr int BITS = WEIGHT_BITS, BEAT_BLOCKS = weights_per_beat(BITS) / BLOCK;

// A block of activations: x is about q * step.
struct activations_t {
    int8_t q[BLOCK];
    int16_t sum;
    float step;
};

constexpr float SMALLEST = 1e-36f;  // below it 127 / max|x| is not finite

static void round_block(const word_t (&words)[2], activations_t &block) {
#pragma HLS inline
    // Without their sign, floats are in the order of their bits, infinities and NaNs above all: integers compare in LUTs.
    uint32_t largest_bits = 0;
LARGEST:
    for (int i = 0; i < BLOCK; i++) {
#pragma HLS unroll
        const uint32_t size = bits_of(words[i / LANES].lane[i % LANES]) & 0x7FFFFFFF;
        if (size > largest_bits) largest_bits = size;
    }
    const float largest = float_of(largest_bits);
    const bool is_finite = largest_bits < 0x7F800000, is_used = is_finite && largest >= SMALLEST;
    const float per_step = is_used ? float(ACTIVATION_LEVELS) / largest : 0;
    int sum = 0;
ROUND:
    for (int i = 0; i < BLOCK; i++) {
#pragma HLS unroll
        const float x = is_used ? words[i / LANES].lane[i % LANES] : 0;
        block.q[i] = int8_t(int(hls::rint(x * per_step)));
        sum += block.q[i];
    }
    block.sum = int16_t(sum);
    block.step = !is_finite ? float_of(0x7FC00000) : is_used ? largest / float(ACTIVATION_LEVELS) : 0;
}

// Process: rows of x in blocks, to each channel.
template <typename Blocks>
static void round_x(hls::stream<word_t> &words, int rows, int in_features, Blocks (&blocks)[CHANNELS]) {
    const int row_words = up(in_features, LANES), row_blocks = up(in_features, BLOCK);
    int index = 0;
ROUND_X:
    for (int i = 0; i < rows * row_blocks; i++) {
#pragma HLS pipeline II=2
        word_t pair[2];
        pair[0] = words.read();
        pair[1] = {};
        if (2 * index + 1 < row_words) pair[1] = words.read();
        index = index + 1 == row_blocks ? 0 : index + 1;
        activations_t block;
        round_block(pair, block);
    TO_CHANNELS:
        for (int c = 0; c < CHANNELS; c++) {
#pragma HLS unroll
            blocks[c].write(block);
        }
    }
}

// Process: the products of one channel's rows with all of x, tile by tile of TOKENS rows.
static void multiply(hls::stream<beat_t> &beats, hls::stream<activations_t> &blocks, int format, int tokens, int in_features,
                     int rows, hls::stream<tokens_t> &partials) {
    const int header = FORMATS[format].header, offset = FORMATS[format].offset;
    const int group = group_beats(header, BITS), row_blocks = up(in_features, BLOCK);
    const int row_weight_beats = weight_beats(in_features, BITS);
    const int64_t all = int64_t(rows) * row_beats(in_features, header, BITS);

    activations_t x[TOKENS][MAX_BLOCKS];
#pragma HLS array_partition variable=x complete dim=1
#pragma HLS array_partition variable=x cyclic factor=BEAT_BLOCKS dim=2
#pragma HLS aggregate variable=x
    tokens_t partial[PARTIALS];
#pragma HLS array_partition variable=partial complete

TILES:
    for (int first = 0; first < tokens; first += TOKENS) {
    LOAD_TOKENS:
        for (int t = 0; t < TOKENS; t++) {
        LOAD_X:
            for (int b = 0; b < row_weight_beats * BEAT_BLOCKS; b++) {
#pragma HLS pipeline II=1
                activations_t block = {};
                if (first + t < tokens && b < row_blocks) block = blocks.read();
                x[t][b] = block;
            }
        }

        beat_t scales_beat = 0;
        int in_group = 0, index = 0;  // in_group: 0 for a header; index: of the weight beat in its row
    BEATS:
        for (int64_t i = 0; i < all; i++) {
#pragma HLS pipeline II=1
#pragma HLS dependence variable=partial inter distance=8 true
            const beat_t beat = beats.read();
            if (in_group == 0) {
                scales_beat = beat;
                in_group = 1;
                continue;
            }
            tokens_t value;
            float product[TOKENS][4] = {};
        BLOCKS:
            for (int b = 0; b < BEAT_BLOCKS; b++) {
#pragma HLS unroll
                const scales_t scales = scales_of(scales_beat, header, (in_group - 1) * BEAT_BLOCKS + b);
                int weight[BLOCK];
                for (int k = 0; k < BLOCK; k++) weight[k] = weight_of(beat, BITS, offset, b * BLOCK + k);
            TOKEN_PRODUCTS:
                for (int t = 0; t < TOKENS; t++) {
#pragma HLS unroll
                    const activations_t &block = x[t][index * BEAT_BLOCKS + b];
                    int dot[2] = {0, 0};
                MULTIPLY:
                    for (int k = 0; k < BLOCK; k++) {
#pragma HLS unroll
                        dot[k / HALF] += weight[k] * block.q[k];
                    }
                    const int sum = scales.sub[0] * dot[0] + scales.sub[1] * dot[1];
                    float scaled = float(sum) * scales.d;
                    if (has_min(header)) scaled += float(scales.submin * block.sum) * scales.m;
                    product[t][b] = scaled * block.step;
                }
            }
            for (int t = 0; t < TOKENS; t++) {
#pragma HLS unroll
                value.token[t] = product[t][0] + product[t][1];
                if (BEAT_BLOCKS == 4) value.token[t] += product[t][2] + product[t][3];
            }
            add_in_turn(partial, value, index, row_weight_beats, partials);
            index = index + 1 == row_weight_beats ? 0 : index + 1;
            in_group = index == 0 || in_group == group ? 0 : in_group + 1;
        }
    }
}

#define MULTIPLY_CHANNEL(C)                                                                                            \
    PROCESS(read_weights(w##C, tiles, int64_t(channel_rows(C, out_features)) * beats_per_row, weights[C]));            \
    PROCESS(multiply(weights[C], x_blocks[C], format, tokens, in_features, channel_rows(C, out_features), partials[C])); \
    PROCESS(add_partials(partials[C], int64_t(tiles) * channel_rows(C, out_features), row_weight_beats, sums[C]));

// y [tokens, out_features] = x [tokens, in_features] @ w.T + bias. Offsets and strides in numbers; `format` indexes FORMATS.
extern "C" void GEMM(EACH_CHANNEL(WEIGHT_PORT) const beat_t *x, int64_t x_offset, int64_t x_stride, const float *bias,
                     int has_bias, float *y, int64_t y_stride, int format, int tokens, int in_features, int out_features) {
    EACH_CHANNEL(WEIGHT_BUNDLE)
#pragma HLS interface m_axi port=x bundle=x offset=slave
#pragma HLS interface m_axi port=bias bundle=bias offset=slave
#pragma HLS interface m_axi port=y bundle=y offset=slave
#pragma HLS dataflow
    const int tiles = up(tokens, TOKENS), beats_per_row = row_beats(in_features, FORMATS[format].header, BITS);
    const int row_weight_beats = weight_beats(in_features, BITS);
    FIFO(beat_t, x_beats, WORD_FIFO);
    FIFO(word_t, x_words, WORD_FIFO);
    FIFOS(activations_t, x_blocks, CHANNELS, WORD_FIFO);
    FIFOS(beat_t, weights, CHANNELS, WEIGHT_FIFO);
    FIFOS(tokens_t, partials, CHANNELS, WORD_FIFO);
    FIFOS(tokens_t, sums, CHANNELS, WORD_FIFO);
    DATAFLOW
    PROCESS(read_rows(x, x_offset, x_stride, tokens, in_features, x_beats));
    PROCESS(cut_rows(x_beats, x_offset, x_stride, tokens, in_features, x_words));
    PROCESS(round_x(x_words, tokens, in_features, x_blocks));
    EACH_CHANNEL(MULTIPLY_CHANNEL)
    PROCESS(write_sums(sums, bias, has_bias, y, y_stride, tokens, out_features));
}
