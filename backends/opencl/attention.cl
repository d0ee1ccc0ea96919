// attention over a paged KV cache [pages, G, S, D] (16-bit or 32-bit floats), one row of q [H, D] per token and head.
//
// Online softmax (arXiv:1805.02867) over blocks of 16 keys. -DD=head_dim -DTILE=tokens -DKV_HALF|KV_FLOAT.

#ifdef KV_HALF
typedef half kv_t;
#define KV16(p) vload_half16(0, p)
#define KV1(p) vload_half(0, p)
#else
typedef float kv_t;
#define KV16(p) vload16(0, p)
#define KV1(p) (*(p))
#endif
#define CHUNKS (D / 16)
#define TAIL (D % 16)

// Row of key or value j of one sequence and KV head.
inline const __global kv_t *kv_row(const __global kv_t *pages, const __global int *table, int j, int g, int G, int S) {
  return pages + (((size_t)table[j / S] * G + g) * S + j % S) * D;
}

inline int first_key(int position, int window) { return window > 0 ? max(0, position - window + 1) : 0; }

// Whether all keys that a query sees are in the cache of P pages: nothing else may be looked up.
inline int has_keys(const __global int *table, int position, int window, int S, int max_pages, int P) {
  if (position < 0 || position / S >= max_pages) return 0;
  for (int i = first_key(position, window) / S; i <= position / S; i++)
    if (table[i] < 0 || table[i] >= P) return 0;
  return 1;
}

#define ATTENTION_INPUT                                                                                          \
  __global const float *q, long q_offset, long q_stride, __global const kv_t *k_pages, long k_offset,            \
      __global const kv_t *v_pages, long v_offset, __global const int *block_table, long table_offset,           \
      long table_stride, __global const int *seq_ids, long seq_offset, __global const int *positions,            \
      long position_offset, __global float *y, long y_offset, long y_stride, int H, int G, int S, int sequences, \
      int max_pages, int P, float scale, float softcap, int window

// Global size (T, H): one query each, keys as rows.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void attention_rows(ATTENTION_INPUT) {
  const int t = get_group_id(0), h = get_group_id(1), g = h / (H / G);
  const int seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
  y += y_offset + t * y_stride + h * D;
  const __global int *table = block_table + table_offset + seq * table_stride;
  if (seq < 0 || seq >= sequences || !has_keys(table, position, window, S, max_pages, P)) {
    for (int d = 0; d < D; d++) y[d] = seq < 0 ? 0.0f : NAN;
    return;
  }
  q += q_offset + t * q_stride + h * D;
  k_pages += k_offset;
  v_pages += v_offset;
#if CHUNKS
  float16 query[CHUNKS], sums[CHUNKS];
  for (int c = 0; c < CHUNKS; c++) {
    query[c] = vload16(c, q);
    sums[c] = 0.0f;
  }
#endif
#if TAIL
  float tail[TAIL];
  for (int d = 0; d < TAIL; d++) tail[d] = 0.0f;
#endif
  float largest = -INFINITY, total = 0.0f;
  for (int start = first_key(position, window); start <= position; start += 16) {
    const int count = min(16, position + 1 - start);
    float scores[16];
    for (int j = 0; j < 16; j++) {
      if (j >= count) {
        scores[j] = -INFINITY;
        continue;
      }
      const __global kv_t *key = kv_row(k_pages, table, start + j, g, G, S);
      float s = 0.0f;
#if CHUNKS
      float16 products = 0.0f;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) products = fma(KV16(key + 16 * c), query[c], products);
      s = sum16(products);
#endif
#if TAIL
      for (int d = 0; d < TAIL; d++) s = fma(KV1(key + 16 * CHUNKS + d), q[16 * CHUNKS + d], s);
#endif
      s *= scale;
      scores[j] = softcap > 0.0f ? softcap * tanh(s / softcap) : s;
    }
    float16 block = vload16(0, scores);
    const float next = fmax(largest, max16(block));
    const float shrink = exp(largest - next);
    block = exp(block - next);
    vstore16(block, 0, scores);
    total = fma(total, shrink, sum16(block));
    largest = next;
#if CHUNKS
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) sums[c] *= shrink;
#endif
#if TAIL
    for (int d = 0; d < TAIL; d++) tail[d] *= shrink;
#endif
    for (int j = 0; j < count; j++) {
      const __global kv_t *value = kv_row(v_pages, table, start + j, g, G, S);
#if CHUNKS
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) sums[c] = fma(KV16(value + 16 * c), (float16)(scores[j]), sums[c]);
#endif
#if TAIL
      for (int d = 0; d < TAIL; d++) tail[d] = fma(KV1(value + 16 * CHUNKS + d), scores[j], tail[d]);
#endif
    }
  }
#if CHUNKS
  for (int c = 0; c < CHUNKS; c++) vstore16(sums[c] / total, c, y);
#endif
#if TAIL
  for (int d = 0; d < TAIL; d++) y[16 * CHUNKS + d] = tail[d] / total;
#endif
}

