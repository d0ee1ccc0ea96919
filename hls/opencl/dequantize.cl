// dequantize and embedding of one format: rows of a weight as float32.

channel uint16 NAME(dequantize_weights) __attribute__((depth(WEIGHT_FIFO)));
channel float16 NAME(dequantize_results) __attribute__((depth(RESULT_FIFO)));

// Rows first .. first + rows - 1, in their order, which alternates between the memory channels.
SINGLE __kernel void NAME(dequantize_read)(__global const uint16 *restrict w, int channel_rows, int row_beats, int first,
                                           int rows) {
  for (int r = first; r < first + rows; r++)
    for (int i = 0; i < row_beats; i++)
      write_channel_intel(NAME(dequantize_weights),
                          w[((size_t)(r % CHANNELS) * channel_rows + r / CHANNELS) * row_beats + i]);
}

SINGLE __kernel void NAME(dequantize)(int rows, int in_features) {
  for (int r = 0; r < rows; r++) {
    beat header;
    for (int i = 0; i < (in_features + WEIGHTS - 1) / WEIGHTS; i++) {
      if (STARTS_GROUP(i)) header.all = read_channel_intel(NAME(dequantize_weights));
      beat b;
      b.all = read_channel_intel(NAME(dequantize_weights));
      float weights[WEIGHTS];
      NAME(floats)(&header, &b, i, weights);
      for (int j = 0; j < WORDS; j++) {
        word v;
        UNROLL for (int l = 0; l < LANES; l++) v.lanes[l] = weights[LANES * j + l];
        if (WORDS * i + j < (in_features + LANES - 1) / LANES) write_channel_intel(NAME(dequantize_results), v.all);
      }
    }
  }
}

SINGLE __kernel void NAME(dequantize_write)(__global float *restrict y, long y_offset, long y_stride, int in_features,
                                            int first, int rows) {
  for (int r = first; r < first + rows; r++) {
    for (int i = 0; i < (in_features + LANES - 1) / LANES; i++) {
      word v;
      v.all = read_channel_intel(NAME(dequantize_results));
      UNROLL for (int l = 0; l < LANES; l++)
        if (LANES * i + l < in_features) y[y_offset + r * y_stride + LANES * i + l] = v.lanes[l];
    }
  }
}

// A few rows by number: not worth a channel.
SINGLE __kernel void NAME(embedding)(__global const int *restrict ids, long ids_offset, __global const uint16 *restrict w,
                                     __global float *restrict y, long y_offset, long y_stride, int tokens, int vocab,
                                     int features, int channel_rows, int row_beats, float scale) {
  for (int t = 0; t < tokens; t++) {
    const int id = ids[ids_offset + t];
    const bool known = id >= 0 && id < vocab;
    const int row = known ? id : 0;
    size_t at = ((size_t)(row % CHANNELS) * channel_rows + row / CHANNELS) * row_beats;
    beat header;
    for (int i = 0; i < (features + WEIGHTS - 1) / WEIGHTS; i++) {
      if (STARTS_GROUP(i)) header.all = w[at++];
      beat b;
      b.all = w[at++];
      float weights[WEIGHTS];
      NAME(floats)(&header, &b, i, weights);
      UNROLL for (int l = 0; l < WEIGHTS; l++)
        if (WEIGHTS * i + l < features)
          y[y_offset + t * y_stride + WEIGHTS * i + l] = known ? weights[l] * scale : 0.0f;
    }
  }
}
