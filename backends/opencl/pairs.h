// sum + a * b, as pairs of 16-bit integers in each lane: both products of a lane are added to its sum. a >= 0.
//
// On x86 this is one vpmaddwd and an addition, or with AVX512-VNNI one vpdpwssd: 32 multiply-adds. Which source becomes
// that was found by reading what the compilers made of nine forms. Intel's runtime (2026.2): of vectors of 32, which are
// no OpenCL C but every clang has them; of shifts and int16 products, two vpmaddwd and two additions;
// dot_acc_sat_4x8packed_us_int (OpenCL 3.0) is scalar code, seven times as long. PoCL (3.1, LLVM 14): two vpmaddwd and
// shuffles of either, but it compiles for the host, whose builtins are there.
#if defined(NO_SHUFFLES)
#define PLAIN
#elif defined(__AVX512BW__)
typedef short fields_t __attribute__((ext_vector_type(32)));
inline int16 add_products(int16 a, int b, int16 sum) {
  return sum + __builtin_astype(__builtin_ia32_pmaddwd512(__builtin_astype(a, fields_t),
                                                          __builtin_astype((int16)(b), fields_t)), int16);
}
#elif defined(__AVX2__)
inline int16 add_products(int16 a, int b, int16 sum) {
  const short16 low = as_short16(a.lo), high = as_short16(a.hi), bs = as_short16((int8)(b));
  return sum + (int16)(__builtin_ia32_pmaddwd256(low, bs), __builtin_ia32_pmaddwd256(high, bs));
}
#elif defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && __has_builtin(__builtin_convertvector)
typedef short fields_t __attribute__((ext_vector_type(32)));
typedef int products_t __attribute__((ext_vector_type(32)));
#define EVERY_OTHER(v, i)                                                                                           \
  __builtin_shufflevector(v, v, i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, \
                          i + 24, i + 26, i + 28, i + 30)
inline int16 add_products(int16 a, int b, int16 sum) {
  const fields_t as = __builtin_astype(a, fields_t), bs = __builtin_astype((int16)(b), fields_t);
  const products_t products = __builtin_convertvector(as, products_t) * __builtin_convertvector(bs, products_t);
  return sum + (EVERY_OTHER(products, 0) + EVERY_OTHER(products, 1));
}
#else
#define PLAIN
#endif
#else
#define PLAIN
#endif

#ifdef PLAIN
inline int16 add_products(int16 a, int b, int16 sum) {
  return sum + (a & (int16)(0xffff)) * (int16)(b << 16 >> 16) + (a >> (int16)(16)) * (int16)(b >> 16);
}
#endif
