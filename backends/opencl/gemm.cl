// gemm: y = x @ w.T on packed tiles of 32 rows (formats.h). gemv for a few rows of x, gemm for many.
//
// -DADD and -DBIASED are flags, -DDEPTH the columns that `gemm` unpacks at a time; see gemm.py.
//
// One work-item per work-group: a CPU runs a work-group on one thread, and explicit 16-wide vectors over the rows of a
// tile beat what the compilers make of work-items (2-7 GB/s).

ACTIVATION(float16)

#ifdef IS_FLOAT
#define GROUPS 0
#else
#define GROUPS (K / GROUP)
#endif

#ifdef FAST
typedef short act_t;  // integers up to LEVELS; of four, the middle two are swapped, so that pairs fit those of the weights
#else
typedef float act_t;
#endif

// What a group's products are multiplied with, the sum of its x for the format's minimum, and what the integers of its
// sum begin with: each quant is too large by OFFSET.
typedef struct {
  float scale, sum;
  int start, unused;
} group_t;

#ifdef FAST
inline void store_pairs(float16 v, __global act_t *to) {
#ifdef NO_SHUFFLES
  short s[16];
  vstore16(convert_short16(v), 0, s);
  for (int i = 0; i < 16; i++) to[i] = s[(i & ~3) | (i & 1) << 1 | (i >> 1 & 1)];
#else
  vstore16(convert_short16(v).s021346578a9bcedf, 0, to);
#endif
}
#endif

// One row of x as the dot products want it: normalised if asked, and as integers with a scale per block of 32 (FAST) or as
// floats.
inline void prepare_row(const __global float *x, const __global float *weight, int K, float eps, float weight_offset,
                        int normalise, __global act_t *act, __global group_t *group) {
  const float factor = normalise ? inverse_rms(x, K, eps) : 1.0f;
  int k = 0;
  for (; k + 32 <= K; k += 32) {
    float16 a = vload16(0, x + k), b = vload16(0, x + k + 16);
    if (normalise) {
      a = a * factor * (vload16(0, weight + k) + weight_offset);
      b = b * factor * (vload16(0, weight + k + 16) + weight_offset);
    }
    float scale = 1.0f;
#ifdef FAST
    const float largest = max16(fmax(fabs(a), fabs(b)));
    // Numbers too small for an inverse count as zeros: the error bound allows 1e-30.
    const float inverse = largest > 1e-30f ? LEVELS / largest : 0.0f;
    a = rint(a * inverse);
    b = rint(b * inverse);
    store_pairs(a, act + k);
    store_pairs(b, act + k + 16);
    scale = largest / LEVELS;
#else
    vstore16(a, 0, act + k);
    vstore16(b, 0, act + k + 16);
#endif
#ifndef IS_FLOAT
    const float sums[2] = {sum16(a), sum16(b)};
    const float sum = sums[0] + sums[1];
    // A NaN has no integer, and fmax passes over it; an infinity makes `inverse` 0. Both make this sum NaN, and it the
    // scale, so that no finite number comes out.
    scale += 0.0f * sum;
    for (int i = 0; i < 32 / GROUP; i++, group++) {
      const float part = 32 / GROUP == 1 ? sum : sums[i];
      group->scale = scale;
      group->sum = scale * part;
      group->start = isfinite(part) ? -OFFSET * (int)part : 0;
    }
#endif
  }
  for (; k < K; k++)  // float weights only: every quantised format has K in blocks of 32
    act[k] = normalise ? x[k] * factor * (weight[k] + weight_offset) : x[k];
}

// Asks for cache lines of weights that are PREFETCH bytes ahead.
#if PREFETCH && defined(__has_builtin)
#if __has_builtin(__builtin_prefetch)
#define FETCH(lines)     \
  for (int i = 0; i < (lines); i++) __builtin_prefetch((const void *)((ulong)p + PREFETCH + g * (lines) * 64 + i * 64));
#endif
#endif
#ifndef FETCH
#define FETCH(lines)
#endif

