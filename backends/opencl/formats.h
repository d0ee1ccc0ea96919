// One weight format, chosen by -DFORMAT_<name>: how a group of weights of one tile is read.
//
// A packed weight is tiles of 32 rows; inside a tile the words of the file's blocks are transposed, so that word i of
// all 32 rows lies together: scales as 16-bit words, quants as 32-bit ones. At ushort (b * WORDS + i) * 32 of a tile
// begins word i of block b, 64 bytes of it (two words of quants: 128). A vector of 16 ints is 4 bytes of 16 rows, a tile
// is one sequential stream, and the packed size is the file's. Rows past N are zeros.
// Block layouts: ggml-common.h and ggml-quants.c of ggml-org/ggml at d99724f; what `pack` changes in them: formats.py.
//
// Quants come in pairs, two weights in the 16-bit fields of an int, because CPUs have an instruction that multiplies
// pairs and adds both products (vpmaddwd; with AVX512-VNNI vpdpwssd, which accumulates too). Of four bytes the first and
// the third are such fields without any moving, and so are the second and the fourth: pair i of a group is its weights
// FIRST_OF(i) and FIRST_OF(i) + 2. Sums are 32 bits wide: nothing overflows with 15-bit activations.
//
// From the format's declaration (formats.py, kernels/quant.py):
//   BLOCK  weights per block           WORDS  16-bit words per block
//   GROUP  weights per scale           OFFSET by how much quants are too large
//   LEVELS largest integer a block of 32 activations becomes
// Defined here:
//   HAS_MIN  the format adds a minimum per group
//   SCALE(h, g), MIN(h, g)   float16: factor and addend of group g for half h (rows 16h .. 16h+15)
//   EACH(g, h, F)            F(i, q) for the GROUP / 2 pairs i of group g, in any order, q being int16
//   IS_FLOAT, FLOATS(k, h)   weights without blocks: float16 of column k
#define FIRST_OF(i) (2 * (i) - ((i) & 1))
#define HALF(i, h) vload_half16(h, (const __global half *)(p + (i) * 32))
#define BYTE(i, h) (convert_int16(vload16(h, p + (i) / 2 * 32)) >> (int16)(8 * ((i) & 1)) & (int16)(255))
#define INTS(i, h) vload16(h, (const __global int *)(p + (i) * 32))
// the fields at bits s and 16 + s of v
#define FIELDS(v, s, mask) ((v) >> (int16)(s) & (int16)((mask) << 16 | (mask)))

#if defined(FORMAT_Q4_0) || defined(FORMAT_Q4_1)
#define SCALE(h, g) HALF(0, h)
#ifdef FORMAT_Q4_1
#define HAS_MIN 1
#define QUANTS 2
#define MIN(h, g) HALF(1, h)
#else
#define HAS_MIN 0
#define QUANTS 1
#endif
// low nibbles are the first 16 weights, high ones the last
#define NIBBLES(F, h, j)                     \
  {                                          \
    const int16 v = INTS(QUANTS + 2 * (j), h); \
    F(2 * (j), FIELDS(v, 0, 15))             \
    F(2 * (j) + 8, FIELDS(v, 4, 15))         \
    F(2 * (j) + 1, FIELDS(v, 8, 15))         \
    F(2 * (j) + 9, FIELDS(v, 12, 15))        \
  }
#define EACH(g, h, F) NIBBLES(F, h, 0) NIBBLES(F, h, 1) NIBBLES(F, h, 2) NIBBLES(F, h, 3)

#elif defined(FORMAT_Q5_0) || defined(FORMAT_Q5_1)
#define SCALE(h, g) HALF(0, h)
#ifdef FORMAT_Q5_1
#define HAS_MIN 1
#define HIGH 2
#define MIN(h, g) HALF(1, h)
#else
#define HAS_MIN 0
#define HIGH 1
#endif
// as packed, bits i and 16 + i of the high bits belong to pair i
#define FIFTH(i, v, s) (FIELDS(v, s, 15) | FIELDS(high, i, 1) << (int16)(4))
#define FIFTHS(F, h, j)                          \
  {                                              \
    const int16 v = INTS(HIGH + 2 + 2 * (j), h); \
    F(2 * (j), FIFTH(2 * (j), v, 0))             \
    F(2 * (j) + 8, FIFTH(2 * (j) + 8, v, 4))     \
    F(2 * (j) + 1, FIFTH(2 * (j) + 1, v, 8))     \
    F(2 * (j) + 9, FIFTH(2 * (j) + 9, v, 12))    \
  }
#define EACH(g, h, F)                                                      \
  {                                                                        \
    const int16 high = INTS(HIGH, h);                                      \
    FIFTHS(F, h, 0) FIFTHS(F, h, 1) FIFTHS(F, h, 2) FIFTHS(F, h, 3)        \
  }

#elif defined(FORMAT_Q8_0)
#define HAS_MIN 0
#define SCALE(h, g) HALF(0, h)
#define BYTES(F, h, j)                    \
  {                                       \
    const int16 v = INTS(1 + 2 * (j), h); \
    F(2 * (j), FIELDS(v, 0, 255))         \
    F(2 * (j) + 1, FIELDS(v, 8, 255))     \
  }
