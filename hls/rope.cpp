// rope: heads rotated in place, a pair per cycle.
#include "memory.h"

// Process: the row of the table for each token: rot_dim angles, cosines before sines; none where there is none.
static void read_angles(const float *cos_sin, const int32_t *positions, int tokens, int table_length, int64_t table_stride,
                        int rot_dim, hls::stream<int> &known, hls::stream<float> &angles) {
READ_ANGLES:
    for (int token = 0; token < tokens; token++) {
        const int position = positions[token];
        const bool is_known = position >= 0 && position < table_length;
        known.write(is_known);
    ANGLES:
        for (int i = 0; i < (is_known ? rot_dim : 0); i++) {
#pragma HLS pipeline II=1
            angles.write(cos_sin[position * table_stride + i]);
        }
    }
}

// Process: heads come in by words, turn pair by pair on chip, and leave by words.
static void rotate_heads(hls::stream<word_t> &words, hls::stream<int> &known, hls::stream<float> &angles, int tokens, int heads,
                         int head_dim, int rot_dim, bool is_half, hls::stream<word_t> &results) {
    const int row_words = up(head_dim, LANES), half = rot_dim / 2;
    float angle[MAX_HEAD_DIM], head[MAX_HEAD_DIM];
#pragma HLS array_partition variable=head cyclic factor=LANES
ROTATE_TOKENS:
    for (int token = 0; token < tokens; token++) {
        const int pairs = known.read() ? half : 0;
    LOAD_ANGLES:
        for (int i = 0; i < 2 * pairs; i++) {
#pragma HLS pipeline II=1
            angle[i] = angles.read();
        }
    ROTATE_HEADS:
        for (int h = 0; h < heads; h++) {
        LOAD_HEAD:
            for (int w = 0; w < row_words; w++) {
#pragma HLS pipeline II=1
                const word_t word = words.read();
                for (int lane = 0; lane < LANES; lane++) head[w * LANES + lane] = word.lane[lane];
            }
        PAIRS:
            for (int i = 0; i < pairs; i++) {
#pragma HLS pipeline II=1
#pragma HLS dependence variable=head inter false
                const int first = is_half ? i : 2 * i, second = is_half ? i + pairs : 2 * i + 1;
                const float a = head[first], b = head[second], cos = angle[i], sin = angle[pairs + i];
                head[first] = a * cos - b * sin;
                head[second] = a * sin + b * cos;
            }
        STORE_HEAD:
            for (int w = 0; w < row_words; w++) {
#pragma HLS pipeline II=1
                word_t word;
                for (int lane = 0; lane < LANES; lane++) word.lane[lane] = head[w * LANES + lane];
                results.write(word);
            }
        }
    }
}

// Processes: the heads of each token, which lie one after the other; tokens are `stride` apart.
static void cut_heads(hls::stream<beat_t> &beats, int64_t offset, int64_t stride, int tokens, int heads, int head_dim,
                      hls::stream<word_t> &words) {
CUT_HEADS:
    for (int token = 0; token < tokens; token++) cut_run<32>(beats, offset + token * stride, heads, head_dim, words);
}

static void write_heads(hls::stream<word_t> &results, beat_t *x, int64_t offset, int64_t stride, int tokens, int heads,
                        int head_dim) {
WRITE_HEADS:
    for (int token = 0; token < tokens; token++) {
        for (int h = 0; h < heads; h++) write_row(results, x, offset + token * stride + int64_t(h) * head_dim, head_dim);
    }
}

// x [tokens, heads, head_dim] in place, cos_sin [table_length, rot_dim]. x_in and x_out are one buffer: a port that is read
// ahead and written behind. Offsets and strides in numbers.
extern "C" void rope(const beat_t *x_in, beat_t *x_out, int64_t x_offset, int64_t x_stride, const float *cos_sin,
                     int64_t table_stride, const int32_t *positions, int is_half, int tokens, int heads, int head_dim,
                     int rot_dim, int table_length) {
#pragma HLS interface m_axi port=x_in bundle=x_in offset=slave
#pragma HLS interface m_axi port=x_out bundle=x_out offset=slave
#pragma HLS interface m_axi port=cos_sin bundle=angles offset=slave
#pragma HLS interface m_axi port=positions bundle=positions offset=slave
#pragma HLS dataflow
    FIFO(beat_t, beats, WORD_FIFO);
    FIFO(word_t, words, WORD_FIFO);
    FIFO(int, known, 2);
    FIFO(float, angles, WORD_FIFO);
    FIFO(word_t, results, WORD_FIFO);
    DATAFLOW
    PROCESS(read_rows(x_in, x_offset, x_stride, tokens, heads * head_dim, beats));
    PROCESS(cut_heads(beats, x_offset, x_stride, tokens, heads, head_dim, words));
    PROCESS(read_angles(cos_sin, positions, tokens, table_length, table_stride, rot_dim, known, angles));
    PROCESS(rotate_heads(words, known, angles, tokens, heads, head_dim, rot_dim, is_half, results));
    PROCESS(write_heads(results, x_out, x_offset, x_stride, tokens, heads, head_dim));
}
