// embedding and dequantize: rows of a packed weight (formats.h) as floats.

// The 32 rows of a tile at weights group * GROUP .. + GROUP, as slice[k, row].
inline void unpack_group(const __global ushort *p, int group, float *slice) {
#ifdef IS_FLOAT
  vstore16(FLOATS(group, 0), 0, slice);
  vstore16(FLOATS(group, 1), 1, slice);
#else
  p += (size_t)(group * GROUP / BLOCK) * WORDS * 32;
  const int g = group * GROUP % BLOCK / GROUP;
  float16 factor = SCALE(0, g), addend = ADDEND_OF(0, g);
#define KEEP(i, q, h)                                                                  \
  vstore16(fma(convert_float16(LOW(q)), factor, addend), h, slice + FIRST_OF(i) * 32); \
  vstore16(fma(convert_float16(UPPER(q)), factor, addend), h, slice + (FIRST_OF(i) + 2) * 32);
#define KEEP_A(i, q) KEEP(i, q, 0)
#define KEEP_B(i, q) KEEP(i, q, 1)
  EACH(g, 0, KEEP_A)
  factor = SCALE(1, g), addend = ADDEND_OF(1, g);
  EACH(g, 1, KEEP_B)
#endif
}

// Global size (groups of K, tokens).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void embedding(
    __global const int *token_ids, long ids_offset, __global const ushort *w, __global float *y, long y_offset,
    long y_stride, int V, int K, float scale) {
  const int group = get_group_id(0), t = get_group_id(1), id = token_ids[ids_offset + t];
  y += y_offset + t * y_stride + group * GROUP;
  if (id < 0 || id >= V) {
    for (int k = 0; k < GROUP; k++) y[k] = 0.0f;
    return;
  }
  float slice[GROUP * 32];
  unpack_group(TILE_AT(w, id / 32), group, slice);
  for (int k = 0; k < GROUP; k++) y[k] = slice[k * 32 + id % 32] * scale;
}

// Global size (groups of K, tiles).
__attribute__((reqd_work_group_size(1, 1, 1))) __kernel void dequantize(__global const ushort *w, __global float *y,
                                                                        long y_offset, long y_stride, int N, int K) {
  const int group = get_group_id(0), tile = get_group_id(1);
  float slice[GROUP * 32];
  unpack_group(TILE_AT(w, tile), group, slice);
  for (int r = 0; r < 32 && tile * 32 + r < N; r++)
    for (int k = 0; k < GROUP; k++)
      y[y_offset + (tile * 32 + r) * y_stride + group * GROUP + k] = slice[k * 32 + r];
}