#define EACH(g, h, F)                                                   \
  BYTES(F, h, 0) BYTES(F, h, 1) BYTES(F, h, 2) BYTES(F, h, 3)           \
  BYTES(F, h, 4) BYTES(F, h, 5) BYTES(F, h, 6) BYTES(F, h, 7)

#elif defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
// words: d, dmin, 12 bytes of 6-bit factors, (Q5_K: 32 bytes of high bits,) 128 bytes of nibbles. Bytes 32c .. 32c+31
// hold group 2c in their low and group 2c + 1 in their high nibbles; bit g of the high bits is that of group g.
#define HAS_MIN 1
#define SIX(i, h) BYTE(4 + (i), h)
#define TOP(v) ((v) >> (int16)(6) << (int16)(4))
#define FACTOR(h, g) \
  ((g) < 4 ? SIX(g, h) & (int16)(63) : (SIX((g) + 4, h) & (int16)(15)) | TOP(SIX((g) - 4, h)))
#define SECOND(h, g) ((g) < 4 ? SIX((g) + 4, h) & (int16)(63) : SIX((g) + 4, h) >> (int16)(4) | TOP(SIX(g, h)))
#define SCALE(h, g) (HALF(0, h) * convert_float16(FACTOR(h, g)))
#define MIN(h, g) (-HALF(1, h) * convert_float16(SECOND(h, g)))
#ifdef FORMAT_Q4_K
#define QUANTS 8
#define WITH_HIGH(v, g, h, j, s) (v)
#else
#define QUANTS 24
#define WITH_HIGH(v, g, h, j, s) ((v) | FIELDS(INTS(8 + 2 * (j), h), (g) + (s), 1) << (int16)(4))
#endif
#define NIBBLES(F, g, h, j)                                                                  \
  {                                                                                          \
    const int16 v = INTS(QUANTS + 16 * ((g) / 2) + 2 * (j), h) >> (int16)(4 * ((g) & 1));    \
    F(2 * (j), WITH_HIGH(FIELDS(v, 0, 15), g, h, j, 0))                                      \
    F(2 * (j) + 1, WITH_HIGH(FIELDS(v, 8, 15), g, h, j, 8))                                  \
  }
#define EACH(g, h, F)                                                                       \
  NIBBLES(F, g, h, 0) NIBBLES(F, g, h, 1) NIBBLES(F, g, h, 2) NIBBLES(F, g, h, 3)           \
  NIBBLES(F, g, h, 4) NIBBLES(F, g, h, 5) NIBBLES(F, g, h, 6) NIBBLES(F, g, h, 7)

#elif defined(FORMAT_Q6_K)
// words: 128 bytes of low nibbles, 64 of bit pairs, 16 int8 factors, d
#define HAS_MIN 0
#define SCALE(h, g) (HALF(104, h) * convert_float16(BYTE(192 + (g), h) << (int16)(24) >> (int16)(24)))
// group g: quarter g / 2 & 3 of half g / 8, 16 weights from 16 * (g & 1) on
#define LOW_WORD(g) (32 * ((g) / 8) + 16 * ((g) / 2 & 1) + 8 * ((g) & 1))
#define HIGH_WORD(g) (64 + 16 * ((g) / 8) + 8 * ((g) & 1))
#define SIXTHS(F, g, h, j)                                                              \
  {                                                                                     \
    const int16 v = INTS(LOW_WORD(g) + 2 * (j), h) >> (int16)(4 * ((g) / 4 & 1));       \
    const int16 top = INTS(HIGH_WORD(g) + 2 * (j), h) >> (int16)(2 * ((g) / 2 & 3));      \
    F(2 * (j), FIELDS(v, 0, 15) | FIELDS(top, 0, 3) << (int16)(4))                        \
    F(2 * (j) + 1, FIELDS(v, 8, 15) | FIELDS(top, 8, 3) << (int16)(4))                    \
  }
#define EACH(g, h, F) SIXTHS(F, g, h, 0) SIXTHS(F, g, h, 1) SIXTHS(F, g, h, 2) SIXTHS(F, g, h, 3)

#elif defined(FORMAT_F16)
#define IS_FLOAT 1
#define FLOATS(i, h) vload_half16(h, (const __global half *)(p + (size_t)(i) * 32))
#elif defined(FORMAT_BF16)
#define IS_FLOAT 1
#define FLOATS(i, h) as_float16(convert_uint16(vload16(h, p + (size_t)(i) * 32)) << (uint16)(16))
#elif defined(FORMAT_F32)
// 32-bit words, transposed as such
#define IS_FLOAT 1
#define FLOATS(i, h) vload16(h, (const __global float *)p + (size_t)(i) * 32)
#endif

// The packed tile t of a weight w with K columns.
#define TILE_AT(w, t) ((w) + (size_t)(t)*WORDS * 32 * (K / BLOCK))

#ifndef IS_FLOAT
// The weights of a pair, as integers.
#define LOW(q) (((q) & (int16)(0xffff)) - (int16)(OFFSET))
#define UPPER(q) (((q) >> (int16)(16)) - (int16)(OFFSET))

#if HAS_MIN
#define ADDEND_OF(h, g) MIN(h, g)
#else
#define ADDEND_OF(h, g) 0.0f
#endif
#endif
