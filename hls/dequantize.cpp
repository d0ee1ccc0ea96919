// dequantize: packed weights as float32 rows, a word of 16 per cycle.
#include "memory.h"
#include "weights.h"

// Process: the rows of all channels in their order.
template <typename Words>
static void collect_rows(Words (&rows)[CHANNELS], int out_features, int row_words, hls::stream<word_t> &words) {
COLLECT_ROWS:
    for (int row = 0; row < out_features; row++) {
    COLLECT_WORDS:
        for (int i = 0; i < row_words; i++) {
#pragma HLS pipeline II=1
            words.write(rows[row % CHANNELS].read());
        }
    }
}

#define EXPAND_CHANNEL(C)                                                                                             \
    PROCESS(read_weights(w##C, 1, int64_t(channel_rows(C, out_features)) * beats_per_row, beats[C]));                 \
    PROCESS(expand_weights(beats[C], format, 1, channel_rows(C, out_features), in_features, rows[C]));

// y [out_features, in_features], rows y_stride apart, y_offset numbers behind the port's address.
extern "C" void dequantize(EACH_CHANNEL(WEIGHT_PORT) beat_t *y, int64_t y_offset, int64_t y_stride, int format,
                           int in_features, int out_features) {
    EACH_CHANNEL(WEIGHT_BUNDLE)
#pragma HLS interface m_axi port=y bundle=y offset=slave
#pragma HLS dataflow
    const int row_words = up(in_features, LANES);
    const int beats_per_row = row_beats(in_features, FORMATS[format].header, FORMATS[format].bits);
    FIFOS(beat_t, beats, CHANNELS, WEIGHT_FIFO);
    FIFOS(word_t, rows, CHANNELS, WORD_FIFO);
    FIFO(word_t, words, WORD_FIFO);
    DATAFLOW
    EACH_CHANNEL(EXPAND_CHANNEL)
    PROCESS(collect_rows(rows, out_features, row_words, words));
    PROCESS(write_rows(words, y, y_offset, y_stride, out_features, in_features));
}
