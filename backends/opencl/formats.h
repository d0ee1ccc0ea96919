// One weight format, chosen by -DFORMAT_<name>: how a group of weights of one tile is read.
//
// A packed weight is tiles of 32 rows; inside a tile the 16-bit words of the file's blocks are transposed so that word i
// of all 32 rows lies together: word (b * WORDS + i) of row r is at ushort (b * WORDS + i) * 32 + r. One word is one
// 64-byte cache line, a tile is one sequential stream, and the packed size is the file's. Rows past N are zeros.
// Block layouts: ggml-common.h and ggml-quants.c of ggml-org/ggml at d99724f.
//
// From the format's declaration (formats.py, kernels/quant.py):
//   BLOCK  weights per block           WORDS  16-bit words per block
//   GROUP  weights per scale
//   LEVELS                   largest integer a block of 32 activations becomes
// Defined here:
//   HAS_MIN  the format adds a minimum per group
//   SCALE(h, g), MIN(h, g)   float16: factor and addend of group g for half h (rows 16h .. 16h+15)
//   EACH(g, F, FLUSH)        F(k, qa, qb) for the GROUP weights k of group g, as short16 of both halves, quants >= 0 or
//                            centred; FLUSH before a sum of products with |x| <= LEVELS could leave 16 bits
//   IS_FLOAT, FLOATS(k, h)   weights without blocks: float16 of column k
#define W(i) vload16(0, p + (i) * 32)
#define W2(i) vload16(0, p + (i) * 32 + 16)
#define LANES(x) ((ushort16)(x))
#define HALF(i, h) vload_half16(0, (const __global half *)(p + (i) * 32 + 16 * (h)))
#define BYTE(i, h) (((h) ? W2((i) / 2) : W((i) / 2)) >> LANES(8 * ((i) & 1)) & LANES(255))
#define NIBBLES(F, word, k0, k1, k2, k3)                                  \
  {                                                                       \
    const ushort16 va = W(word), vb = W2(word);                           \
    F(k0, as_short16(va & LANES(15)), as_short16(vb & LANES(15)))         \
    F(k1, as_short16(va >> LANES(4) & LANES(15)), as_short16(vb >> LANES(4) & LANES(15))) \
    F(k2, as_short16(va >> LANES(8) & LANES(15)), as_short16(vb >> LANES(8) & LANES(15))) \
    F(k3, as_short16(va >> LANES(12)), as_short16(vb >> LANES(12)))       \
  }
// a 4-bit field of v at shift s, with bit t of h on top
#define FIVE(v, s, h, t) as_short16((v >> LANES(s) & LANES(15)) | (h >> LANES(t) & LANES(1)) << LANES(4))

#if defined(FORMAT_Q4_0) || defined(FORMAT_Q4_1)
// quants are at most 15: 8 products with |x| <= 254 stay within 30480
#define SCALE(h, g) HALF(0, h)
#define HAS_MIN 1
#ifdef FORMAT_Q4_1
#define FIRST 2
#define MIN(h, g) HALF(1, h)
#else
#define FIRST 1
#define MIN(h, g) (-8.0f * HALF(0, h))
#endif
#define EACH(g, F, FLUSH)               \
  NIBBLES(F, FIRST + 0, 0, 16, 1, 17)   \
  NIBBLES(F, FIRST + 1, 2, 18, 3, 19)   \
  FLUSH                                 \
  NIBBLES(F, FIRST + 2, 4, 20, 5, 21)   \
  NIBBLES(F, FIRST + 3, 6, 22, 7, 23)   \
  FLUSH                                 \
  NIBBLES(F, FIRST + 4, 8, 24, 9, 25)   \
  NIBBLES(F, FIRST + 5, 10, 26, 11, 27) \
  FLUSH                                 \
  NIBBLES(F, FIRST + 6, 12, 28, 13, 29) \
  NIBBLES(F, FIRST + 7, 14, 30, 15, 31) \
  FLUSH

