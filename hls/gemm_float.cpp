// gemm, exact: float32 activations, every weight format as float32, 16 products per cycle, channel and token.
#include "memory.h"
#include "sums.h"
#include "weights.h"

// Process: rows of x to each channel.
template <typename Words>
static void share_x(hls::stream<word_t> &words, int count, Words (&shared)[CHANNELS]) {
SHARE_X:
    for (int i = 0; i < count; i++) {
#pragma HLS pipeline II=1
        const word_t word = words.read();
        for (int c = 0; c < CHANNELS; c++) {
#pragma HLS unroll
            shared[c].write(word);
        }
    }
}

// Process: the products of one channel's rows with all of x, tile by tile of TOKENS rows.
static void multiply_words(hls::stream<word_t> &weights, hls::stream<word_t> &words, int tokens, int row_words, int rows,
                           hls::stream<tokens_t> &partials) {
    word_t x[TOKENS][MAX_WORDS];
#pragma HLS array_partition variable=x complete dim=1
#pragma HLS aggregate variable=x
#pragma HLS bind_storage variable=x type=ram_2p impl=uram
    tokens_t partial[PARTIALS];
#pragma HLS array_partition variable=partial complete

TILES:
    for (int first = 0; first < tokens; first += TOKENS) {
    LOAD_TOKENS:
        for (int t = 0; t < TOKENS; t++) {
        LOAD_X:
            for (int i = 0; i < row_words; i++) {
#pragma HLS pipeline II=1
                word_t word = {};
                if (first + t < tokens) word = words.read();
                x[t][i] = word;
            }
        }
        int index = 0;
    WORDS:
        for (int64_t i = 0; i < int64_t(rows) * row_words; i++) {
#pragma HLS pipeline II=1
#pragma HLS dependence variable=partial inter distance=8 true
            const word_t weight = weights.read();
            tokens_t value;
        TOKEN_PRODUCTS:
            for (int t = 0; t < TOKENS; t++) {
#pragma HLS unroll
                float product[LANES];
                for (int lane = 0; lane < LANES; lane++) product[lane] = weight.lane[lane] * x[t][index].lane[lane];
                value.token[t] = sum_of(product);
            }
            add_in_turn(partial, value, index, row_words, partials);
            index = index + 1 == row_words ? 0 : index + 1;
        }
    }
}

#define MULTIPLY_CHANNEL(C)                                                                                                 \
    PROCESS(read_weights(w##C, tiles, int64_t(channel_rows(C, out_features)) * beats_per_row, beats[C]));                   \
    PROCESS(expand_weights(beats[C], format, tiles, channel_rows(C, out_features), in_features, weights[C]));               \
    PROCESS(multiply_words(weights[C], x_shared[C], tokens, row_words, channel_rows(C, out_features), partials[C]));        \
    PROCESS(add_partials(partials[C], int64_t(tiles) * channel_rows(C, out_features), row_words, sums[C]));

// As gemm_int4, for every format of FORMATS.
extern "C" void gemm_float(EACH_CHANNEL(WEIGHT_PORT) const beat_t *x, int64_t x_offset, int64_t x_stride, const float *bias,
                           int has_bias, float *y, int64_t y_stride, int format, int tokens, int in_features,
                           int out_features) {
    EACH_CHANNEL(WEIGHT_BUNDLE)
#pragma HLS interface m_axi port=x bundle=x offset=slave
#pragma HLS interface m_axi port=bias bundle=bias offset=slave
#pragma HLS interface m_axi port=y bundle=y offset=slave
#pragma HLS dataflow
    const int tiles = up(tokens, TOKENS), row_words = up(in_features, LANES);
    const int beats_per_row = row_beats(in_features, FORMATS[format].header, FORMATS[format].bits);
    FIFO(beat_t, x_beats, WORD_FIFO);
    FIFO(word_t, x_words, WORD_FIFO);
    FIFOS(word_t, x_shared, CHANNELS, WORD_FIFO);
    FIFOS(beat_t, beats, CHANNELS, WEIGHT_FIFO);
    FIFOS(word_t, weights, CHANNELS, WORD_FIFO);
    FIFOS(tokens_t, partials, CHANNELS, WORD_FIFO);
    FIFOS(tokens_t, sums, CHANNELS, WORD_FIFO);
    DATAFLOW
    PROCESS(read_rows(x, x_offset, x_stride, tokens, in_features, x_beats));
    PROCESS(cut_rows(x_beats, x_offset, x_stride, tokens, in_features, x_words));
    PROCESS(share_x(x_words, tokens * row_words, x_shared));
    EACH_CHANNEL(MULTIPLY_CHANNEL)
    PROCESS(write_sums(sums, bias, has_bias, y, y_stride, tokens, out_features));
}
