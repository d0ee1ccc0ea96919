// One weight format, chosen by FORMAT; included (as text) once for each format of a program, with SUFFIX naming it.
// Beats and headers: ../README.md, "Beats of one row".
//   BITS    of a stored weight          ZERO   what is subtracted from it
//   HEADER  what a header beat holds    GROUP  weight beats behind a header beat
#undef BITS
#undef ZERO
#undef HEADER
#undef GROUP
#undef WEIGHTS
#undef BLOCKS
#undef WORDS

#define NO_HEADER 0
#define SCALES 1        // S of ../README.md
#define SCALES_MINIMA 2  // SM
#define SUPER 3         // K
#define SUPER_16 4      // K6

#define Q4_0 1
#define Q4_1 2
#define Q4_K 3
#define Q8_0 4
#define Q5_0 5
#define Q5_1 6
#define Q5_K 7
#define Q6_K 8
#define F16 9
#define BF16 10
#define F32 11

#if FORMAT == Q4_0
#define BITS 4
#define ZERO 8
#define HEADER SCALES
#define GROUP 8
#elif FORMAT == Q4_1
#define BITS 4
#define ZERO 0
#define HEADER SCALES_MINIMA
#define GROUP 4
#elif FORMAT == Q4_K
#define BITS 4
#define ZERO 0
#define HEADER SUPER
#define GROUP 8
#elif FORMAT == Q8_0 || FORMAT == Q5_0
#define BITS 8
#define ZERO 0
#define HEADER SCALES
#define GROUP 16
#elif FORMAT == Q5_1
#define BITS 8
#define ZERO 0
#define HEADER SCALES_MINIMA
#define GROUP 8
#elif FORMAT == Q5_K
#define BITS 8
#define ZERO 0
#define HEADER SUPER
#define GROUP 16
#elif FORMAT == Q6_K
#define BITS 8
#define ZERO 0
#define HEADER SUPER_16
#define GROUP 8
#elif FORMAT == F32
#define BITS 32
#define HEADER NO_HEADER
#else
#define BITS 16
#define HEADER NO_HEADER
#endif

#define WEIGHTS (512 / BITS)     // in a beat
#define BLOCKS (WEIGHTS / 32)    // in a beat, of formats with a header
#define WORDS (WEIGHTS / LANES)  // in a beat

#if HEADER != NO_HEADER
// Factors of a block of 32: weight = float(q sub) d + float(submin) m, sub being that of the half of 16.
typedef struct {
  float d, m;
  int sub[2], submin;
} NAME(factors);

// Block b behind a header.
inline NAME(factors) NAME(block_factors)(const beat *header, int b) {
  NAME(factors) f;
  f.m = 0.0f;
  f.sub[0] = f.sub[1] = f.submin = 1;
#if HEADER == SCALES
  f.d = half_value(header->halves[b]);
#elif HEADER == SCALES_MINIMA
  f.d = half_value(header->halves[2 * b]);
  f.m = half_value(header->halves[2 * b + 1]);
#elif HEADER == SUPER
  const int super = b / 8, j = b % 8, bit = 32 + 12 * j;  // 12 bits, which may cross into the next word
  const uint low = header->words[4 * super + bit / 32], high = header->words[4 * super + (bit + 11) / 32];
  const uint both = (uint)((((ulong)high << 32 | low) >> (bit % 32)) & 4095);
  f.d = half_value(header->halves[8 * super]);
  f.m = half_value(header->halves[8 * super + 1]);
  f.sub[0] = f.sub[1] = both & 63;
  f.submin = both >> 6;
#elif HEADER == SUPER_16
  const int super = b / 8, at = 32 * super + 2 + 2 * (b % 8);
  f.d = half_value(header->halves[16 * super]);
  f.sub[0] = (char)header->bytes[at];
  f.sub[1] = (char)header->bytes[at + 1];
#endif
  return f;
}

// The integers of a beat.
inline void NAME(integers)(const beat *b, char *q) {
#if BITS == 4
  UNROLL for (int i = 0; i < 64; i++) {
    q[2 * i] = (char)(b->bytes[i] & 15) - ZERO;
    q[2 * i + 1] = (char)(b->bytes[i] >> 4) - ZERO;
  }
#else
  UNROLL for (int i = 0; i < 64; i++) q[i] = (char)b->bytes[i];
#endif
}
#endif

// The weights of weight beat i of a row as float32, rounded as the reference rounds them.
inline void NAME(floats)(const beat *header, const beat *b, int i, float *out) {
#if FORMAT == F32
  UNROLL for (int l = 0; l < WEIGHTS; l++) out[l] = b->floats[l];
#elif FORMAT == F16
  UNROLL for (int l = 0; l < WEIGHTS; l++) out[l] = half_value(b->halves[l]);
#elif FORMAT == BF16
  UNROLL for (int l = 0; l < WEIGHTS; l++) out[l] = as_float((uint)b->halves[l] << 16);
#else
  char q[WEIGHTS];
  NAME(integers)(b, q);
  UNROLL for (int j = 0; j < BLOCKS; j++) {
    const NAME(factors) f = NAME(block_factors)(header, i % GROUP * BLOCKS + j);
    const float addend = (float)f.submin * f.m;
    UNROLL for (int l = 0; l < 32; l++) {
      const float product = (float)(q[32 * j + l] * f.sub[l / 16]) * f.d;
      out[32 * j + l] = HEADER == SCALES_MINIMA || HEADER == SUPER ? product + addend : product;
    }
  }
#endif
}

// Whether weight beat i of a row stands behind a new header beat.
#if HEADER == NO_HEADER
#define STARTS_GROUP(i) 0
#else
#define STARTS_GROUP(i) ((i) % GROUP == 0)
#endif
