// gemm of one format: reader -> weights, activations -> engine -> results -> writer. FAST: int8 activations; else float32.
// Row r of the weight is row r / CHANNELS of memory channel r % CHANNELS; a launch does `rows` of them from `first` on.

channel uint16 NAME(gemm_weights)[CHANNELS] __attribute__((depth(WEIGHT_FIFO)));
channel float16 NAME(gemm_x) __attribute__((depth(X_FIFO)));
channel float NAME(gemm_results) __attribute__((depth(RESULT_FIFO)));

SINGLE __kernel void NAME(gemm_read)(__global const uint16 *restrict w, __global const float *restrict x, long x_offset,
                                     long x_stride, int tokens, int in_features, int channel_rows, int row_beats,
                                     int first, int rows) {
  for (int start = 0; start < tokens; start += TOKENS) {
    const int n = min(TOKENS, tokens - start);
    for (int t = 0; t < n; t++)
      for (int i = 0; i < (in_features + LANES - 1) / LANES; i++)
        write_channel_intel(NAME(gemm_x), row_word(x + x_offset + (start + t) * x_stride, i, in_features).all);
    for (int i = 0; i < rows * row_beats; i++) {  // one burst per memory channel: headers lie where they are needed
      UNROLL for (int c = 0; c < CHANNELS; c++)
          write_channel_intel(NAME(gemm_weights)[c], w[((size_t)c * channel_rows + first) * row_beats + i]);
    }
  }
}

#if FAST
// A row of x as integers: rounded once per block of 32.
typedef struct {
  char q[MAX_IN_FEATURES];
  float step[MAX_IN_FEATURES / 32];
  int sum[MAX_IN_FEATURES / 32];
} NAME(row);

inline void NAME(take_row)(__local NAME(row) * row, int in_features) {
  for (int i = 0; i < (in_features + 31) / 32; i++) {
    word two[2];
    two[0].all = read_channel_intel(NAME(gemm_x));
    two[1].all = 2 * i + 1 < (in_features + LANES - 1) / LANES ? read_channel_intel(NAME(gemm_x)) : (float16)(0.0f);
    float top = 0.0f;
    bool finite = true;
    UNROLL for (int l = 0; l < 32; l++) {
      const float size = fabs(two[l / 16].lanes[l % 16]);
      finite = finite && size <= FLT_MAX;  // false for NaN too
      top = fmax(top, size);
    }
    const float scale = finite && top >= 1e-36f ? 127.0f / top : 0.0f;
    int sum = 0;
    UNROLL for (int l = 0; l < 32; l++) {
      const int q = scale == 0.0f ? 0 : clamp(convert_int_rte(two[l / 16].lanes[l % 16] * scale), -127, 127);
      row->q[32 * i + l] = q;
      sum += q;
    }
    row->step[i] = finite ? (top >= 1e-36f ? top / 127.0f : 0.0f) : NAN;
    row->sum[i] = sum;
  }
  for (int i = (in_features + 31) / 32; i % BLOCKS; i++) {  // to the end of its last beat
    for (int l = 0; l < 32; l++) row->q[32 * i + l] = 0;
    row->step[i] = 0.0f;
    row->sum[i] = 0;
  }
}

// What weight beat i adds to a row's result.
inline float NAME(beat_value)(const char *q, const NAME(factors) * f, const __local NAME(row) * row, int i) {
  float p[BLOCKS];
  UNROLL for (int j = 0; j < BLOCKS; j++) {
    const __local char *a = row->q + WEIGHTS * i + 32 * j;
    int dot[2] = {0, 0};
    UNROLL for (int l = 0; l < 16; l++) dot[0] += q[32 * j + l] * a[l];
    UNROLL for (int l = 16; l < 32; l++) dot[1] += q[32 * j + l] * a[l];
    float block = (float)(f[j].sub[0] * dot[0] + f[j].sub[1] * dot[1]) * f[j].d;
#if HEADER == SCALES_MINIMA || HEADER == SUPER
    block = block + (float)(f[j].submin * row->sum[BLOCKS * i + j]) * f[j].m;
#endif
    p[j] = block * row->step[BLOCKS * i + j];
  }
#if BLOCKS == 4
  return (p[0] + p[1]) + (p[2] + p[3]);
#else
  return p[0] + p[1];
#endif
}
#else
typedef struct {
  float x[MAX_IN_FEATURES];
} NAME(row);

