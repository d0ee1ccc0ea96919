// Sum and maximum of 16 lanes, as trees of depth 4.
//
// -DNO_SHUFFLES is for Oclgrind 21.10: its check for uninitialised memory takes lane 11 of any shuffle (.hi) for
// uninitialised, and it dies on shuffles with unused lanes, which its compiler makes of v.s0 + v.s1. There the lanes go
// through an array, which costs CPUs 15 scalar additions and as many moves.
#ifdef NO_SHUFFLES
#define TREE(F, v)                                                                        \
  F(F(F(F(v[0], v[8]), F(v[4], v[12])), F(F(v[2], v[10]), F(v[6], v[14]))),               \
    F(F(F(v[1], v[9]), F(v[5], v[13])), F(F(v[3], v[11]), F(v[7], v[15]))))
#define REDUCE(F, v)   \
  float lanes[16];     \
  vstore16(v, 0, lanes); \
  return TREE(F, lanes);
#else
#define REDUCE(F, v)                                                        \
  const float8 v8 = F(v.lo, v.hi);                                          \
  const float4 v4 = F(v8.lo, v8.hi);                                        \
  const float2 v2 = F(v4.lo, v4.hi);                                        \
  return F(v2.x, v2.y);
#endif
#define PLUS(a, b) ((a) + (b))

inline float sum16(float16 v) { REDUCE(PLUS, v) }

inline float max16(float16 v) { REDUCE(fmax, v) }

// The sums of 16 vectors, one per lane, by as many additions as a tree needs: 15 where 16 trees need 64.
inline float16 sums16(const float16 *v) {
#ifdef NO_SHUFFLES
  float sums[16];
  for (int i = 0; i < 16; i++) sums[i] = sum16(v[i]);
  return vload16(0, sums);
#else
  float16 a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = (float16)(v[2 * i].lo, v[2 * i + 1].lo) + (float16)(v[2 * i].hi, v[2 * i + 1].hi);
  for (int i = 0; i < 4; i++) {
    const float16 x = a[2 * i], y = a[2 * i + 1];
    b[i] = (float16)(x.s0123, x.s89ab, y.s0123, y.s89ab) + (float16)(x.s4567, x.scdef, y.s4567, y.scdef);
  }
  for (int i = 0; i < 2; i++) {
    const float16 x = b[2 * i], y = b[2 * i + 1];
    c[i] = (float16)(x.s014589cd, y.s014589cd) + (float16)(x.s2367abef, y.s2367abef);
  }
  return (float16)(c[0].even, c[1].even) + (float16)(c[0].odd, c[1].odd);
#endif
}

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(const __global float *x, int K, float eps) {
  float16 squares = 0.0f;
  int k = 0;
  for (; k + 16 <= K; k += 16) {
    const float16 v = vload16(0, x + k);
    squares = fma(v, v, squares);
  }
  float sum = sum16(squares);
  for (; k < K; k++) sum = fma(x[k], x[k], sum);
  return 1.0f / sqrt(sum / K + eps);
}
