// attention over a paged KV cache [pages, G, S, D] (16-bit or 32-bit floats), one row of q [H, D] per token and head.
//
// Online softmax (arXiv:1805.02867) over blocks of keys. -DD=head_dim -DR=query heads per KV head -DKV_HALF|KV_FLOAT,
// -DTILES: the kernel for many tokens, else those for a few. (Some runtimes count the local memory of a whole program.)

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

// Keys of each of `count` parts of n keys: no fewer than `least`, whole blocks of 16.
inline int part_length(int n, int count, int least) { return max(least, (n + 16 * count - 1) / (16 * count) * 16); }

#define LANE ((int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))

// The scores of a key for 16 rows, -infinity where a row does not see it.
inline float16 seen_score(float16 s, int key, int16 last, float scale, float softcap, int window) {
  s *= scale;
  if (softcap > 0.0f) s = softcap * tanh(s / softcap);
  int16 seen = last >= key;
  if (window > 0) seen &= last - window < key;
  return select((float16)(-INFINITY), s, seen);
}

#define ATTENTION_INPUT                                                                                          \
  __global const float *q, long q_offset, long q_stride, __global const kv_t *k_pages, long k_offset,            \
      __global const kv_t *v_pages, long v_offset, __global const int *block_table, long table_offset,           \
      long table_stride, __global const int *seq_ids, long seq_offset, __global const int *positions,            \
      long position_offset, __global float *y, long y_offset, long y_stride, int G, int S, int sequences, \
      int max_pages, int P, float scale, float softcap, int window


#define NOTHING_SEEN (-INFINITY)  // the largest score before the first

#ifndef TILES
// Few tokens: work-group (t, g, p) is token t with the R query heads of KV head g, so that keys and values are read once for
// all of them, and part p of the keys. Keys lie as they do in the cache, the lanes being head_dim.
//
// Where there is more than one part, `parts` [T, G, P, R, 2 + D] gets of each the largest score, the total weight and the
// weighted sum of the values; attention_merge makes y of them.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void attention_rows(ATTENTION_INPUT, int part_keys,
                                                                            __global float *parts) {
  const int t = get_group_id(0), g = get_group_id(1), part = get_group_id(2), part_count = get_num_groups(2);
  const int seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
  y += y_offset + t * y_stride + g * R * D;
  const __global int *table = block_table + table_offset + seq * table_stride;
  if (seq < 0 || seq >= sequences || !has_keys(table, position, window, S, max_pages, P)) {
    for (int d = 0; d < R * D; d++) y[d] = seq < 0 ? 0.0f : NAN;
    return;
  }
  q += q_offset + t * q_stride + g * R * D;
  k_pages += k_offset;
  v_pages += v_offset;
  const int first = first_key(position, window), length = part_length(position + 1 - first, part_count, part_keys);
  const int begin = first + part * length, end = min(position + 1, begin + length);
  const int is_whole = first + length > position;
  if (is_whole && part) return;
  float largest[R], total[R];
  for (int r = 0; r < R; r++) largest[r] = NOTHING_SEEN, total[r] = 0.0f;
#if CHUNKS
  float16 query[R * CHUNKS], sums[R * CHUNKS];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < CHUNKS; c++) {
      query[r * CHUNKS + c] = vload16(c, q + r * D);
      sums[r * CHUNKS + c] = 0.0f;
    }
#endif
#if TAIL
  float tail[R * TAIL];
  for (int d = 0; d < R * TAIL; d++) tail[d] = 0.0f;
#endif
  for (int start = begin; start < end; start += 16) {
    const int count = min(16, end - start);
    float16 products[R * 16];  // of query and key j, still to be added up
    float scores[R * 16];
    for (int j = 0; j < 16; j++) {
      const __global kv_t *key = kv_row(k_pages, table, start + min(j, count - 1), g, G, S);
#if CHUNKS
      float16 row[CHUNKS];
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) row[c] = KV16(key + 16 * c);
#pragma unroll
      for (int r = 0; r < R; r++) {
        float16 sum = row[0] * query[r * CHUNKS];
#pragma unroll
        for (int c = 1; c < CHUNKS; c++) sum = fma(row[c], query[r * CHUNKS + c], sum);
        products[r * 16 + j] = sum;
      }
#endif
#if TAIL
      for (int r = 0; r < R; r++) {
        float sum = 0.0f;
        for (int d = 16 * CHUNKS; d < D; d++) sum = fma(KV1(key + d), q[r * D + d], sum);
        scores[r * 16 + j] = sum;
      }
#endif
    }
    for (int r = 0; r < R; r++) {
      float16 s = 0.0f;
#if CHUNKS
      s += sums16(products + r * 16);
#endif
#if TAIL
      s += vload16(r, scores);
#endif
      s *= scale;
      if (softcap > 0.0f) s = softcap * tanh(s / softcap);
      s = select((float16)(-INFINITY), s, LANE < count);
      const float next = fmax(largest[r], max16(s));
      const float shrink = exp(largest[r] - next);
      s = exp(s - next);
      vstore16(s, r, scores);
      total[r] = fma(total[r], shrink, sum16(s));
      largest[r] = next;
#if CHUNKS
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) sums[r * CHUNKS + c] *= shrink;
#endif
#if TAIL
      for (int d = 0; d < TAIL; d++) tail[r * TAIL + d] *= shrink;