inline void NAME(take_row)(__local NAME(row) * row, int in_features) {
  const int words = (in_features + LANES - 1) / LANES;
  for (int i = 0; i < words || i % WORDS; i++) {
    word v;
    v.all = i < words ? read_channel_intel(NAME(gemm_x)) : (float16)(0.0f);
    UNROLL for (int l = 0; l < LANES; l++) row->x[LANES * i + l] = v.lanes[l];
  }
}
#endif

SINGLE __kernel void NAME(gemm)(int tokens, int in_features, int rows) {
  __local NAME(row) x[TOKENS];
  const int beats = (in_features + WEIGHTS - 1) / WEIGHTS;
  for (int start = 0; start < tokens; start += TOKENS) {
    const int n = min(TOKENS, tokens - start);
    for (int t = 0; t < n; t++) NAME(take_row)(&x[t], in_features);
    for (int r = 0; r < rows; r++) {
      float sums[CHANNELS][TOKENS][PARTIALS];
      UNROLL for (int c = 0; c < CHANNELS; c++)
        UNROLL for (int t = 0; t < TOKENS; t++)
          UNROLL for (int p = 0; p < PARTIALS; p++) sums[c][t][p] = 0.0f;
      beat header[CHANNELS];
      for (int i = 0; i < beats; i++) {
        UNROLL for (int c = 0; c < CHANNELS; c++) {
          if (STARTS_GROUP(i)) header[c].all = read_channel_intel(NAME(gemm_weights)[c]);
          beat b;
          b.all = read_channel_intel(NAME(gemm_weights)[c]);
#if FAST
          char q[WEIGHTS];
          NAME(integers)(&b, q);
          NAME(factors) f[BLOCKS];
          UNROLL for (int j = 0; j < BLOCKS; j++) f[j] = NAME(block_factors)(&header[c], i % GROUP * BLOCKS + j);
          UNROLL for (int t = 0; t < TOKENS; t++) {
            if (t < n) {
              const float v = NAME(beat_value)(q, f, &x[t], i);
              sums[c][t][i % PARTIALS] = i < PARTIALS ? v : sums[c][t][i % PARTIALS] + v;
            }
          }
#else
          float weights[WEIGHTS];
          NAME(floats)(&header[c], &b, i, weights);
          UNROLL for (int t = 0; t < TOKENS; t++) {
            if (t < n) {
              for (int j = 0; j < WORDS; j++) {  // one word of 16 products per cycle
                float product[LANES];
                UNROLL for (int l = 0; l < LANES; l++)
                    product[l] = weights[LANES * j + l] * x[t].x[WEIGHTS * i + LANES * j + l];
                const int at = WORDS * i + j;
                const float v = tree(product);
                sums[c][t][at % PARTIALS] = at < PARTIALS ? v : sums[c][t][at % PARTIALS] + v;
              }
            }
          }
#endif
        }
      }
      for (int c = 0; c < CHANNELS; c++)
        for (int t = 0; t < n; t++) write_channel_intel(NAME(gemm_results), sum_of_partials(sums[c][t]));
    }
  }
}

SINGLE __kernel void NAME(gemm_write)(__global const float *restrict bias, long bias_offset, __global float *restrict y,
                                      long y_offset, long y_stride, int tokens, int out_features, int first, int rows,
                                      int has_bias) {
  for (int start = 0; start < tokens; start += TOKENS) {
    const int n = min(TOKENS, tokens - start);
    for (int r = first * CHANNELS; r < (first + rows) * CHANNELS; r++) {
      for (int t = 0; t < n; t++) {
        const float v = read_channel_intel(NAME(gemm_results));
        if (r < out_features)  // the last rows of some channels are padding
          y[y_offset + (start + t) * y_stride + r] = has_bias ? v + bias[bias_offset + r] : v;
      }
    }
  }
}
