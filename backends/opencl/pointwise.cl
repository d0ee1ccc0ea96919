// Element-wise ops and row copies. Global size (columns, rows) unless said otherwise; offsets and row strides in elements.

__kernel void add(__global float *x, long x_offset, long x_stride, __global const float *y, long y_offset,
                  long y_stride) {
  const size_t n = get_global_id(0), t = get_global_id(1);
  x[x_offset + t * x_stride + n] += y[y_offset + t * y_stride + n];
}

__kernel void softcap(__global float *x, long x_offset, long x_stride, float cap) {
  const size_t at = x_offset + get_global_id(1) * x_stride + get_global_id(0);
  x[at] = cap * tanh(x[at] / cap);
}

ACTIVATION(float)

__kernel void glu(__global const float *gate, long gate_offset, long gate_stride, __global const float *up,
                  long up_offset, long up_stride, __global float *y, long y_offset, long y_stride, int kind) {
  const size_t n = get_global_id(0), t = get_global_id(1);
  y[y_offset + t * y_stride + n] =
      activation(gate[gate_offset + t * gate_stride + n], kind) * up[up_offset + t * up_stride + n];
}

__kernel void gather(__global const float *x, long x_offset, long x_stride, __global const int *rows, long rows_offset,
                     __global float *y, long y_offset, long y_stride, int T) {
  const size_t n = get_global_id(0), r = get_global_id(1);
  const int row = rows[rows_offset + r];
  y[y_offset + r * y_stride + n] = row >= 0 && row < T ? x[x_offset + row * x_stride + n] : 0.0f;
}

// Global size (tokens).
__kernel void advance(__global int *positions, long position_offset, __global const int *seq_ids, long seq_offset) {
  const size_t t = get_global_id(0);
  if (seq_ids[seq_offset + t] >= 0) positions[position_offset + t] += 1;
}
