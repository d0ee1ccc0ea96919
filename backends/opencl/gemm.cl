// gemm: y = x @ w.T on packed tiles of 32 rows (formats.h). gemv for a few rows of x, gemm for many.
//
// -DADD and -DBIASED are flags, -DDEPTH the slice of K of `gemm`; see gemm.py.
//
// One work-item per work-group: a CPU runs a work-group on one thread, and explicit 16-wide vectors over the rows of a
// tile beat what the compilers make of work-items (2-7 GB/s). Two halves of a tile share each broadcast of x: 12 -> 25
// GB/s on a 2-core Zen 3 against 12 for one half.

#ifdef FAST
typedef short act_t;  // integers up to LEVELS; a broadcast of 16 bits needs no conversion
#else
typedef float act_t;
#endif

ACTIVATION(float16)

// One row of x as the dot products want it: normalised if asked, and as integers with a scale per block of 32 (FAST) or as
// floats. groups: scale and sum of each block, the sum being what a format's minimum is multiplied with.
//
// Every work-group prepares a copy of its own: a few microseconds of work in all, where a launch of its own would cost
// that in waiting alone.
inline void prepare_row(const __global float *x, const __global float *weight, int K, float eps, float weight_offset,
                        int normalise, __global act_t *act, __global float *groups) {
  const float factor = normalise ? inverse_rms(x, K, eps) : 1.0f;
  int k = 0;
  for (; k + 32 <= K; k += 32, groups += 2) {
    float16 a = vload16(0, x + k), b = vload16(0, x + k + 16);
    if (normalise) {
      a = a * factor * (vload16(0, weight + k) + weight_offset);
      b = b * factor * (vload16(0, weight + k + 16) + weight_offset);
    }
#ifdef FAST
    const float largest = max16(fmax(fabs(a), fabs(b)));
    // Numbers too small for an inverse count as zeros: the error bound allows 1e-30.
    const float inverse = largest > 1e-35f ? LEVELS / largest : 0.0f;
    const float16 ra = rint(a * inverse), rb = rint(b * inverse);
    vstore16(convert_short16(ra), 0, act + k);
    vstore16(convert_short16(rb), 0, act + k + 16);
    // A NaN has no integer, and fmax passes over it; an infinity makes `inverse` 0. Both make this sum NaN, and it the
    // scale, so that no finite number comes out.
    const float sum = sum16(ra + rb);
    const float scale = largest / LEVELS + 0.0f * sum;
    groups[0] = scale;
    groups[1] = scale * sum;
#else
    vstore16(a, 0, act + k);
    vstore16(b, 0, act + k + 16);
    groups[0] = 1.0f;
    groups[1] = sum16(a + b);
#endif
  }
  for (; k < K; k++)  // float weights only: every quantised format has K in blocks of 32
    act[k] = normalise ? x[k] * factor * (weight[k] + weight_offset) : x[k];
}

// Dot products of a prepared row of x with the 32 rows of the tile at p.
inline void tile_dot(const __global ushort *p, const __global act_t *x, const __global float *groups, int K,
                     float16 *ra, float16 *rb) {
  float16 a0 = 0.0f, b0 = 0.0f;
#ifdef IS_FLOAT
  // Two sums per half: one FMA chain would wait for itself (latency 4, two a cycle).
  float16 a1 = 0.0f, b1 = 0.0f;
  int k = 0;
  for (; k + 1 < K; k += 2) {
    const float16 x0 = (float16)(x[k]), x1 = (float16)(x[k + 1]);
    a0 = fma(FLOATS(k, 0), x0, a0);
    b0 = fma(FLOATS(k, 1), x0, b0);
    a1 = fma(FLOATS(k + 1, 0), x1, a1);
    b1 = fma(FLOATS(k + 1, 1), x1, b1);
  }
  if (k < K) {
    a0 = fma(FLOATS(k, 0), (float16)(x[k]), a0);
    b0 = fma(FLOATS(k, 1), (float16)(x[k]), b0);
  }
  a0 += a1;
  b0 += b1;
#else
  for (int block = 0; block < K / BLOCK; block++, p += WORDS * 32)
#if BLOCK > GROUP
    for (int g = 0; g < BLOCK / GROUP; g++)
#endif
    {
#if BLOCK == GROUP
      const int g = 0;
#endif
      const int i = block * (BLOCK / 32) + g * GROUP / 32;
      const float scale = groups[2 * i], sum = groups[2 * i + 1];
#ifdef FAST
      int16 ia = 0, ib = 0;
      short16 sa = 0, sb = 0;
#define DOT(k, qa, qb)                 \
  {                                    \
    const short16 xk = (short16)(x[k]); \
    sa += (qa)*xk;                     \
    sb += (qb)*xk;                     \
  }
#define WIDEN               \
  ia += convert_int16(sa);  \
  ib += convert_int16(sb);  \
  sa = 0;                   \
  sb = 0;
      EACH(g, DOT, WIDEN)
#undef DOT
#undef WIDEN
      a0 = fma(convert_float16(ia), SCALE(0, g) * scale, a0);
      b0 = fma(convert_float16(ib), SCALE(1, g) * scale, b0);
#else
      float16 fa = 0.0f, fb = 0.0f;
#define DOT(k, qa, qb)                      \
  {                                         \
    const float16 xk = (float16)(x[k]);     \
    fa = fma(convert_float16(qa), xk, fa);  \
    fb = fma(convert_float16(qb), xk, fb);  \
  }
      EACH(g, DOT, )
#undef DOT
      a0 = fma(fa, SCALE(0, g), a0);
      b0 = fma(fb, SCALE(1, g), b0);
#endif
#if HAS_MIN
      a0 = fma(MIN(0, g), (float16)(sum), a0);
      b0 = fma(MIN(1, g), (float16)(sum), b0);
#endif
      x += GROUP;
    }
#endif
  *ra = a0;
  *rb = b0;
}

