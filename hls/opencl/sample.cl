// argmax and sample; the definition is in kernels/sample.py.

// Lowest index of the largest number, 0 if there is none; never that of a NaN.
inline int row_argmax(__global const float *x, int vocab, float *top) {
  int id = 0;
  *top = -INFINITY;
  for (int n = 0; n < vocab; n++) {
    const float v = x[n];
    if (v > *top) {
      *top = v;
      id = n;
    }
  }
  return id;
}

SINGLE __kernel void argmax(__global const float *restrict x, long x_offset, long x_stride, __global int *restrict ids,
                            long ids_offset, int tokens, int vocab) {
  for (int t = 0; t < tokens; t++) {
    float top;
    ids[ids_offset + t] = row_argmax(x + x_offset + t * x_stride, vocab, &top);
  }
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
inline float mass(__global const float *p, int vocab, float threshold, int *kept) {
  float sums[PARTIALS];
  UNROLL for (int i = 0; i < PARTIALS; i++) sums[i] = 0.0f;
  int count = 0;
  for (int i = 0; i < (vocab + LANES - 1) / LANES; i++) {
    float v[LANES];
    UNROLL for (int l = 0; l < LANES; l++) {
      const float one = LANES * i + l < vocab ? p[LANES * i + l] : -1.0f;
      const bool is_kept = one >= threshold;
      v[l] = is_kept ? one : 0.0f;
      count += is_kept;
    }
    sums[i % PARTIALS] += tree(v);
  }
  *kept = count;
  return sum_of_partials(sums);
}

// The largest threshold up to 1 that still keeps `enough` (by number if by_count, else by sum): bisection over the bits
// of a non-negative float, whose order is that of the numbers.
inline float lowest_kept(__global const float *p, int vocab, float enough, int by_count, float least) {
  uint low = as_uint(least), high = as_uint(1.0f) + 1;
  while (high - low > 1) {
    const uint middle = low + (high - low) / 2;
    int count;
    const float kept = mass(p, vocab, as_float(middle), &count);
    if ((by_count ? (float)count : kept) >= enough)
      low = middle;
    else
      high = middle;
  }
  return as_float(low);
}

// `p` [vocab] is room for the probabilities of a row.
SINGLE __kernel void sample(__global const float *restrict x, long x_offset, long x_stride,
                            __global const float *restrict params, long params_offset, long params_stride,
                            __global uint *restrict rng, long rng_offset, long rng_stride, __global int *restrict ids,
                            long ids_offset, __global float *p, int tokens, int vocab) {
  for (int t = 0; t < tokens; t++) {
    __global const float *row = x + x_offset + t * x_stride, *wanted = params + params_offset + t * params_stride;
    __global uint *state = rng + rng_offset + t * rng_stride;
    const float temperature = wanted[0], top_p = wanted[2], min_p = wanted[3];
    const int top_k = convert_int_sat(wanted[1]);  // towards zero; NaN is 0
    const uint seed = state[0], counter = state[1];
    state[1] = counter + 1;
    float top;
    int id = row_argmax(row, vocab, &top);
    if (temperature > 0.0f && temperature < INFINITY && !isinf(top)) {
      for (int n = 0; n < vocab; n++) p[n] = isnan(row[n]) ? 0.0f : exp((row[n] - top) / temperature);
      float least = 0.0f;
      int kept;
      // The largest probability is exp(0) = 1 here, so that a threshold above 1 would keep nothing.
      if (top_k > 0 && top_k < vocab) least = lowest_kept(p, vocab, top_k, 1, least);
      if (top_p < 1.0f) least = lowest_kept(p, vocab, top_p * mass(p, vocab, least, &kept), 0, least);
      if (min_p > 0.0f) least = fmax(least, fmin(min_p, 1.0f));
      const float goal = (philox(counter, seed) >> 8) * 0x1p-24f * mass(p, vocab, least, &kept);
      float sum = 0.0f;
      for (int n = 0; n < vocab; n++) {
        if (!(p[n] >= least) || p[n] == 0.0f) continue;
        id = n;
        sum += p[n];
        if (sum > goal) break;
      }
    }
    ids[ids_offset + t] = id;
  }
}