#elif defined(FORMAT_Q5_0) || defined(FORMAT_Q5_1)
// quants are at most 31: 4 products stay within 31496
#define SCALE(h, g) HALF(0, h)
#define HAS_MIN 1
#ifdef FORMAT_Q5_1
#define HIGH 2
#define MIN(h, g) HALF(1, h)
#else
#define HIGH 1
#define MIN(h, g) (-16.0f * HALF(0, h))
#endif
#define FIFTHS(F, j)                                                         \
  {                                                                          \
    const ushort16 va = W(HIGH + 2 + (j)), vb = W2(HIGH + 2 + (j));          \
    F(2 * (j), FIVE(va, 0, la, 2 * (j)), FIVE(vb, 0, lb, 2 * (j)))           \
    F(2 * (j) + 16, FIVE(va, 4, ha, 2 * (j)), FIVE(vb, 4, hb, 2 * (j)))      \
    F(2 * (j) + 1, FIVE(va, 8, la, 2 * (j) + 1), FIVE(vb, 8, lb, 2 * (j) + 1)) \
    F(2 * (j) + 17, FIVE(va, 12, ha, 2 * (j) + 1), FIVE(vb, 12, hb, 2 * (j) + 1)) \
  }
#define EACH(g, F, FLUSH)                                                        \
  {                                                                              \
    const ushort16 la = W(HIGH), lb = W2(HIGH), ha = W(HIGH + 1), hb = W2(HIGH + 1); \
    FIFTHS(F, 0) FLUSH FIFTHS(F, 1) FLUSH FIFTHS(F, 2) FLUSH FIFTHS(F, 3) FLUSH  \
    FIFTHS(F, 4) FLUSH FIFTHS(F, 5) FLUSH FIFTHS(F, 6) FLUSH FIFTHS(F, 7) FLUSH  \
  }

#elif defined(FORMAT_Q8_0)
// quants reach -128: 2 products with |x| <= 127 stay within 32512, and one by one they cost 2.5 times as much
#define HAS_MIN 0
#define SCALE(h, g) HALF(0, h)
#define MIN(h, g) ((float16)(0.0f))
#define PAIR(F, FLUSH, j)                                                                \
  {                                                                                      \
    const short16 va = as_short16(W(1 + (j))), vb = as_short16(W2(1 + (j)));             \
    F(2 * (j), va << (short16)(8) >> (short16)(8), vb << (short16)(8) >> (short16)(8))   \
    F(2 * (j) + 1, va >> (short16)(8), vb >> (short16)(8))                               \
    FLUSH                                                                                \
  }
#define EACH(g, F, FLUSH)                                                        \
  PAIR(F, FLUSH, 0) PAIR(F, FLUSH, 1) PAIR(F, FLUSH, 2) PAIR(F, FLUSH, 3)        \
  PAIR(F, FLUSH, 4) PAIR(F, FLUSH, 5) PAIR(F, FLUSH, 6) PAIR(F, FLUSH, 7)        \
  PAIR(F, FLUSH, 8) PAIR(F, FLUSH, 9) PAIR(F, FLUSH, 10) PAIR(F, FLUSH, 11)      \
  PAIR(F, FLUSH, 12) PAIR(F, FLUSH, 13) PAIR(F, FLUSH, 14) PAIR(F, FLUSH, 15)

#elif defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
// words: d, dmin, 12 bytes of 6-bit factors, (Q5_K: 32 bytes of high bits,) 128 bytes of nibbles. Bytes 32c .. 32c+31
// hold group 2c in their low and group 2c + 1 in their high nibbles.
#define HAS_MIN 1
#define SIX(i, h) BYTE(4 + (i), h)
#define FACTOR(h, g) \
  ((g) < 4 ? SIX(g, h) & LANES(63) : (SIX((g) + 4, h) & LANES(15)) | SIX((g) - 4, h) >> LANES(6) << LANES(4))
#define OFFSET(h, g) \
  ((g) < 4 ? SIX((g) + 4, h) & LANES(63) : SIX((g) + 4, h) >> LANES(4) | SIX(g, h) >> LANES(6) << LANES(4))
#define SCALE(h, g) (HALF(0, h) * convert_float16(FACTOR(h, g)))
#define MIN(h, g) (-HALF(1, h) * convert_float16(OFFSET(h, g)))
#ifdef FORMAT_Q4_K
#define TWO(F, g, j)                                                                             \
  {                                                                                              \
    const ushort16 va = W(8 + 16 * ((g) / 2) + (j)) >> LANES(4 * ((g) & 1));                     \
    const ushort16 vb = W2(8 + 16 * ((g) / 2) + (j)) >> LANES(4 * ((g) & 1));                    \
    F(2 * (j), as_short16(va & LANES(15)), as_short16(vb & LANES(15)))                           \
    F(2 * (j) + 1, as_short16(va >> LANES(8) & LANES(15)), as_short16(vb >> LANES(8) & LANES(15))) \
  }