// Dot products of a prepared row of x with the 32 rows of the tile at p.
inline void tile_dot(const __global ushort *p, const __global act_t *x, const __global group_t *group, int K,
                     float16 *ra, float16 *rb) {
  float16 a = 0.0f, b = 0.0f;
#ifdef IS_FLOAT
  // Two sums per half: one FMA chain would wait for itself (latency 4, two a cycle).
  float16 a1 = 0.0f, b1 = 0.0f;
  int k = 0;
  for (; k + 1 < K; k += 2) {
    const float16 x0 = (float16)(x[k]), x1 = (float16)(x[k + 1]);
    a = fma(FLOATS(k, 0), x0, a);
    b = fma(FLOATS(k, 1), x0, b);
    a1 = fma(FLOATS(k + 1, 0), x1, a1);
    b1 = fma(FLOATS(k + 1, 1), x1, b1);
  }
  if (k < K) {
    a = fma(FLOATS(k, 0), (float16)(x[k]), a);
    b = fma(FLOATS(k, 1), (float16)(x[k]), b);
  }
  a += a1;
  b += b1;
#else
  for (int block = 0; block < K / BLOCK; block++, p += WORDS * 32)
#if BLOCK > GROUP
    for (int g = 0; g < BLOCK / GROUP; g++)
#endif
    {
#if BLOCK == GROUP
      const int g = 0;
#endif
      FETCH(WORDS * GROUP / BLOCK)
#ifdef FAST
      const __global int *pairs = (const __global int *)x;
      int16 sa = group->start, sb = group->start;
#define DOT_A(i, q) sa = add_products(q, pairs[i], sa);
#define DOT_B(i, q) sb = add_products(q, pairs[i], sb);
#else
      float16 sa = 0.0f, sb = 0.0f;
#define DOT(i, q, s)                                            \
  s = fma(convert_float16(LOW(q)), (float16)(x[FIRST_OF(i)]), s); \
  s = fma(convert_float16(UPPER(q)), (float16)(x[FIRST_OF(i) + 2]), s);
#define DOT_A(i, q) DOT(i, q, sa)
#define DOT_B(i, q) DOT(i, q, sb)
#endif
      EACH(g, 0, DOT_A)
      EACH(g, 1, DOT_B)
      a = fma(convert_float16(sa), SCALE(0, g) * group->scale, a);
      b = fma(convert_float16(sb), SCALE(1, g) * group->scale, b);
#if HAS_MIN
      a = fma(MIN(0, g), (float16)(group->sum), a);
      b = fma(MIN(1, g), (float16)(group->sum), b);
#endif
      x += GROUP;
      group++;
    }
#endif
  *ra = a;
  *rb = b;
}

// Add bias and y where asked, store those of y[first .. first + 15] that lie inside N.
inline void store_half(float16 v, __global float *y, const __global float *bias, int first, int N, int flags) {
  if (first + 16 <= N) {
    if (flags & BIASED) v += vload16(0, bias + first);
    if (flags & ADD) v += vload16(0, y + first);
    vstore16(v, 0, y + first);
  } else {
    float rows[16];
    vstore16(v, 0, rows);
    for (int r = 0; first + r < N; r++) {
      if (flags & BIASED) rows[r] += bias[first + r];
      if (flags & ADD) rows[r] += y[first + r];
      y[first + r] = rows[r];
    }
  }
}

#define X_INPUT                                                                                              \
  __global const float *x, long x_offset, long x_stride, __global const float *weight, long weight_start, float eps, \
      float weight_offset, int normalise, __global float *room

// What both gemv kernels begin with: their row of x, ready, and their tiles. Every work-group prepares a copy of its own:
// a microsecond of work in all, where a launch would cost several. `room` holds, per work-group, the groups and K act_t.
#define BEGIN_GEMV                                                                                           \
  const int tiles = (N + 31) / 32, first = get_group_id(0) * chunk, t = get_group_id(1);                     \
  __global float *own = room + (t * get_num_groups(0) + get_group_id(0)) * (size_t)(K + 4 * GROUPS);         \
  __global group_t *groups = (__global group_t *)own;                                                        \
  __global act_t *act = (__global act_t *)(own + 4 * GROUPS);                                                \
  prepare_row(x + x_offset + t * x_stride, weight + weight_start, K, eps, weight_offset, normalise, act, groups); \
  y += y_offset + t * y_stride;

