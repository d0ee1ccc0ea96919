// attention over pages of one dtype: reader -> queries, keys and values -> online softmax -> writer. HALF_PAGES: float16.
// A launch does tokens first .. first + tokens - 1 and KV heads g0 .. g0 + heads - 1, in this order.

#if HALF_PAGES
typedef half NAME(page_t);
#define PAGE_VALUE(p, i) vload_half(i, p)
#else
typedef float NAME(page_t);
#define PAGE_VALUE(p, i) ((p)[i])
#endif
#undef HEAD_WORDS
#define HEAD_WORDS(D) (((D) + LANES - 1) / LANES)
#define NO_KEYS -1    // padding: zeros
#define LOST_KEYS -2  // a key that is nowhere: NaN

channel int NAME(attention_counts) __attribute__((depth(COUNT_FIFO)));
channel float16 NAME(attention_queries) __attribute__((depth(QUERY_FIFO)));
channel float16 NAME(attention_keys) __attribute__((depth(KEY_FIFO)));  // a key, its value, the next key ...
channel float16 NAME(attention_results) __attribute__((depth(QUERY_FIFO)));

inline word NAME(page_word)(__global const NAME(page_t) * p, int i, int D) {
  word v;
  UNROLL for (int l = 0; l < LANES; l++) v.lanes[l] = LANES * i + l < D ? PAGE_VALUE(p, LANES * i + l) : 0.0f;
  return v;
}

SINGLE __kernel void NAME(attention_read)(
    __global const float *restrict q, long q_offset, long q_stride, __global const NAME(page_t) *restrict k_pages,
    long k_offset, long k_stride, __global const NAME(page_t) *restrict v_pages, long v_offset, long v_stride,
    __global const int *restrict table, long table_offset, long table_stride, __global const int *restrict seq_ids,
    long seq_offset, __global const int *restrict positions, long position_offset, int kv_heads, int group, int head_dim,
    int page_size, int sequences, int max_pages, int pages, int window, int first, int tokens, int g0, int heads) {
  const int words = HEAD_WORDS(head_dim);
  for (int t = first; t < first + tokens; t++) {
    const int seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
    const int from = window && position >= window ? position - window + 1 : 0;
    int count = position - from + 1;
    if (seq < 0) {
      count = NO_KEYS;
    } else if (seq >= sequences || position < 0 || position >= max_pages * page_size) {
      count = LOST_KEYS;
    } else {
      for (int i = from / page_size; i <= position / page_size; i++) {
        const int page = table[table_offset + seq * table_stride + i];
        if (page < 0 || page >= pages) count = LOST_KEYS;
      }
    }
    for (int g = g0; g < g0 + heads; g++) {
      write_channel_intel(NAME(attention_counts), count);
      if (count > 0) {
        for (int h = 0; h < group; h++)
          for (int i = 0; i < words; i++)
            write_channel_intel(NAME(attention_queries),
                                row_word(q + q_offset + t * q_stride + (g * group + h) * head_dim, i, head_dim).all);
        for (int j = from; j < from + count; j++) {
          const long page = table[table_offset + seq * table_stride + j / page_size];
          const long inside = (long)(g * page_size + j % page_size) * head_dim;
          for (int i = 0; i < words; i++)
            write_channel_intel(NAME(attention_keys),
                                NAME(page_word)(k_pages + k_offset + page * k_stride + inside, i, head_dim).all);
          for (int i = 0; i < words; i++)
            write_channel_intel(NAME(attention_keys),
                                NAME(page_word)(v_pages + v_offset + page * v_stride + inside, i, head_dim).all);
        }
      }
    }
  }
}