#else
#define TWO(F, g, j)                                                                             \
  {                                                                                              \
    const ushort16 va = W(24 + 16 * ((g) / 2) + (j)) >> LANES(4 * ((g) & 1));                    \
    const ushort16 vb = W2(24 + 16 * ((g) / 2) + (j)) >> LANES(4 * ((g) & 1));                   \
    const ushort16 xa = W(8 + (j)) >> LANES(g), xb = W2(8 + (j)) >> LANES(g);                    \
    F(2 * (j), FIVE(va, 0, xa, 0), FIVE(vb, 0, xb, 0))                                           \
    F(2 * (j) + 1, FIVE(va, 8, xa, 8), FIVE(vb, 8, xb, 8))                                       \
  }
#endif
// Q4_K: 8 products of quants up to 15; Q5_K: 4 of quants up to 31
#ifdef FORMAT_Q4_K
#define FOUR(F, FLUSH, g, j) TWO(F, g, j) TWO(F, g, j + 1) TWO(F, g, j + 2) TWO(F, g, j + 3) FLUSH
#else
#define FOUR(F, FLUSH, g, j) TWO(F, g, j) TWO(F, g, j + 1) FLUSH TWO(F, g, j + 2) TWO(F, g, j + 3) FLUSH
#endif
#define EACH(g, F, FLUSH) \
  FOUR(F, FLUSH, g, 0) FOUR(F, FLUSH, g, 4) FOUR(F, FLUSH, g, 8) FOUR(F, FLUSH, g, 12)

#elif defined(FORMAT_Q6_K)
// words: 128 bytes of low nibbles, 64 of bit pairs, 16 int8 factors, d. Quants - 32 are at least -32: 4 products stay
// within 32512.
#define HAS_MIN 0
#define SCALE(h, g) (HALF(104, h) * convert_float16(as_short16(BYTE(192 + (g), h) << LANES(8)) >> (short16)(8)))
#define MIN(h, g) ((float16)(0.0f))
// group g: quarter r of half n, 16 weights from l = 16 * (g & 1) on
#define SIXTH(v, x, s) \
  (as_short16((v >> LANES(s) & LANES(15)) | (x >> LANES(s) & LANES(3)) << LANES(4)) - (short16)(32))
#define TWO(F, g, j)                                                                             \
  {                                                                                              \
    const int low = 32 * ((g) / 8) + 16 * ((g) / 2 & 1) + 8 * ((g) & 1) + (j);                   \
    const int high = 64 + 16 * ((g) / 8) + 8 * ((g) & 1) + (j);                                  \
    const ushort16 va = W(low) >> LANES(4 * ((g) / 4 & 1)), vb = W2(low) >> LANES(4 * ((g) / 4 & 1)); \
    const ushort16 xa = W(high) >> LANES(2 * ((g) / 2 & 3)), xb = W2(high) >> LANES(2 * ((g) / 2 & 3)); \
    F(2 * (j), SIXTH(va, xa, 0), SIXTH(vb, xb, 0))                                               \
    F(2 * (j) + 1, SIXTH(va, xa, 8), SIXTH(vb, xb, 8))                                           \
  }
#define EACH(g, F, FLUSH)                                                    \
  TWO(F, g, 0) TWO(F, g, 1) FLUSH TWO(F, g, 2) TWO(F, g, 3) FLUSH            \
  TWO(F, g, 4) TWO(F, g, 5) FLUSH TWO(F, g, 6) TWO(F, g, 7) FLUSH

#elif defined(FORMAT_F16)
#define IS_FLOAT 1
#define FLOATS(i, h) vload_half16(0, (const __global half *)(p + (size_t)(i) * 32 + 16 * (h)))
#elif defined(FORMAT_BF16)
#define IS_FLOAT 1
#define FLOATS(i, h) as_float16(convert_uint16(vload16(0, p + (size_t)(i) * 32 + 16 * (h))) << (uint16)(16))
#elif defined(FORMAT_F32)
// 32-bit words, transposed as such
#define IS_FLOAT 1
#define FLOATS(i, h) vload16(0, (const __global float *)p + (size_t)(i) * 32 + 16 * (h))
#endif

// The packed tile t of a weight w with K columns.
#define TILE_AT(w, t) ((w) + (size_t)(t)*WORDS * 32 * (K / BLOCK))
