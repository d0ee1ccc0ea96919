// argmax and sample: one row of logits, one work-item; 16 lanes of tokens. Definition: kernels/sample.py.

#define LOWEST ((float16)(-INFINITY))

// The tokens 16 i .. 16 i + 15, those past V and NaN as -infinity (or 0 for probabilities).
inline float16 lanes(const __global float *x, int i, int V, float outside) {
  float16 v;
  if (16 * i + 16 <= V) {
    v = vload16(i, x);
  } else {
    float rest[16];
    for (int j = 0; j < 16; j++) rest[j] = 16 * i + j < V ? x[16 * i + j] : outside;
    v = vload16(0, rest);
  }
  return select((float16)(outside), v, isequal(v, v));
}

// Lowest index of the largest number; 0 if there is none.
inline int row_argmax(const __global float *x, int V, float *value) {
  float16 best = LOWEST;
  int16 where = 0;
  for (int i = 0; i < (V + 15) / 16; i++) {
    const float16 v = lanes(x, i, V, -INFINITY);
    const int16 better = isgreater(v, best);
    best = select(best, v, better);
    where = select(where, (int16)(i), better);
  }
  float values[16];
  int places[16];
  vstore16(best, 0, values);
  vstore16(where, 0, places);
  float top = -INFINITY;
  int id = 0;
  for (int j = 0; j < 16; j++) {
    const int at = 16 * places[j] + j;
    if (values[j] > top || (values[j] == top && top > -INFINITY && at < id)) {
      top = values[j];
      id = at;
    }
  }
  *value = top;
  return id;
}

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void argmax(__global const float *x, long x_offset,
                                                                    long x_stride, __global int *ids, long ids_offset,
                                                                    int V) {
  const int t = get_group_id(0);
  float top;
  ids[ids_offset + t] = row_argmax(x + x_offset + t * x_stride, V, &top);
}

// First of the four words of Philox4x32-10 (Salmon et al., SC'11, doi 10.1145/2063384.2063405).
inline uint philox(uint counter, uint seed) {
  uint c0 = counter, c1 = 0, c2 = 0, c3 = 0, key0 = seed, key1 = 0;
  for (int round = 0; round < 10; round++) {
    const uint low0 = 0xD2511F53u * c0, high0 = mul_hi(0xD2511F53u, c0);
    const uint low1 = 0xCD9E8D57u * c2, high1 = mul_hi(0xCD9E8D57u, c2);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

// Sum and number of the probabilities >= threshold.
inline float mass(const __global float *p, int V, float threshold, int *kept_tokens) {
  float16 sum = 0.0f;
  int16 count = 0;
  for (int i = 0; i < (V + 15) / 16; i++) {
    const float16 v = lanes(p, i, V, -1.0f);
    const int16 kept = isgreaterequal(v, (float16)(threshold));
    sum += select((float16)(0.0f), v, kept);
    count -= kept;
  }
  int counts[16], n = 0;
  vstore16(count, 0, counts);
  for (int j = 0; j < 16; j++) n += counts[j];
  *kept_tokens = n;
  return sum16(sum);
}

// The largest threshold up to 1 that still keeps `enough` (by number if by_count, else by sum): bisection over the bits
// of a non-negative float, whose order is that of the numbers.
inline float threshold(const __global float *p, int V, float enough, int by_count, float least) {
  uint low = as_uint(least), high = as_uint(1.0f) + 1;
  int count;
  while (high - low > 1) {
    const uint middle = low + (high - low) / 2;
    const float kept = mass(p, V, as_float(middle), &count);
    if ((by_count ? (float)count : kept) >= enough)
      low = middle;
    else
      high = middle;
  }
  return as_float(low);
}

// `p` [T, V] is room for the probabilities. Global size (rows).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void sample(
    __global const float *x, long x_offset, long x_stride, __global const float *params, long params_offset,
    long params_stride, __global uint *rng, long rng_offset, long rng_stride, __global int *ids, long ids_offset,
    __global float *p, int V) {
  const int t = get_group_id(0);
  x += x_offset + t * x_stride;
  params += params_offset + t * params_stride;
  rng += rng_offset + t * rng_stride;
  p += (size_t)t * V;
  const float temperature = params[0], top_p = params[2], min_p = params[3];
  const int top_k = convert_int_sat(params[1]);  // towards zero; NaN is 0
  const uint seed = rng[0], counter = rng[1];
  rng[1] = counter + 1;
  float top;
  const int best = row_argmax(x, V, &top);
  if (!(temperature > 0.0f && temperature < INFINITY) || isinf(top)) {
    ids[ids_offset + t] = best;
    return;
  }
  for (int i = 0; i < (V + 15) / 16; i++) {
    const float16 v = exp((lanes(x, i, V, -INFINITY) - top) / temperature);
    if (16 * i + 16 <= V) {
      vstore16(v, i, p);
    } else {
      float rest[16];
      vstore16(v, 0, rest);
      for (int j = 0; 16 * i + j < V; j++) p[16 * i + j] = rest[j];
    }
  }
  float least = 0.0f;
  int kept;
  // The largest probability is exp(0) = 1 here, so that a threshold above 1 would keep nothing.
  if (top_k > 0 && top_k < V) least = threshold(p, V, top_k, 1, least);
  if (top_p < 1.0f) least = threshold(p, V, top_p * mass(p, V, least, &kept), 0, least);
  if (min_p > 0.0f) least = fmax(least, fmin(min_p, 1.0f));
  const float goal = (philox(counter, seed) >> 8) * 0x1p-24f * mass(p, V, least, &kept);
  float sum = 0.0f;
  int last = best;
  for (int v = 0; v < V; v++) {
    if (!(p[v] >= least) || p[v] == 0.0f) continue;
    last = v;
    sum += p[v];
    if (sum > goal) break;
  }
  ids[ids_offset + t] = last;
}