#endif
    }
    for (int j = 0; j < count; j++) {
      const __global kv_t *value = kv_row(v_pages, table, start + j, g, G, S);
#if CHUNKS
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const float16 row = KV16(value + 16 * c);
#pragma unroll
        for (int r = 0; r < R; r++) sums[r * CHUNKS + c] = fma(row, (float16)(scores[r * 16 + j]), sums[r * CHUNKS + c]);
      }
#endif
#if TAIL
      for (int r = 0; r < R; r++)
        for (int d = 0; d < TAIL; d++)
          tail[r * TAIL + d] = fma(KV1(value + 16 * CHUNKS + d), scores[r * 16 + j], tail[r * TAIL + d]);
#endif
    }
  }
  const size_t heads = (((size_t)t * G + g) * part_count + part) * R;
  for (int r = 0; r < R; r++) {
    __global float *out = is_whole ? y + r * D : parts + (heads + r) * (2 + D) + 2;
    const float divisor = is_whole ? total[r] : 1.0f;
    if (!is_whole) out[-2] = largest[r], out[-1] = total[r];
#if CHUNKS
    for (int c = 0; c < CHUNKS; c++) vstore16(sums[r * CHUNKS + c] / divisor, c, out);
#endif
#if TAIL
    for (int d = 0; d < TAIL; d++) out[16 * CHUNKS + d] = tail[r * TAIL + d] / divisor;
#endif
  }
}

// y from the parts that attention_rows left. Global size (T): a work-group does all heads, whose work is less than what
// waking another thread takes.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void attention_merge(
    __global float *y, long y_offset, long y_stride, __global const int *seq_ids, long seq_offset,
    __global const int *positions, long position_offset, __global const int *block_table, long table_offset,
    long table_stride, int G, int S, int sequences, int max_pages, int P, int window, int part_count,
    int part_keys, __global const float *parts) {
  const int t = get_group_id(0), seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
  const __global int *table = block_table + table_offset + seq * table_stride;
  if (seq < 0 || seq >= sequences || !has_keys(table, position, window, S, max_pages, P)) return;  // y is complete
  const int n = position + 1 - first_key(position, window);
  if (part_length(n, part_count, part_keys) >= n) return;  // here too
  y += y_offset + t * y_stride;
  for (int h = 0; h < G * R; h++, y += D) {
    const int g = h / R, r = h - g * R;
    const __global float *part = parts + (((size_t)t * G + g) * part_count * R + r) * (2 + D);
    const size_t next = (size_t)R * (2 + D);
    float largest = NOTHING_SEEN, total = 0.0f;
    for (int i = 0; i < part_count; i++) largest = fmax(largest, part[i * next]);
    for (int i = 0; i < part_count; i++) {
      const float share = exp(part[i * next] - largest);
      total = fma(share, part[i * next + 1], total);
      for (int d = 0; d < D; d++) y[d] = fma(share, part[i * next + 2 + d], i ? y[d] : 0.0f);
    }
    for (int d = 0; d < D; d++) y[d] /= total;
  }
}

