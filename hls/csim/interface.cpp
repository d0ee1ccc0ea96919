// What a host calls: channels as an array, errors as text. Names are those of the kernels with csim_ before them.
#include "engine.h"
#include "processes.h"

#define PORT(C) const beat_t *,
#define WEIGHTS(C) w[C],

extern "C" {

void gemm_int4(EACH_CHANNEL(PORT) const beat_t *, int64_t, int64_t, const float *, int, float *, int64_t, int, int, int, int);
void gemm_int8(EACH_CHANNEL(PORT) const beat_t *, int64_t, int64_t, const float *, int, float *, int64_t, int, int, int, int);
void gemm_float(EACH_CHANNEL(PORT) const beat_t *, int64_t, int64_t, const float *, int, float *, int64_t, int, int, int, int);
void dequantize(EACH_CHANNEL(PORT) beat_t *, int64_t, int64_t, int, int, int);

#define CSIM_GEMM(NAME)                                                                                                 \
    const char *csim_##NAME(const beat_t *const *w, const beat_t *x, int64_t x_offset, int64_t x_stride, const float *bias, \
                            int has_bias, float *y, int64_t y_stride, int format, int tokens, int in_features,           \
                            int out_features) {                                                                          \
        NAME(EACH_CHANNEL(WEIGHTS) x, x_offset, x_stride, bias, has_bias, y, y_stride, format, tokens, in_features,      \
             out_features);                                                                                              \
        return csim::take_error();                                                                                       \
    }
CSIM_GEMM(gemm_int4)
CSIM_GEMM(gemm_int8)
CSIM_GEMM(gemm_float)

const char *csim_dequantize(const beat_t *const *w, beat_t *y, int64_t y_offset, int64_t y_stride, int format,
                            int in_features, int out_features) {
    dequantize(EACH_CHANNEL(WEIGHTS) y, y_offset, y_stride, format, in_features, out_features);
    return csim::take_error();
}

void attention_f16(const beat_t *, int64_t, int64_t, const beat_t *, int64_t, const beat_t *, int64_t, const int32_t *,
                   const int32_t *, const int32_t *, beat_t *, int64_t, int64_t, float, float, int, int, int, int, int, int,
                   int, int, int);
void attention_f32(const beat_t *, int64_t, int64_t, const beat_t *, int64_t, const beat_t *, int64_t, const int32_t *,
                   const int32_t *, const int32_t *, beat_t *, int64_t, int64_t, float, float, int, int, int, int, int, int,
                   int, int, int);
void rms_norm(const beat_t *, int64_t, int64_t, const beat_t *, int64_t, beat_t *, int64_t, int64_t, float, float, int, int);
void rope(const beat_t *, beat_t *, int64_t, int64_t, const float *, int64_t, const int32_t *, int, int, int, int, int, int);
void glu(const beat_t *, int64_t, int64_t, const beat_t *, int64_t, int64_t, beat_t *, int64_t, int64_t, int, int, int);

#define CSIM_ATTENTION(NAME)                                                                                             \
    const char *csim_##NAME(const beat_t *q, int64_t q_offset, int64_t q_stride, const beat_t *k_pages, int64_t k_offset, \
                            const beat_t *v_pages, int64_t v_offset, const int32_t *block_table, const int32_t *seq_ids,  \
                            const int32_t *positions, beat_t *y, int64_t y_offset, int64_t y_stride, float scale,        \
                            float softcap, int window, int tokens, int heads, int kv_heads, int head_dim, int page_size,  \
                            int pages, int sequences, int max_pages) {                                                   \
        NAME(q, q_offset, q_stride, k_pages, k_offset, v_pages, v_offset, block_table, seq_ids, positions, y, y_offset,   \
             y_stride, scale, softcap, window, tokens, heads, kv_heads, head_dim, page_size, pages, sequences, max_pages); \
        return csim::take_error();                                                                                       \
    }
CSIM_ATTENTION(attention_f16)
CSIM_ATTENTION(attention_f32)

const char *csim_rms_norm(const beat_t *x, int64_t x_offset, int64_t x_stride, const beat_t *weight, int64_t weight_at,
                          beat_t *y, int64_t y_offset, int64_t y_stride, float eps, float weight_offset, int tokens,
                          int features) {
    rms_norm(x, x_offset, x_stride, weight, weight_at, y, y_offset, y_stride, eps, weight_offset, tokens, features);
    return csim::take_error();
}

const char *csim_rope(const beat_t *x_in, beat_t *x_out, int64_t x_offset, int64_t x_stride, const float *cos_sin,
                      int64_t table_stride, const int32_t *positions, int is_half, int tokens, int heads, int head_dim,
                      int rot_dim, int table_length) {
    rope(x_in, x_out, x_offset, x_stride, cos_sin, table_stride, positions, is_half, tokens, heads, head_dim, rot_dim,
         table_length);
    return csim::take_error();
}

const char *csim_glu(const beat_t *gate, int64_t gate_offset, int64_t gate_stride, const beat_t *up, int64_t up_offset,
                     int64_t up_stride, beat_t *y, int64_t y_offset, int64_t y_stride, int kind, int tokens, int features) {
    glu(gate, gate_offset, gate_stride, up, up_offset, up_stride, y, y_offset, y_stride, kind, tokens, features);
    return csim::take_error();
}

// The constants that the host packs by, and that a test compares with the contract.
int csim_channels() { return CHANNELS; }
int csim_tokens() { return TOKENS; }
int csim_head_lanes() { return HEAD_LANES; }
int csim_max_in_features() { return MAX_IN_FEATURES; }
int csim_max_norm_features() { return MAX_NORM_FEATURES; }
int csim_max_head_dim() { return MAX_HEAD_DIM; }
int csim_format_count() { return FORMAT_COUNT; }
int csim_row_beats(int format, int in_features) {
    return row_beats(in_features, FORMATS[format].header, FORMATS[format].bits);
}
const Format *csim_formats() { return FORMATS; }

void csim_set_depth(const char *fifo, int depth) { csim::set_depth(fifo, depth); }
}

static_assert(sizeof(beat_t) == BEAT_BITS / 8, "a beat in memory is what the port transfers");
