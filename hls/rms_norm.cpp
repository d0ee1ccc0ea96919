// rms_norm: rows of 16 numbers per cycle; a row waits in a FIFO as long as itself until its norm is known.
#include "hls_math.h"
#include "memory.h"

// Process: each word to the squares and to the FIFO that waits.
static void fork_rows(hls::stream<word_t> &words, int count, hls::stream<word_t> &squares, hls::stream<word_t> &waiting) {
FORK_ROWS:
    for (int i = 0; i < count; i++) {
#pragma HLS pipeline II=1
        const word_t word = words.read();
        squares.write(word);
        waiting.write(word);
    }
}

// Process: 1 / sqrt(mean(x**2) + eps) of each row.
static void norm_rows(hls::stream<word_t> &words, int rows, int length, float eps, hls::stream<float> &norms) {
    const int row_words = up(length, LANES);
NORM_ROWS:
    for (int row = 0; row < rows; row++) {
        float partial[PARTIALS] = {};
#pragma HLS array_partition variable=partial complete
    SQUARES:
        for (int i = 0; i < row_words; i++) {
#pragma HLS pipeline II=1
#pragma HLS dependence variable=partial inter distance=8 true
            const word_t word = words.read();
            float square[LANES];
            for (int lane = 0; lane < LANES; lane++) square[lane] = word.lane[lane] * word.lane[lane];
            partial[i % PARTIALS] += sum_of(square);
        }
        const float sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                          ((partial[4] + partial[5]) + (partial[6] + partial[7]));
        norms.write(1 / hls::sqrt(sum / float(length) + eps));
    }
}

// Process: x * norm * (weight + weight_offset).
static void scale_rows(hls::stream<word_t> &waiting, hls::stream<float> &norms, hls::stream<word_t> &weight_words, int rows,
                       int length, float weight_offset, hls::stream<word_t> &results) {
    const int row_words = up(length, LANES);
    word_t weight[MAX_NORM_FEATURES / LANES];
#pragma HLS aggregate variable=weight
LOAD_WEIGHT:
    for (int i = 0; i < row_words; i++) {
#pragma HLS pipeline II=1
        word_t word = weight_words.read();
        for (int lane = 0; lane < LANES; lane++) word.lane[lane] += weight_offset;
        weight[i] = word;
    }
SCALE_ROWS:
    for (int row = 0; row < rows; row++) {
        const float norm = norms.read();
    SCALE:
        for (int i = 0; i < row_words; i++) {
#pragma HLS pipeline II=1
            word_t word = waiting.read();
            for (int lane = 0; lane < LANES; lane++) word.lane[lane] = word.lane[lane] * norm * weight[i].lane[lane];
            results.write(word);
        }
    }
}

// y [tokens, features] from x [tokens, features] and weight [features]. Offsets and strides in numbers.
extern "C" void rms_norm(const beat_t *x, int64_t x_offset, int64_t x_stride, const beat_t *weight, int64_t weight_at,
                         beat_t *y, int64_t y_offset, int64_t y_stride, float eps, float weight_offset, int tokens,
                         int features) {
#pragma HLS interface m_axi port=x bundle=x offset=slave
#pragma HLS interface m_axi port=weight bundle=weight offset=slave
#pragma HLS interface m_axi port=y bundle=y offset=slave
#pragma HLS dataflow
    const int row_words = up(features, LANES);
    FIFO(beat_t, x_beats, WORD_FIFO);
    FIFO(beat_t, weight_beats, WORD_FIFO);
    FIFO(word_t, words, WORD_FIFO);
    FIFO(word_t, weight_words, WORD_FIFO);
    FIFO(word_t, squares, WORD_FIFO);
    FIFO(word_t, waiting, NORM_FIFO);
    FIFO(float, norms, 2);
    FIFO(word_t, results, WORD_FIFO);
    DATAFLOW
    PROCESS(read_rows(x, x_offset, x_stride, tokens, features, x_beats));
    PROCESS(cut_rows(x_beats, x_offset, x_stride, tokens, features, words));
    PROCESS(read_rows(weight, weight_at, features, 1, features, weight_beats));
    PROCESS(cut_rows(weight_beats, weight_at, features, 1, features, weight_words));
    PROCESS(fork_rows(words, tokens * row_words, squares, waiting));
    PROCESS(norm_rows(squares, tokens, features, eps, norms));
    PROCESS(scale_rows(waiting, norms, weight_words, tokens, features, weight_offset, results));
    PROCESS(write_rows(results, y, y_offset, y_stride, tokens, features));
}