// Global size (chunks of tiles, rows of x).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemv(
    __global const ushort *w, X_INPUT, __global const float *bias, long bias_offset, __global float *y, long y_offset,
    long y_stride, int N, int K, int chunk, int flags) {
  BEGIN_GEMV
  for (int tile = first; tile < min(tiles, first + chunk); tile++) {
    float16 a, b;
    tile_dot(TILE_AT(w, tile), act, groups, K, &a, &b);
    store_half(a, y, bias + bias_offset, tile * 32, N, flags);
    store_half(b, y, bias + bias_offset, tile * 32 + 16, N, flags);
  }
}

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemv_glu(
    __global const ushort *gate, __global const ushort *up, X_INPUT, __global float *y, long y_offset, long y_stride,
    int N, int K, int chunk, int kind) {
  BEGIN_GEMV
  for (int tile = first; tile < min(tiles, first + chunk); tile++) {
    float16 ga, gb, ua, ub;
    tile_dot(TILE_AT(gate, tile), act, groups, K, &ga, &gb);
    tile_dot(TILE_AT(up, tile), act, groups, K, &ua, &ub);
    store_half(activation(ga, kind) * ua, y, y, tile * 32, N, 0);
    store_half(activation(gb, kind) * ub, y, y, tile * 32 + 16, N, 0);
  }
}

// Many rows of x. `prepare` makes them ready, once; each work-group of `gemm` unpacks DEPTH columns of a tile's weights and
// uses them for all its rows. ROWS rows by two vectors of columns are multiplied at a time: with FAST, their sums are 24 of
// the 32 vector registers of AVX-512.

// Global size (rows of x). `room` holds all groups, then all act_t.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void prepare(X_INPUT, int T, int K) {
  const int t = get_global_id(0);
  __global group_t *groups = (__global group_t *)room;
  __global act_t *act = (__global act_t *)(room + (size_t)T * 4 * GROUPS);
  prepare_row(x + x_offset + t * x_stride, weight + weight_start, K, eps, weight_offset, normalise,
              act + (size_t)t * K, groups + (size_t)t * GROUPS);
}

#if ROWS == 6
#define EACH_ROW(F) F(0) F(1) F(2) F(3) F(4) F(5)
#else
#define EACH_ROW(F) F(0) F(1) F(2)
#endif

// DEPTH columns of 16 rows of a tile, unpacked.
typedef struct {
#ifdef FAST
  int16 pairs[DEPTH / 2];
  float16 factors[DEPTH / GROUP];
#if HAS_MIN
  float16 addends[DEPTH / GROUP];
#endif
#else
  float16 columns[DEPTH];
#endif
} panel_t;

