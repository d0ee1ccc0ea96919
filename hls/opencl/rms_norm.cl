// y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * (weight + weight_offset)
SINGLE __kernel void rms_norm(__global const float *restrict x, long x_offset, long x_stride,
                              __global const float *restrict weight, long weight_start, __global float *restrict y,
                              long y_offset, long y_stride, int tokens, int features, float eps, float weight_offset) {
  const int words = (features + LANES - 1) / LANES;
  for (int t = 0; t < tokens; t++) {
    __global const float *row = x + x_offset + t * x_stride;
    float sums[PARTIALS];
    UNROLL for (int p = 0; p < PARTIALS; p++) sums[p] = 0.0f;
    for (int i = 0; i < words; i++) {
      const word v = row_word(row, i, features);
      float square[LANES];
      UNROLL for (int l = 0; l < LANES; l++) square[l] = v.lanes[l] * v.lanes[l];
      sums[i % PARTIALS] += tree(square);
    }
    const float factor = 1.0f / sqrt(sum_of_partials(sums) / features + eps);
    for (int i = 0; i < features; i++)
      y[y_offset + t * y_stride + i] = row[i] * factor * (weight[weight_start + i] + weight_offset);
  }
}