#else
// Many tokens: work-group (i, g) is 32 rows of KV head g, a row being a token and one of its R query heads. The lanes are
// rows: a key is broadcast to all of them, so that neither scores nor weights need sums or maxima across lanes. The rows
// may belong to several sequences; each run of one sequence is done by itself, the other rows seeing none of its keys.
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void attention_tiles(ATTENTION_INPUT, int T) {
  __local float queries[D * 32], sums[D * 32], keys[KEYS * D], values[KEYS * D], weights[KEYS * 32];
  int seqs[32], last[32];  // last: the last key that a row sees; -1 for one that lacks keys or that does not exist
  const int g = get_group_id(1), tile = get_group_id(0) * 32, rows = min(32, T * R - tile);
  k_pages += k_offset;
  v_pages += v_offset;
  for (int i = 0; i < 32; i++) {
    // with %, compilers may write `freeze`, which Oclgrind does not know
    const int row = tile + min(i, rows - 1), t = row / R, h = g * R + row - t * R;
    const int seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
    const int is_known = i < rows && seq >= 0 && seq < sequences;
    seqs[i] = seq;
    last[i] = is_known && has_keys(block_table + table_offset + seq * table_stride, position, window, S, max_pages, P)
                  ? position : -1;
    for (int d = 0; d < D; d++) {
      queries[d * 32 + i] = q[q_offset + t * q_stride + h * D + d];
      sums[d * 32 + i] = 0.0f;
    }
  }
  float16 largest_a = NOTHING_SEEN, largest_b = NOTHING_SEEN, total_a = 0.0f, total_b = 0.0f;
  for (int begin = 0, end; begin < rows; begin = end) {
    const int seq = seqs[begin];
    const __global int *table = block_table + table_offset + seq * table_stride;
    int low = INT_MAX, high = -1, lasts[32];
    for (end = begin; end < rows && seqs[end] == seq; end++)
      if (last[end] >= 0) low = min(low, last[end]), high = max(high, last[end]);
    for (int i = 0; i < 32; i++) lasts[i] = i >= begin && i < end ? last[i] : -1;
    const int16 last_a = vload16(0, lasts), last_b = vload16(1, lasts);
    for (int start = first_key(low, window); start <= high; start += KEYS) {
      const int count = min(KEYS, high + 1 - start);
      for (int j = 0; j < KEYS; j++) {
        __local float *key = keys + j * D, *value = values + j * D;
        const int page = j < count ? table[(start + j) / S] : -1;
        // Between the windows of two rows there need not be a page: zeros, so that 0 * value is 0.
        if (page < 0 || page >= P) {
          for (int d = 0; d < D; d++) key[d] = value[d] = 0.0f;
          continue;
        }
        const __global kv_t *from_key = kv_row(k_pages, table, start + j, g, G, S);
        const __global kv_t *from_value = kv_row(v_pages, table, start + j, g, G, S);
        for (int c = 0; c < CHUNKS; c++) {
          vstore16(KV16(from_key + 16 * c), c, key);
          vstore16(KV16(from_value + 16 * c), c, value);
        }
        for (int d = 16 * CHUNKS; d < D; d++) {
          key[d] = KV1(from_key + d);
          value[d] = KV1(from_value + d);
        }
      }
      float16 next_a = largest_a, next_b = largest_b;
      for (int j = 0; j < count; j += 4) {
        float16 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = b[i] = 0.0f;
        for (int d = 0; d < D; d++) {
          const float16 qa = vload16(2 * d, queries), qb = vload16(2 * d + 1, queries);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            a[i] = fma(qa, (float16)(keys[(j + i) * D + d]), a[i]);
            b[i] = fma(qb, (float16)(keys[(j + i) * D + d]), b[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          a[i] = seen_score(a[i], start + j + i, last_a, scale, softcap, window);
          b[i] = seen_score(b[i], start + j + i, last_b, scale, softcap, window);
          vstore16(a[i], 2 * (j + i), weights);
          vstore16(b[i], 2 * (j + i) + 1, weights);
          next_a = fmax(next_a, a[i]);
          next_b = fmax(next_b, b[i]);
        }
      }
      // A row that has seen no key yet: exp(-inf + inf) would be NaN.
      const float16 from_a = select(next_a, (float16)(0.0f), next_a == NOTHING_SEEN);
      const float16 from_b = select(next_b, (float16)(0.0f), next_b == NOTHING_SEEN);
      const float16 shrink_a = exp(largest_a - from_a), shrink_b = exp(largest_b - from_b);
      largest_a = next_a;
      largest_b = next_b;
      total_a *= shrink_a;
      total_b *= shrink_b;
      for (int j = 0; j < count; j++) {
        const float16 a = exp(vload16(2 * j, weights) - from_a), b = exp(vload16(2 * j + 1, weights) - from_b);
        total_a += a;
        total_b += b;
        vstore16(a, 2 * j, weights);
        vstore16(b, 2 * j + 1, weights);
      }
      for (int d = 0; d < D; d += 4) {
        // Past head_dim the last number is repeated: the same sum, stored again.
        float16 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          a[i] = vload16(2 * min(d + i, D - 1), sums) * shrink_a;
          b[i] = vload16(2 * min(d + i, D - 1) + 1, sums) * shrink_b;
        }
        for (int j = 0; j < count; j++) {
          const float16 wa = vload16(2 * j, weights), wb = vload16(2 * j + 1, weights);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            a[i] = fma(wa, (float16)(values[j * D + min(d + i, D - 1)]), a[i]);
            b[i] = fma(wb, (float16)(values[j * D + min(d + i, D - 1)]), b[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          vstore16(a[i], 2 * min(d + i, D - 1), sums);
          vstore16(b[i], 2 * min(d + i, D - 1) + 1, sums);
        }
      }
    }
  }
  float totals[32];
  vstore16(total_a, 0, totals);
  vstore16(total_b, 1, totals);
  for (int i = 0; i < rows; i++) {
    const int t = (tile + i) / R, h = g * R + tile + i - t * R;
    // 0 / 0, a NaN, for a row that lacks keys
    for (int d = 0; d < D; d++)
      y[y_offset + t * y_stride + h * D + d] = seqs[i] < 0 ? 0.0f : sums[d * 32 + i] / totals[i];
  }
}
#endif
