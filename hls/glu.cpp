// glu: activation(gate) * up, 16 numbers per cycle.
#include "hls_math.h"
#include "memory.h"

enum Kind { SILU = 0, GELU_TANH = 1, GELU_ERF = 2 };  // the order of KINDS in kernels/glu.py

static float activate(float g, int kind) {
#pragma HLS inline
    if (kind == SILU) return g / (1 + hls::exp(-g));
    constexpr float SCALE = 0.7978845608028654f, CUBIC = 0.044715f, HALF_ROOT = 0.7071067811865476f;
    const float bent = kind == GELU_TANH ? hls::tanh(SCALE * (g + CUBIC * g * g * g)) : hls::erf(g * HALF_ROOT);
    return 0.5f * g * (1 + bent);
}

// Process.
static void gate_rows(hls::stream<word_t> &gates, hls::stream<word_t> &ups, int count, int kind, hls::stream<word_t> &results) {
GATE_ROWS:
    for (int i = 0; i < count; i++) {
#pragma HLS pipeline II=1
        word_t word = ups.read();
        const word_t gate = gates.read();
        for (int lane = 0; lane < LANES; lane++) word.lane[lane] *= activate(gate.lane[lane], kind);
        results.write(word);
    }
}

// y [tokens, features] from gate and up [tokens, features]. Offsets and strides in numbers.
extern "C" void glu(const beat_t *gate, int64_t gate_offset, int64_t gate_stride, const beat_t *up_, int64_t up_offset,
                    int64_t up_stride, beat_t *y, int64_t y_offset, int64_t y_stride, int kind, int tokens, int features) {
#pragma HLS interface m_axi port=gate bundle=gate offset=slave
#pragma HLS interface m_axi port=up_ bundle=up offset=slave
#pragma HLS interface m_axi port=y bundle=y offset=slave
#pragma HLS dataflow
    FIFO(beat_t, gate_beats, WORD_FIFO);
    FIFO(beat_t, up_beats, WORD_FIFO);
    FIFO(word_t, gates, WORD_FIFO);
    FIFO(word_t, ups, WORD_FIFO);
    FIFO(word_t, results, WORD_FIFO);
    DATAFLOW
    PROCESS(read_rows(gate, gate_offset, gate_stride, tokens, features, gate_beats));
    PROCESS(cut_rows(gate_beats, gate_offset, gate_stride, tokens, features, gates));
    PROCESS(read_rows(up_, up_offset, up_stride, tokens, features, up_beats));
    PROCESS(cut_rows(up_beats, up_offset, up_stride, tokens, features, ups));
    PROCESS(gate_rows(gates, ups, tokens * up(features, LANES), kind, results));
    PROCESS(write_rows(results, y, y_offset, y_stride, tokens, features));
}