// Many queries: TILE tokens of one head share each block of 16 keys, transposed once so that a key is a lane and a score
// needs no horizontal sum. A tile may span sequences; each run of one sequence is done by itself.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void attention_tiles(ATTENTION_INPUT, int T) {
  __local float keys[D * 16], values[16 * D], weights[TILE * 16];
  float largest[TILE], total[TILE];
  int last[TILE];  // the last key that a query sees; -1 for one that lacks keys, whose result is then 0 / 0, a NaN
  const int h = get_group_id(1), g = h / (H / G);
  const int tile = get_group_id(0) * TILE, stop = min(T, tile + TILE);
  q += q_offset + h * D;
  y += y_offset + h * D;
  k_pages += k_offset;
  v_pages += v_offset;
  seq_ids += seq_offset;
  positions += position_offset;
  for (int begin = tile, end; begin < stop; begin = end) {
    const int seq = seq_ids[begin], is_known = seq >= 0 && seq < sequences;
    const __global int *table = block_table + table_offset + seq * table_stride;
    int low = INT_MAX, high = -1;
    for (end = begin; end < stop && seq_ids[end] == seq; end++) {
      const int position = positions[end];
      last[end - tile] = -1;
      if (!is_known || !has_keys(table, position, window, S, max_pages, P)) continue;
      last[end - tile] = position;
      low = min(low, position);
      high = max(high, position);
    }
    for (int t = begin; t < end; t++) {
      largest[t - tile] = -INFINITY;
      total[t - tile] = 0.0f;
      for (int d = 0; d < D; d++) y[t * y_stride + d] = 0.0f;
    }
    if (seq < 0) continue;
    for (int start = first_key(low, window); start <= high; start += 16) {
      // Slots past the last query's own hold whatever was there before, and between the windows of two queries there need
      // not be a page: zeros, so that 0 * value is 0.
      for (int j = 0; j < 16; j++) {
        if (start + j <= high && table[(start + j) / S] >= 0 && table[(start + j) / S] < P) {
          const __global kv_t *key = kv_row(k_pages, table, start + j, g, G, S);
          const __global kv_t *value = kv_row(v_pages, table, start + j, g, G, S);
          for (int c = 0; c < CHUNKS; c++) {
            float row[16];
            vstore16(KV16(key + 16 * c), 0, row);
            for (int i = 0; i < 16; i++) keys[(16 * c + i) * 16 + j] = row[i];
            vstore16(KV16(value + 16 * c), 0, values + j * D + 16 * c);
          }
          for (int d = 16 * CHUNKS; d < D; d++) {
            keys[d * 16 + j] = KV1(key + d);
            values[j * D + d] = KV1(value + d);
          }
        } else {
          for (int d = 0; d < D; d++) keys[d * 16 + j] = values[j * D + d] = 0.0f;
        }
      }
      const int16 lane = (int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) + start;
      for (int t = begin; t < end; t += 4) {
        // Four queries share a load of the keys; past the end the last one is repeated and not stored.
        const __global float *q0 = q + t * q_stride, *q1 = q + min(t + 1, end - 1) * q_stride;
        const __global float *q2 = q + min(t + 2, end - 1) * q_stride, *q3 = q + min(t + 3, end - 1) * q_stride;
        float16 scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int d = 0; d < D; d++) {
          const float16 key = vload16(d, keys);
          scores[0] = fma(key, (float16)(q0[d]), scores[0]);
          scores[1] = fma(key, (float16)(q1[d]), scores[1]);
          scores[2] = fma(key, (float16)(q2[d]), scores[2]);
          scores[3] = fma(key, (float16)(q3[d]), scores[3]);
        }
        for (int i = 0; i < 4 && t + i < end; i++) {
          const int r = t + i - tile, position = last[r];
          float16 s = scores[i] * scale;
          if (softcap > 0.0f) s = softcap * tanh(s / softcap);
          int16 seen = lane <= position;
          if (window > 0) seen &= lane > position - window;
          s = select((float16)(-INFINITY), s, seen);
          const float next = fmax(largest[r], max16(s));
          // A block that this query does not see at all, before any it does see: exp(-inf + inf) would be NaN.
          const float shrink = next == -INFINITY ? 1.0f : exp(largest[r] - next);
          s = next == -INFINITY ? (float16)(0.0f) : exp(s - next);
          vstore16(s, r, weights);
          total[r] = fma(total[r], shrink, sum16(s));
          largest[r] = next;
          if (shrink != 1.0f)
            for (int d = 0; d < D; d++) y[(t + i) * y_stride + d] *= shrink;
        }
      }
      for (int t = begin; t < end; t++) {
        __global float *out = y + t * y_stride;
        const __local float *weight = weights + (t - tile) * 16;
#if CHUNKS
        for (int c = 0; c < CHUNKS; c++) {
          float16 sum = vload16(c, out);
#pragma unroll
          for (int j = 0; j < 16; j++) sum = fma(vload16(0, values + j * D + 16 * c), (float16)(weight[j]), sum);
          vstore16(sum, c, out);
        }
#endif
        for (int d = 16 * CHUNKS; d < D; d++)
          for (int j = 0; j < 16; j++) out[d] = fma(values[j * D + d], weight[j], out[d]);
      }
    }
    for (int t = begin; t < end; t++)
      for (int d = 0; d < D; d++) y[t * y_stride + d] /= total[t - tile];
  }
}
