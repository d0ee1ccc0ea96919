// rope: rotate pairs of each head by the angles of its position, cos and sin from a table [positions, R].
// kv_append: store keys and values of new tokens in their pages. rope_kv_append: both, keys without a round trip.
// -DINTERLEAVED: pairs (2i, 2i + 1); else (i, i + R / 2). -DKV_HALF|KV_FLOAT.

#ifdef KV_HALF
typedef half kv_t;
#define STORE(v, p) vstore_half_rte(v, 0, p)
#define STORE8(v, p) vstore_half8_rte(v, 0, p)
#define STORE16(v, p) vstore_half16_rte(v, 0, p)
#else
typedef float kv_t;
#define STORE(v, p) (*(p) = (v))
#define STORE8(v, p) vstore8(v, 0, p)
#define STORE16(v, p) vstore16(v, 0, p)
#endif
#define KEEP(v, p) (*(p) = (v))
#define KEEP8(v, p) vstore8(v, 0, p)
#define KEEP16(v, p) vstore16(v, 0, p)

#ifdef INTERLEAVED
#define FIRST(i) (2 * (i))
#define SECOND(i) (2 * (i) + 1)
#else
#define FIRST(i) (i)
#define SECOND(i) ((i) + R / 2)
#endif

// The first `rotated` numbers of the head at x, rotated, to y by PUT, PUT8 and PUT16; y may be x.
#ifdef NO_SHUFFLES
#define ROTATE_8(x, y, PUT8, PUT16) break;
#elif defined(INTERLEAVED)
#define ROTATE_8(x, y, PUT8, PUT16)              \
  {                                              \
    const float16 v = vload16(0, x + 2 * i);     \
    float16 turned;                              \
    turned.even = v.even * c8 - v.odd * s8;      \
    turned.odd = v.odd * c8 + v.even * s8;       \
    PUT16(turned, y + 2 * i);                    \
  }
#else
#define ROTATE_8(x, y, PUT8, PUT16)                                                \
  {                                                                                \
    const float8 a8 = vload8(0, x + i), b8 = vload8(0, x + i + R / 2);             \
    PUT8(a8 * c8 - b8 * s8, y + i);                                                \
    PUT8(b8 * c8 + a8 * s8, y + i + R / 2);                                        \
  }
#endif
#define ROTATE(x, y, PUT, PUT8, PUT16)                                                       \
  {                                                                                          \
    int i = 0;                                                                               \
    for (; i + 8 <= rotated / 2; i += 8) {                                                   \
      const float8 c8 = vload8(0, cos_sin + i), s8 = vload8(0, cos_sin + R / 2 + i);         \
      ROTATE_8(x, y, PUT8, PUT16)                                                            \
    }                                                                                        \
    for (; i < rotated / 2; i++) {                                                           \
      const float a = x[FIRST(i)], b = x[SECOND(i)], c = cos_sin[i], s = cos_sin[R / 2 + i]; \
      PUT(a * c - b * s, y + FIRST(i));                                                      \
      PUT(b * c + a * s, y + SECOND(i));                                                     \
    }                                                                                        \
  }

// Element of a cache of P pages for KV head g of a token, or -1 if the token has no slot (padding, past the block table).
inline long slot(const __global int *block_table, long table_stride, int sequences, int max_pages, int P, int seq,
                 int position, int g, int G, int S, int D) {
  if (seq < 0 || seq >= sequences || position < 0 || position / S >= max_pages) return -1;
  const int page = block_table[seq * table_stride + position / S];
  if (page < 0 || page >= P) return -1;
  return (((long)page * G + g) * S + position % S) * D;
}

// In all kernels a work-group does all heads of a token, which takes less time than waking another thread. Global size (T).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void rope(
    __global float *x, long x_offset, long x_stride, __global const float *cos_sin, long cos_sin_offset,
    long cos_sin_stride, __global const int *positions, long position_offset, int H, int D, int L, int R) {
  const int t = get_group_id(0), position = positions[position_offset + t], rotated = R;
  if (position < 0 || position >= L) return;
  x += x_offset + t * x_stride;
  cos_sin += cos_sin_offset + position * cos_sin_stride;
  for (int h = 0; h < H; h++, x += D) ROTATE(x, x, KEEP, KEEP8, KEEP16)
}

// A head of a key as it is from number `first` on, and one of a value.
inline void append(const __global float *k, const __global float *v, __global kv_t *k_slot, __global kv_t *v_slot,
                   int first, int D) {
  for (int d = first; d < D; d++) STORE(k[d], k_slot + d);
  int d = 0;
  for (; d + 16 <= D; d += 16) STORE16(vload16(0, v + d), v_slot + d);
  for (; d < D; d++) STORE(v[d], v_slot + d);
}

#define CACHE                                                                                                         \
  __global const int *block_table, long table_offset, long table_stride, __global const int *seq_ids, long seq_offset, \
      __global const int *positions, long position_offset, __global kv_t *k_pages, long k_pages_offset,               \
      __global kv_t *v_pages, long v_pages_offset

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void kv_append(
    __global const float *k, long k_offset, long k_stride, __global const float *v, long v_offset, long v_stride, CACHE,
    int G, int sequences, int max_pages, int P, int S, int D) {
  const int t = get_group_id(0), seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
  k += k_offset + t * k_stride;
  v += v_offset + t * v_stride;
  for (int g = 0; g < G; g++, k += D, v += D) {
    const long at = slot(block_table + table_offset, table_stride, sequences, max_pages, P, seq, position, g, G, S, D);
    if (at < 0) return;
    append(k, v, k_pages + k_pages_offset + at, v_pages + v_pages_offset + at, 0, D);
  }
}

__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void rope_kv_append(
    __global float *q, long q_offset, long q_stride, __global const float *k, long k_offset, long k_stride,
    __global const float *v, long v_offset, long v_stride, __global const float *cos_sin, long cos_sin_offset,
    long cos_sin_stride, CACHE, int H, int G, int sequences, int max_pages, int P, int S, int D, int L, int R) {
  const int t = get_group_id(0), seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
  if (position < 0) return;
  const int rotated = position < L ? R : 0;  // past the table: stored as it is
  cos_sin += cos_sin_offset + position * cos_sin_stride;
  q += q_offset + t * q_stride;
  k += k_offset + t * k_stride;
  v += v_offset + t * v_stride;
  for (int h = 0; h < H; h++, q += D) ROTATE(q, q, KEEP, KEEP8, KEEP16)
  for (int g = 0; g < G; g++, k += D, v += D) {
    const long at = slot(block_table + table_offset, table_stride, sequences, max_pages, P, seq, position, g, G, S, D);
    if (at < 0) return;
    __global kv_t *k_slot = k_pages + k_pages_offset + at;
    ROTATE(k, k_slot, STORE, STORE8, STORE16)
    append(k, v, k_slot, v_pages + v_pages_offset + at, rotated, D);
  }
}
