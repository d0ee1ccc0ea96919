// rms_norm. One work-item per row: K is a few thousand, and a second one would have to wait for the first one's sum.

// out[t, :] = x[t, :] * rsqrt(mean(x^2) + eps) * (weight + weight_offset). Global size (rows).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void rms_norm(
    __global const float *x, long x_offset, long x_stride, __global const float *weight, long weight_start,
    __global float *out, long out_offset, long out_stride, int K, float eps, float weight_offset) {
  const int t = get_global_id(0);
  x += x_offset + t * x_stride;
  out += out_offset + t * out_stride;
  weight += weight_start;
  const float factor = inverse_rms(x, K, eps);
  int k = 0;
  for (; k + 16 <= K; k += 16)
    vstore16(vload16(0, x + k) * factor * (vload16(0, weight + k) + weight_offset), 0, out + k);
  for (; k < K; k++) out[k] = x[k] * factor * (weight[k] + weight_offset);
}