SINGLE __kernel void NAME(attention)(int group, int head_dim, float scale, float softcap, int items) {
  const int words = HEAD_WORDS(head_dim);
  for (int item = 0; item < items; item++) {  // a token and a KV head
    const int count = read_channel_intel(NAME(attention_counts));
    float q[MAX_GROUP][MAX_HEAD_DIM], sum[MAX_GROUP][MAX_HEAD_DIM], top[MAX_GROUP], mass[MAX_GROUP];
    const float nothing = count == LOST_KEYS ? NAN : 0.0f;
    for (int h = 0; h < group; h++) {
      top[h] = -INFINITY;
      mass[h] = count > 0 ? 0.0f : 1.0f;
      for (int i = 0; i < words; i++) {
        word v;
        v.all = count > 0 ? read_channel_intel(NAME(attention_queries)) : (float16)(0.0f);
        UNROLL for (int l = 0; l < LANES; l++) {
          q[h][LANES * i + l] = v.lanes[l];
          sum[h][LANES * i + l] = nothing;
        }
      }
    }
    for (int j = 0; j < count; j++) {
      word key[MAX_HEAD_DIM / LANES], value[MAX_HEAD_DIM / LANES];
      for (int i = 0; i < words; i++) key[i].all = read_channel_intel(NAME(attention_keys));
      for (int i = 0; i < words; i++) value[i].all = read_channel_intel(NAME(attention_keys));
      for (int h = 0; h < group; h++) {
        float score = 0.0f;
        for (int i = 0; i < words; i++) {
          float product[LANES];
          UNROLL for (int l = 0; l < LANES; l++) product[l] = q[h][LANES * i + l] * key[i].lanes[l];
          score += tree(product);
        }
        score *= scale;
        if (softcap > 0.0f) score = softcap * tanh(score / softcap);
        const float highest = fmax(top[h], score);
        const float kept = exp(top[h] - highest), weight = exp(score - highest);
        top[h] = highest;
        mass[h] = mass[h] * kept + weight;
        for (int i = 0; i < words; i++)
          UNROLL for (int l = 0; l < LANES; l++)
              sum[h][LANES * i + l] = sum[h][LANES * i + l] * kept + weight * value[i].lanes[l];
      }
    }
    for (int h = 0; h < group; h++)
      for (int i = 0; i < words; i++) {
        word v;
        UNROLL for (int l = 0; l < LANES; l++) v.lanes[l] = sum[h][LANES * i + l] / mass[h];
        write_channel_intel(NAME(attention_results), v.all);
      }
  }
}

SINGLE __kernel void NAME(attention_write)(__global float *restrict y, long y_offset, long y_stride, int group,
                                           int head_dim, int first, int tokens, int g0, int heads) {
  for (int t = first; t < first + tokens; t++)
    for (int h = g0 * group; h < (g0 + heads) * group; h++)
      for (int i = 0; i < HEAD_WORDS(head_dim); i++) {
        word v;
        v.all = read_channel_intel(NAME(attention_results));
        UNROLL for (int l = 0; l < LANES; l++)
          if (LANES * i + l < head_dim) y[y_offset + t * y_stride + h * head_dim + LANES * i + l] = v.lanes[l];
      }
}

SINGLE __kernel void NAME(kv_append)(
    __global const float *restrict k, long k_offset, long k_stride, __global const float *restrict v, long v_offset,
    long v_stride, __global const int *restrict table, long table_offset, long table_stride,
    __global const int *restrict seq_ids, long seq_offset, __global const int *restrict positions, long position_offset,
    __global NAME(page_t) *restrict k_pages, long k_pages_offset, long k_pages_stride,
    __global NAME(page_t) *restrict v_pages, long v_pages_offset, long v_pages_stride, int tokens, int kv_heads,
    int head_dim, int page_size, int sequences, int max_pages, int pages) {
  for (int t = 0; t < tokens; t++) {
    const int seq = seq_ids[seq_offset + t], position = positions[position_offset + t];
    if (seq < 0 || seq >= sequences || position < 0 || position >= max_pages * page_size) continue;
    const long page = table[table_offset + seq * table_stride + position / page_size];
    if (page < 0 || page >= pages) continue;
    for (int g = 0; g < kv_heads; g++)
      for (int d = 0; d < head_dim; d++) {
        const long inside = (long)(g * page_size + position % page_size) * head_dim + d;
        const float key = k[k_offset + t * k_stride + g * head_dim + d], value = v[v_offset + t * v_stride + g * head_dim + d];
#if HALF_PAGES
        vstore_half_rte(key, k_pages_offset + page * k_pages_stride + inside, k_pages);
        vstore_half_rte(value, v_pages_offset + page * v_pages_stride + inside, v_pages);
#else
        k_pages[k_pages_offset + page * k_pages_stride + inside] = key;
        v_pages[v_pages_offset + page * v_pages_stride + inside] = value;
#endif
      }
  }
}
