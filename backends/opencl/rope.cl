// rope: rotate pairs of each head by the angles of its position, cos and sin from a table [positions, R].
// kv_append: store keys and values of new tokens in their pages. rope_kv_append: both, keys without a round trip.
// -DINTERLEAVED: pairs (2i, 2i + 1); else (i, i + R / 2). -DKV_HALF|KV_FLOAT.

#ifdef KV_HALF
typedef half kv_t;
#define STORE(v, p) vstore_half_rte(v, 0, p)
#else
typedef float kv_t;
#define STORE(v, p) (*(p) = (v))
#endif

#ifdef INTERLEAVED
#define FIRST(i) (2 * (i))
#define SECOND(i) (2 * (i) + 1)
#else
#define FIRST(i) (i)
#define SECOND(i) ((i) + R / 2)
#endif

// Element of a cache of P pages for KV head g of a token, or -1 if the token has no slot (padding, past the block table).
inline long slot(const __global int *block_table, long table_stride, int sequences, int max_pages, int P, int seq,
                 int position, int g, int G, int S, int D) {
  if (seq < 0 || seq >= sequences || position < 0 || position / S >= max_pages) return -1;
  const int page = block_table[seq * table_stride + position / S];
  if (page < 0 || page >= P) return -1;
  return (((long)page * G + g) * S + position % S) * D;
}

// Global size (T, H).
__kernel void rope(__global float *x, long x_offset, long x_stride, __global const float *cos_sin, long cos_sin_offset,
                   long cos_sin_stride, __global const int *positions, long position_offset, int D, int L, int R) {
  const int t = get_global_id(0), h = get_global_id(1), position = positions[position_offset + t];
  if (position < 0 || position >= L) return;
  x += x_offset + t * x_stride + h * D;
  cos_sin += cos_sin_offset + position * cos_sin_stride;
  for (int i = 0; i < R / 2; i++) {
    const float a = x[FIRST(i)], b = x[SECOND(i)], c = cos_sin[i], s = cos_sin[R / 2 + i];
    x[FIRST(i)] = a * c - b * s;
    x[SECOND(i)] = b * c + a * s;
  }
}

// Global size (T, G).
__kernel void kv_append(__global const float *k, long k_offset, long k_stride, __global const float *v, long v_offset,
                        long v_stride, __global const int *block_table, long table_offset, long table_stride,
                        __global const int *seq_ids, long seq_offset, __global const int *positions,
                        long position_offset, __global kv_t *k_pages, long k_pages_offset, __global kv_t *v_pages,
                        long v_pages_offset, int sequences, int max_pages, int P, int S, int D) {
  const int t = get_global_id(0), g = get_global_id(1), G = get_global_size(1);
  const long at = slot(block_table + table_offset, table_stride, sequences, max_pages, P, seq_ids[seq_offset + t],
                       positions[position_offset + t], g, G, S, D);
  if (at < 0) return;
  k += k_offset + t * k_stride + g * D;
  v += v_offset + t * v_stride + g * D;
  for (int d = 0; d < D; d++) {
    STORE(k[d], k_pages + k_pages_offset + at + d);
    STORE(v[d], v_pages + v_pages_offset + at + d);
  }
}

// Global size (T, H + G): the first H rotate a query head, the rest rotate and store a key head and store its value.
__kernel void rope_kv_append(__global float *q, long q_offset, long q_stride, __global const float *k, long k_offset,
                             long k_stride, __global const float *v, long v_offset, long v_stride,
                             __global const float *cos_sin, long cos_sin_offset, long cos_sin_stride,
                             __global const int *block_table, long table_offset, long table_stride,
                             __global const int *seq_ids, long seq_offset, __global const int *positions,
                             long position_offset, __global kv_t *k_pages, long k_pages_offset, __global kv_t *v_pages,
                             long v_pages_offset, int H, int sequences, int max_pages, int P, int S, int D, int L,
                             int R) {
  const int t = get_global_id(0), h = get_global_id(1), G = get_global_size(1) - H;
  const int position = positions[position_offset + t];
  if (position < 0) return;
  const int rotated = position < L ? R : 0;  // past the table: stored as it is
  cos_sin += cos_sin_offset + position * cos_sin_stride;
  if (h < H) {
    q += q_offset + t * q_stride + h * D;
    for (int i = 0; i < rotated / 2; i++) {
      const float a = q[FIRST(i)], b = q[SECOND(i)], c = cos_sin[i], s = cos_sin[R / 2 + i];
      q[FIRST(i)] = a * c - b * s;
      q[SECOND(i)] = b * c + a * s;
    }
    return;
  }
  const int g = h - H;
  const long at = slot(block_table + table_offset, table_stride, sequences, max_pages, P, seq_ids[seq_offset + t],
                       position, g, G, S, D);
  if (at < 0) return;
  k += k_offset + t * k_stride + g * D;
  v += v_offset + t * v_stride + g * D;
  k_pages += k_pages_offset + at;
  v_pages += v_pages_offset + at;
  for (int i = 0; i < rotated / 2; i++) {
    const float a = k[FIRST(i)], b = k[SECOND(i)], c = cos_sin[i], s = cos_sin[R / 2 + i];
    STORE(a * c - b * s, k_pages + FIRST(i));
    STORE(b * c + a * s, k_pages + SECOND(i));
  }
  for (int d = rotated; d < D; d++) STORE(k[d], k_pages + d);
  for (int d = 0; d < D; d++) STORE(v[d], v_pages + d);
}