// Add bias and y where asked, store what lies inside N.
inline void store_tile(float16 a, float16 b, __global float *y, const __global float *bias, int first, int N, int flags) {
  if (first + 32 <= N) {
    if (flags & BIASED) {
      a += vload16(0, bias + first);
      b += vload16(0, bias + first + 16);
    }
    if (flags & ADD) {
      a += vload16(0, y + first);
      b += vload16(0, y + first + 16);
    }
    vstore16(a, 0, y + first);
    vstore16(b, 0, y + first + 16);
  } else {
    float rows[32];
    vstore16(a, 0, rows);
    vstore16(b, 1, rows);
    for (int r = 0; first + r < N; r++) {
      float v = rows[r];
      if (flags & BIASED) v += bias[first + r];
      if (flags & ADD) v += y[first + r];
      y[first + r] = v;
    }
  }
}

// What both gemv kernels begin with: their row of x, ready, and their tiles. `room` holds, per work-group, K act_t and
// the groups behind them.
#define BEGIN_GEMV(N)                                                                                        \
  const int tiles = (N + 31) / 32, first = get_group_id(0) * chunk, t = get_group_id(1);                     \
  const size_t group_floats = K + 2 * (K / 32);                                                              \
  __global float *own = room + (t * get_num_groups(0) + get_group_id(0)) * group_floats;                     \
  __global act_t *act = (__global act_t *)own;                                                               \
  __global float *groups = own + K;                                                                          \
  prepare_row(x + x_offset + t * x_stride, weight + weight_start, K, eps, weight_offset, normalise, act, groups); \
  y += y_offset + t * y_stride;

#define GEMV_INPUT                                                                                           \
  __global const float *x, long x_offset, long x_stride, __global const float *weight, long weight_start, float eps, \
      float weight_offset, int normalise, __global float *room

// Global size (chunks of tiles, rows of x).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemv(
    __global const ushort *w, GEMV_INPUT, __global const float *bias, long bias_offset, __global float *y,
    long y_offset, long y_stride, int N, int K, int chunk, int flags) {
  BEGIN_GEMV(N)
  for (int tile = first; tile < min(tiles, first + chunk); tile++) {
    float16 a, b;
    tile_dot(TILE_AT(w, tile), act, groups, K, &a, &b);
    store_tile(a, b, y, bias + bias_offset, tile * 32, N, flags);
  }
}

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemv_glu(
    __global const ushort *gate, __global const ushort *up, GEMV_INPUT, __global float *y, long y_offset,
    long y_stride, int N, int K, int chunk, int kind) {
  BEGIN_GEMV(N)
  for (int tile = first; tile < min(tiles, first + chunk); tile++) {
    float16 ga, gb, ua, ub;
    tile_dot(TILE_AT(gate, tile), act, groups, K, &ga, &gb);
    tile_dot(TILE_AT(up, tile), act, groups, K, &ua, &ub);
    store_tile(activation(ga, kind) * ua, activation(gb, kind) * ub, y, y, tile * 32, N, 0);
  }
}

// Many rows of x: a tile's weights are turned into floats once per DEPTH of K and used for every row. Sums wait in `sums`
// [T, 32] between slices of K. 6 rows x 16 columns are 12 of the 16 vector registers of AVX2, with two for the weights and
// one for x.
#define ROWS 6

