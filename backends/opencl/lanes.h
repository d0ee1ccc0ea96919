// Sum and maximum of 16 lanes as trees of depth 4. Lanes go through an array that compilers turn back into registers:
// Oclgrind 21.10's check for uninitialised memory takes lane 11 of any shuffle (.hi) for uninitialised, and dies on
// shuffles with unused lanes, which its compiler makes of v.s0 + v.s1.
#define TREE(F, v)                                                                        \
  F(F(F(F(v[0], v[8]), F(v[4], v[12])), F(F(v[2], v[10]), F(v[6], v[14]))),               \
    F(F(F(v[1], v[9]), F(v[5], v[13])), F(F(v[3], v[11]), F(v[7], v[15]))))
#define PLUS(a, b) ((a) + (b))

inline float sum16(float16 v) {
  float lanes[16];
  vstore16(v, 0, lanes);
  return TREE(PLUS, lanes);
}

inline float max16(float16 v) {
  float lanes[16];
  vstore16(v, 0, lanes);
  return TREE(fmax, lanes);
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
