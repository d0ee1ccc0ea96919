// Pairs of each head of x turned by the angles of its position; what has no position in the table stays.
SINGLE __kernel void rope(__global float *restrict x, long x_offset, long x_stride, __global const float *restrict cos_sin,
                          long cos_sin_offset, long cos_sin_stride, __global const int *restrict positions,
                          long position_offset, int tokens, int heads, int head_dim, int table_length, int rot_dim,
                          int interleaved) {
  const int half_dim = rot_dim / 2;
  for (int t = 0; t < tokens; t++) {
    const int position = positions[position_offset + t];
    if (position < 0 || position >= table_length) continue;
    __global const float *angles = cos_sin + cos_sin_offset + position * cos_sin_stride;
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < half_dim; i++) {  // pairs share nothing
        const long at = x_offset + t * x_stride + h * head_dim;
        const long first = at + (interleaved ? 2 * i : i), second = at + (interleaved ? 2 * i + 1 : i + half_dim);
        const float a = x[first], b = x[second], c = angles[i], s = angles[half_dim + i];
        x[first] = a * c - b * s;
        x[second] = a * s + b * c;
      }
  }
}