// Columns start .. stop of both halves of the tile at p.
inline void unpack(const __global ushort *p, __local panel_t *panel_a, __local panel_t *panel_b, int start, int stop) {
#ifdef IS_FLOAT
  for (int k = start; k < stop; k++) {
    panel_a->columns[k - start] = FLOATS(k, 0);
    panel_b->columns[k - start] = FLOATS(k, 1);
  }
#else
  for (int k = start, i = 0; k < stop; k += GROUP, i++) {
    const __global ushort *base = p;
    const int block = k / BLOCK;
    p += (size_t)block * WORDS * 32;
    const int g = (k - block * BLOCK) / GROUP;  // with %, compilers may write `freeze`, which Oclgrind does not know
#ifdef FAST
    __local int16 *a = panel_a->pairs + i * (GROUP / 2), *b = panel_b->pairs + i * (GROUP / 2);
#define KEEP_A(j, q) a[j] = q;
#define KEEP_B(j, q) b[j] = q;
    EACH(g, 0, KEEP_A)
    EACH(g, 1, KEEP_B)
    panel_a->factors[i] = SCALE(0, g);
    panel_b->factors[i] = SCALE(1, g);
#if HAS_MIN
    panel_a->addends[i] = MIN(0, g);
    panel_b->addends[i] = MIN(1, g);
#endif
#else
    __local float16 *a = panel_a->columns + i * GROUP, *b = panel_b->columns + i * GROUP;
    const float16 factor_a = SCALE(0, g), factor_b = SCALE(1, g), addend_a = ADDEND_OF(0, g), addend_b = ADDEND_OF(1, g);
#define KEEP(j, q, to, factor, addend)                                  \
  to[FIRST_OF(j)] = fma(convert_float16(LOW(q)), factor, addend);       \
  to[FIRST_OF(j) + 2] = fma(convert_float16(UPPER(q)), factor, addend);
#define KEEP_A(j, q) KEEP(j, q, a, factor_a, addend_a)
#define KEEP_B(j, q) KEEP(j, q, b, factor_b, addend_b)
    EACH(g, 0, KEEP_A)
    EACH(g, 1, KEEP_B)
#endif
    p = base;
  }
#endif
}

// What rows of x by one or two tiles need; the same for all of them.
typedef struct {
  const __global act_t *x;          // [T, K]
  const __global group_t *groups;   // [T, GROUPS]
  const __global float *bias;
  __global float *y;                // [T, N]
  long y_stride;
  int T, N, K, end, flags, kind;
} rows_t;

// y[t .. t + ROWS - 1, first .. ] from ROWS rows of x and columns start .. stop of the panels, panel b being that of the next
// 16 columns or, where there is a GLU (kind >= 0), the up to the gate of panel a. Sums wait in `waiting` until columns
// that are not unpacked yet have been added. A row past the end repeats the last one and is not stored: one loop for every T.
inline void multiply(const rows_t *in, const __local panel_t *panel_a, const __local panel_t *panel_b, int start, int stop,
                     int t, int first, __global float *waiting) {
  const int K = in->K;
#define POINT(r)                                                       \
  const size_t row##r = min(t + r, in->T - 1);                         \
  const __global act_t *x##r = in->x + row##r * K + start;             \
  const __global group_t *group##r = in->groups + row##r * GROUPS + start / GROUP; \
  float16 a##r = 0.0f, b##r = 0.0f;
  EACH_ROW(POINT)
  if (start) {
#define RESUME(r) a##r = vload16(2 * (t + r), waiting), b##r = vload16(2 * (t + r) + 1, waiting);
    EACH_ROW(RESUME)
  }
#ifdef FAST
  for (int g = 0; g < (stop - start) / GROUP; g++) {
#define BEGIN(r) int16 ia##r = group##r[g].start, ib##r = ia##r;
    EACH_ROW(BEGIN)
    for (int i = g * (GROUP / 2); i < (g + 1) * (GROUP / 2); i++) {
      const int16 wa = panel_a->pairs[i], wb = panel_b->pairs[i];
#define PRODUCTS(r)                                        \
  const int pair##r = ((const __global int *)x##r)[i];     \
  ia##r = add_products(wa, pair##r, ia##r);                \
  ib##r = add_products(wb, pair##r, ib##r);
      EACH_ROW(PRODUCTS)
    }
    const float16 fa = panel_a->factors[g], fb = panel_b->factors[g];
#define SCALE_SUMS(r)                                               \
  a##r = fma(convert_float16(ia##r), fa * group##r[g].scale, a##r); \
  b##r = fma(convert_float16(ib##r), fb * group##r[g].scale, b##r);
    EACH_ROW(SCALE_SUMS)
#if HAS_MIN
    const float16 ma = panel_a->addends[g], mb = panel_b->addends[g];
#define ADD_MIN(r)                                  \
  a##r = fma(ma, (float16)(group##r[g].sum), a##r); \
  b##r = fma(mb, (float16)(group##r[g].sum), b##r);
    EACH_ROW(ADD_MIN)
#endif
  }
#else
  for (int begin = 0; begin < stop - start; begin += CHAIN) {
#define BEGIN(r) float16 fa##r = 0.0f, fb##r = 0.0f;
    EACH_ROW(BEGIN)
    for (int k = begin; k < min(stop - start, begin + CHAIN); k++) {
      const float16 wa = panel_a->columns[k], wb = panel_b->columns[k];
#define PRODUCTS(r)                           \
  fa##r = fma(wa, (float16)(x##r[k]), fa##r); \
  fb##r = fma(wb, (float16)(x##r[k]), fb##r);
      EACH_ROW(PRODUCTS)
    }
#define ADD_SUMS(r) a##r += fa##r, b##r += fb##r;
    EACH_ROW(ADD_SUMS)
  }
#endif
  if (stop < K) {
#define WAIT(r) vstore16(a##r, 2 * (t + r), waiting), vstore16(b##r, 2 * (t + r) + 1, waiting);
    EACH_ROW(WAIT)
    return;
  }
  float16 done_a[ROWS], done_b[ROWS];
#define FINISH(r) done_a[r] = a##r, done_b[r] = b##r;
  EACH_ROW(FINISH)
  for (int r = 0; r < ROWS && t + r < in->end; r++) {
    __global float *y = in->y + (t + r) * in->y_stride;
    if (in->kind >= 0) {
      store_half(activation(done_a[r], in->kind) * done_b[r], y, in->bias, first, in->N, in->flags);
    } else {
      store_half(done_a[r], y, in->bias, first, in->N, in->flags);
      store_half(done_b[r], y, in->bias, first + 16, in->N, in->flags);
    }
  }
}

