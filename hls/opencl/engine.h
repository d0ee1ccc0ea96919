// What all kernels here share: beats, loops, numbers. The engine is defined in ../README.md.
//
// Every kernel is a single work-item (Intel FPGA SDK for OpenCL Pro, Best Practices Guide UG-OCL003, "Single Work-Item
// Kernel versus NDRange Kernel"): its loops are what becomes a pipeline. Where there are three, the first reads memory
// in bursts and does nothing else, the second computes and touches no memory, the third writes; between them are
// channels (cl_intel_channels), each with one writing and one reading kernel, as the hardware demands.
//
// Defined by whoever compiles this (backends/opencl/fpga/engine.py; a manifest holds them beside a bitstream):
//   CHANNELS         memory channels of the engine     TOKENS        rows of x that share a beat of weights
//   MAX_IN_FEATURES  of the x held on chip             MAX_HEAD_DIM  of a query held on chip
//   MAX_GROUP        query heads per KV head           *_FIFO        depths of channels
//   EMULATED         loops are not unrolled: a CPU compiles and runs them faster as loops
#pragma OPENCL EXTENSION cl_intel_channels : enable
#pragma OPENCL FP_CONTRACT OFF  // every operation rounds by itself, so that all forms of the engine give the same bits

#ifdef EMULATED
#define UNROLL
#else
#define UNROLL _Pragma("unroll")
#endif

#define PARTIALS 8  // a float32 adder takes up to 8 cycles: the same sum comes back every 8th cycle, and II stays 1
#define LANES 16    // float32 numbers in 512 bits

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(base) JOIN(base, SUFFIX)  // kernels and channels of a format: gemm_read_q4_1_fast

#define SINGLE __attribute__((max_global_work_dim(0), uses_global_work_offset(0)))

// 512 bits as memory delivers them; little-endian, so that bit 0 is bit 0 of the first byte.
typedef union {
  uint16 all;
  uchar bytes[64];
  ushort halves[32];
  uint words[16];
  float floats[16];
} beat;

typedef union {
  float16 all;
  float lanes[LANES];
} word;

// float16, subnormals too, without asking for cl_khr_fp16, which boards lack.
inline float half_value(ushort h) {
  const uint sign = (uint)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) return as_float(sign | as_uint((float)mantissa * 0x1p-24f));
  if (exponent == 31) return as_float(sign | 0x7F800000 | mantissa << 13);
  return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Sum of 16 numbers as a tree.
inline float tree(const float *v) {
  float s[8];
  UNROLL for (int i = 0; i < 8; i++) s[i] = v[2 * i] + v[2 * i + 1];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

inline float sum_of_partials(const float *p) {
  return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

// 16 floats from x + 16 * i of a row of n; zeros past its end.
inline word row_word(__global const float *x, int i, int n) {
  word v;
  UNROLL for (int l = 0; l < LANES; l++) v.lanes[l] = LANES * i + l < n ? x[LANES * i + l] : 0.0f;
  return v;
}