inline void unpack_slice(const __global ushort *p, __local float *slice, int start, int stop) {
#ifdef IS_FLOAT
  for (int k = start; k < stop; k++) {
    vstore16(FLOATS(k, 0), 0, slice + (k - start) * 32);
    vstore16(FLOATS(k, 1), 0, slice + (k - start) * 32 + 16);
  }
#else
  for (int k0 = start; k0 < stop; k0 += GROUP, slice += GROUP * 32) {
    const __global ushort *base = p;
    const int block = k0 / BLOCK;
    p += (size_t)block * WORDS * 32;
    const int g = (k0 - block * BLOCK) / GROUP;  // with %, compilers may write `freeze`, which Oclgrind does not know
    const float16 da = SCALE(0, g), db = SCALE(1, g), ma = MIN(0, g), mb = MIN(1, g);
#define KEEP(k, qa, qb)                                               \
  vstore16(fma(convert_float16(qa), da, ma), 0, slice + (k)*32);      \
  vstore16(fma(convert_float16(qb), db, mb), 0, slice + (k)*32 + 16);
    EACH(g, KEEP, )
#undef KEEP
    p = base;
  }
#endif
}

// sums[rows of x, 16 h .. 16 h + 15] += x[rows, start .. stop] @ slice
inline void multiply_slice(const __global float *x, long x_stride, int T, const __local float *slice, int depth,
                           __global float *sums, int begin) {
  for (int t = 0; t < T; t += ROWS) {
    // A row past the end repeats the last one and is not stored: one loop for every T.
    const __global float *x0 = x + min(t, T - 1) * x_stride, *x1 = x + min(t + 1, T - 1) * x_stride;
    const __global float *x2 = x + min(t + 2, T - 1) * x_stride, *x3 = x + min(t + 3, T - 1) * x_stride;
    const __global float *x4 = x + min(t + 4, T - 1) * x_stride, *x5 = x + min(t + 5, T - 1) * x_stride;
    for (int h = 0; h < 2; h++) {
      const __local float *column = slice + 16 * h;
      float16 s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f, s4 = 0.0f, s5 = 0.0f;
      for (int k = 0; k < depth; k++) {
        const float16 v = vload16(0, column + k * 32);
        s0 = fma(v, (float16)(x0[k]), s0);
        s1 = fma(v, (float16)(x1[k]), s1);
        s2 = fma(v, (float16)(x2[k]), s2);
        s3 = fma(v, (float16)(x3[k]), s3);
        s4 = fma(v, (float16)(x4[k]), s4);
        s5 = fma(v, (float16)(x5[k]), s5);
      }
      __global float *out = sums + (size_t)t * 32 + 16 * h;
#define ACCUMULATE(i, s)                                 \
  if (t + i < T) {                                       \
    if (!begin) s += vload16(0, out + (i)*32);           \
    vstore16(s, 0, out + (i)*32);                        \
  }
      ACCUMULATE(0, s0)
      ACCUMULATE(1, s1)
      ACCUMULATE(2, s2)
      ACCUMULATE(3, s3)
      ACCUMULATE(4, s4)
      ACCUMULATE(5, s5)
#undef ACCUMULATE
    }
  }
}

inline void tile_product(const __global ushort *p, const __global float *x, long x_stride, int T, int K,
                         __local float *slice, __global float *sums) {
  for (int start = 0; start < K; start += DEPTH) {
    const int stop = min(K, start + DEPTH);
    unpack_slice(p, slice, start, stop);
    multiply_slice(x + start, x_stride, T, slice, stop - start, sums, start == 0);
  }
}

// Global size (tiles, chunks of x rows). `sums` holds 32 floats per row of x and tile.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemm(
    __global const ushort *w, __global const float *x, long x_offset, long x_stride, __global const float *bias,
    long bias_offset, __global float *y, long y_offset, long y_stride, __global float *sums, int T, int N, int K,
    int flags) {
  __local float slice[DEPTH * 32];
  const int tile = get_group_id(0);
  sums += (size_t)tile * T * 32;
  tile_product(TILE_AT(w, tile), x + x_offset, x_stride, T, K, slice, sums);
  for (int t = 0; t < T; t++)
    store_tile(vload16(2 * (size_t)t, sums), vload16(2 * (size_t)t + 1, sums), y + y_offset + t * y_stride, bias + bias_offset,
               tile * 32, N, flags);
}

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemm_glu(
    __global const ushort *gate, __global const ushort *up, __global const float *x, long x_offset, long x_stride,
    __global float *y, long y_offset, long y_stride, __global float *sums, int T, int N, int K, int kind) {
  __local float slice[DEPTH * 32];
  const int tile = get_group_id(0);
  sums += (size_t)tile * T * 64;
  x += x_offset;
  tile_product(TILE_AT(gate, tile), x, x_stride, T, K, slice, sums);
  tile_product(TILE_AT(up, tile), x, x_stride, T, K, slice, sums + (size_t)T * 32);
  const __global float *up_sums = sums + (size_t)T * 32;
  for (int t = 0; t < T; t++) {
    const float16 a = activation(vload16(2 * (size_t)t, sums), kind) * vload16(2 * (size_t)t, up_sums);
    const float16 b = activation(vload16(2 * (size_t)t + 1, sums), kind) * vload16(2 * (size_t)t + 1, up_sums);
    store_tile(a, b, y + y_offset + t * y_stride, y, tile * 32, N, 0);
  }
}