// `room` as `prepare` left it. Work-group (i, j) does tile i for `rows` rows of x, `rows` being a multiple of ROWS. `sums`
// holds 32 floats per row of x, and ROWS more rows, per tile and half of a GLU.
#define GEMM_INPUT                                                                                                      \
  __global const float *room, __global const float *bias, long bias_offset, __global float *y, long y_offset,           \
      long y_stride, __global float *sums, int T, int N, int K, int rows
#define ROWS_OF_X(flags, kind)                                                                                          \
  const int tile = get_group_id(0), begin = get_group_id(1) * rows;                                                     \
  const rows_t in = {(const __global act_t *)(room + (size_t)T * 4 * GROUPS), (const __global group_t *)room,           \
                     bias + bias_offset, y + y_offset, y_stride, T, N, K, min(T, begin + rows), flags, kind};

// Global size (tiles, chunks of rows).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemm(__global const ushort *w, GEMM_INPUT, int flags) {
  __local panel_t panels[2];
  ROWS_OF_X(flags, -1)
  sums += (size_t)tile * (T + ROWS) * 32;
  for (int start = 0; start < K; start += DEPTH) {
    const int stop = min(K, start + DEPTH);
    unpack(TILE_AT(w, tile), panels, panels + 1, start, stop);
    for (int t = begin; t < in.end; t += ROWS) multiply(&in, panels, panels + 1, start, stop, t, tile * 32, sums);
  }
}

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void gemm_glu(__global const ushort *gate,
                                                                      __global const ushort *up, GEMM_INPUT, int kind) {
  __local panel_t gates[2], ups[2];
  ROWS_OF_X(0, kind)
  sums += (size_t)tile * (T + ROWS) * 64;
  for (int start = 0; start < K; start += DEPTH) {
    const int stop = min(K, start + DEPTH);
    unpack(TILE_AT(gate, tile), gates, gates + 1, start, stop);
    unpack(TILE_AT(up, tile), ups, ups + 1, start, stop);
    for (int h = 0; h < 2; h++)
      for (int t = begin; t < in.end; t += ROWS)
        multiply(&in, gates + h, ups + h, start, stop, t, tile * 32 + 16 * h, sums + (size_t)h * (T + ROWS) * 32);
  }
}
