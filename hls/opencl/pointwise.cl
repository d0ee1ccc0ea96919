// Element-wise ops, copies of rows.

SINGLE __kernel void add(__global float *restrict x, long x_offset, long x_stride, __global const float *restrict y,
                         long y_offset, long y_stride, int tokens, int features) {
  for (int t = 0; t < tokens; t++)
    for (int n = 0; n < features; n++) x[x_offset + t * x_stride + n] += y[y_offset + t * y_stride + n];
}

SINGLE __kernel void softcap(__global float *restrict x, long x_offset, long x_stride, int tokens, int features,
                             float cap) {
  for (int t = 0; t < tokens; t++)
    for (int n = 0; n < features; n++) {
      const long at = x_offset + t * x_stride + n;
      x[at] = cap * tanh(x[at] / cap);
    }
}

inline float activation(float x, int kind) {
  if (kind == GELU_TANH) return 0.5f * x * (1.0f + tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  if (kind == GELU_ERF) return 0.5f * x * (1.0f + erf(x * 0.7071067811865476f));
  return x / (1.0f + exp(-x));
}

SINGLE __kernel void glu(__global const float *restrict gate, long gate_offset, long gate_stride,
                         __global const float *restrict up, long up_offset, long up_stride, __global float *restrict y,
                         long y_offset, long y_stride, int tokens, int features, int kind) {
  for (int t = 0; t < tokens; t++)
    for (int n = 0; n < features; n++)
      y[y_offset + t * y_stride + n] =
          activation(gate[gate_offset + t * gate_stride + n], kind) * up[up_offset + t * up_stride + n];
}

SINGLE __kernel void gather(__global const float *restrict x, long x_offset, long x_stride,
                            __global const int *restrict rows, long rows_offset, __global float *restrict y,
                            long y_offset, long y_stride, int wanted, int features, int tokens) {
  for (int r = 0; r < wanted; r++) {
    const int row = rows[rows_offset + r];
    for (int n = 0; n < features; n++)
      y[y_offset + r * y_stride + n] = row >= 0 && row < tokens ? x[x_offset + row * x_stride + n] : 0.0f;
  }
}

SINGLE __kernel void advance(__global int *restrict positions, long position_offset, __global const int *restrict seq_ids,
                             long seq_offset, int tokens) {
  for (int t = 0; t < tokens; t++)
    if (seq_ids[seq_offset + t] >= 0) positions[position_offset + t] += 1;
}
