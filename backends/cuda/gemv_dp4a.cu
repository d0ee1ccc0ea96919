// gemv_dp4a: y = x @ w.T for a few rows of x, rounded to int8 in steps of max|x| / 127 per block of 32 columns. Host side:
// gemv.py; how w lies in memory: formats.py.
//
// Compiled for BITS, OFFSET, HAS_MIN, IS_SUPER, HALVES   the format of w (formats.constants)
//              ROWS      of x, a power of two; those from `rows` on are not there
//              W_ROWS    of w that a warp multiplies at a time, a power of two (with a GLU, of gate and up each)
//              WARPS     of a block, at least ROWS; PER_SM blocks that a multiprocessor must have registers for
//              NORM      x is x * (weight + weight_offset) / rms(x)
//              GLU       0, or activation(x @ w.T) * (x @ up.T): silu 1, gelu_tanh 2, gelu_erf 3
//              BIAS, ADD what is added: a bias, and what y holds
//
// Every block brings all of x into its shared memory, then its warps walk over rows of w. That each block rounds x anew
// costs less than a launch that does it once: x comes from the second-level cache, two threads per block of 32. The
// first weights of each warp are asked for before, so that they are there when x is ready.
//
// A lane reads 16 bytes of quants at a time, a unit: 32 columns, or 16 of 8 bits. 4 of them are under way per lane.

#define UNIT (BITS == 8 ? 16 : 32)
#define SOURCES (GLU ? 2 * W_ROWS : W_ROWS)  // rows that a warp reads at a time
#define SUMS (SOURCES * ROWS)                // at most 32: each ends in a lane of its own
#define UNITS_UNDER_WAY (SOURCES > 2 ? 1 : SOURCES > 1 ? 2 : HALVES ? 3 : 4)
#define SCALE_BYTES (HAS_MIN && !IS_SUPER ? 4 : 2)
#define ALL 0xffffffffu
// 1.5 * 2**23: a float whose last bit counts 1. Sums of products begin at its bits, and become floats by subtracting it:
// exact below 2**22, and four times as fast as a conversion.
#define MAGIC 0x4b400000
#define MAGIC_FLOAT 12582912.0f
#define INFINITE 0x7f800000
#define TINY 1e-36f  // 127 / TINY is finite; smaller numbers count as zeros

#ifndef CUDA_HOST_H  // what tests/cuda_host.h has in C++
static __device__ __forceinline__ float half_of(unsigned word) {  // float16 in its lower half
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)word));
  return value;
}

// Weights are read once: they need no place in the first-level cache.
static __device__ __forceinline__ uint4 load_once(const uint4 *at) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(at));
  return v;
}

static __device__ __forceinline__ void ask_for(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

struct Planes {
  const uint4 *quants;
  const unsigned *high;
  const void *scales, *supers;
};

// A unit as it lies in memory.
struct Unit {
  uint4 quants;
  uint2 high;
  unsigned scales, supers;
};

// A unit as it is multiplied: four numbers per word; those of columns 16 .. 31 in words 4 .. 7.
struct Weights {
  int quants[8];
  float scale, scale_hi, minimum;
};

// A block of 32 columns of x. `sum` is that of its integers: times step (a float) where w has minima, as the two sums
// of 16 columns where w has two scales, else times -OFFSET, from MAGIC on: what a sum of products begins with.
struct Block {
  float step;
  int sum;
};

static __device__ __forceinline__ Unit load_unit(const Planes &w, long long at) {
  Unit unit;
  const long long block = BITS == 8 ? at >> 1 : at;
  unit.quants = load_once(w.quants + at);
  if (BITS == 5) unit.high.x = __ldg(w.high + block);
  if (BITS == 6) unit.high = __ldg((const uint2 *)w.high + block);
  if (SCALE_BYTES == 4)
    unit.scales = __ldg((const unsigned *)w.scales + block);
  else
    unit.scales = __ldg((const unsigned short *)w.scales + block);
  if (IS_SUPER && HAS_MIN) unit.supers = __ldg((const unsigned *)w.supers + (block >> 3));
  if (IS_SUPER && !HAS_MIN) unit.supers = __ldg((const unsigned short *)w.supers + (block >> 3));
  return unit;
}

// Bits 0 .. 3 to bit 4 of each byte; the lowest four pairs of bits to bits 4 and 5 of each byte.
static __device__ __forceinline__ unsigned spread_bits(unsigned n) { return ((n & 15) * 0x02040810u) & 0x10101010u; }
static __device__ __forceinline__ unsigned spread_pairs(unsigned n) {
  return ((((n & 255) * 0x1001u) & 0x000f000fu) * 0x410u) & 0x30303030u;
}

static __device__ __forceinline__ Weights unpack(const Unit &unit) {
  Weights w;
  const unsigned words[4] = {unit.quants.x, unit.quants.y, unit.quants.z, unit.quants.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (BITS == 8) {
      w.quants[i] = words[i];
      continue;
    }
    unsigned lo = words[i] & 0x0f0f0f0fu, hi = (words[i] >> 4) & 0x0f0f0f0fu;
    if (BITS == 5) lo |= spread_bits(unit.high.x >> (4 * i)), hi |= spread_bits(unit.high.x >> (4 * i + 16));
    if (BITS == 6) lo |= spread_pairs(unit.high.x >> (8 * i)), hi |= spread_pairs(unit.high.y >> (8 * i));
    w.quants[i] = lo;
    w.quants[i + 4] = hi;
  }
  w.scale = half_of(IS_SUPER ? unit.supers : unit.scales);
  if (HALVES) {
    w.scale_hi = w.scale * (float)(signed char)(unit.scales >> 8);
    w.scale *= (float)(signed char)unit.scales;
  } else if (IS_SUPER) {
    w.scale *= (float)(unit.scales & 255);
    w.minimum = half_of(unit.supers >> 16) * -(float)(unit.scales >> 8);
  } else if (HAS_MIN) {
    w.minimum = half_of(unit.scales >> 16);
  }
  return w;
}

// Four numbers of x and of w per word.
static __device__ __forceinline__ int dot(const int *w, const uint4 &x, int sum) {
  sum = __dp4a(w[0], (int)x.x, sum);
  sum = __dp4a(w[1], (int)x.y, sum);
  sum = __dp4a(w[2], (int)x.z, sum);
  return __dp4a(w[3], (int)x.w, sum);
}

static __device__ __forceinline__ float exact_float(int sum) { return __int_as_float(sum) - MAGIC_FLOAT; }

// What a unit of w and its block of x add to a sum.
static __device__ __forceinline__ float product(const Weights &w, const uint4 &lo, const uint4 &hi,
                                                const Block &block) {
  if (HALVES) {
    const int from_lo = MAGIC - OFFSET * (int)(short)block.sum, from_hi = MAGIC - OFFSET * (block.sum >> 16);
    const float of_lo = w.scale * exact_float(dot(w.quants, lo, from_lo));
    return (of_lo + w.scale_hi * exact_float(dot(w.quants + 4, hi, from_hi))) * block.step;
  }
  int sum = dot(w.quants, lo, HAS_MIN ? MAGIC : block.sum);
  if (BITS != 8) sum = dot(w.quants + 4, hi, sum);
  const float scaled = exact_float(sum) * (w.scale * block.step);
  return HAS_MIN ? scaled + w.minimum * __int_as_float(block.sum) : scaled;
}

static __device__ __forceinline__ float activation(float g) {
  if (GLU == 1) return g / (1.0f + expf(-g));
  if (GLU == 2) return 0.5f * g * (1.0f + tanhf(0.7978845608f * (g + 0.044715f * g * g * g)));
  return 0.5f * g * (1.0f + erff(g * 0.7071067812f));
}

static __device__ __forceinline__ float4 load_four(const float *p, bool is_aligned) {
  if (is_aligned) return *(const float4 *)p;
  return make_float4(p[0], p[1], p[2], p[3]);
}

// Round the rows of x into `quants` [ROWS, blocks * 2] of 16 columns each and `found` [ROWS, blocks]; `squares`
// [WARPS] are parts of the rows' sums of squares: a warp has one row, which it shares with every ROWS-th.
//
// The 16 columns lie in order for units of 16. Units of 32 read their two halves from two planes: so the 16 bytes that
// neighbouring lanes read are neighbours, without bank conflicts.
static __device__ __forceinline__ void round_x(const float *x, int x_stride, const float *weight, float weight_offset,
                                               int rows, int columns, uint4 *quants, Block *found, float *squares) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = warp % ROWS;
  const int blocks = columns / 32, halves = columns / 16;
  if (t >= rows) return;
  const float *row = x + (long long)t * x_stride;
  const bool is_aligned = ((unsigned long long)row | (NORM ? (unsigned long long)weight : 0)) % 16 == 0;
  float square = 0.0f;
  for (int first = warp / ROWS * 32; first < halves; first += WARPS / ROWS * 32) {
    const int at = first + lane;
    const bool is_there = at < halves;
    float4 v[4];
    int largest = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (is_there) v[i] = load_four(row + at * 16 + i * 4, is_aligned);
      if (NORM && is_there) {
        const float4 w = load_four(weight + at * 16 + i * 4, is_aligned);
        square += v[i].x * v[i].x + v[i].y * v[i].y + (v[i].z * v[i].z + v[i].w * v[i].w);
        v[i].x *= w.x + weight_offset, v[i].y *= w.y + weight_offset;
        v[i].z *= w.z + weight_offset, v[i].w *= w.w + weight_offset;
      }
      // The bits of floats without their sign are ordered as the floats are, with NaN above infinity.
      largest = max(max(largest, __float_as_int(fabsf(v[i].x))), __float_as_int(fabsf(v[i].y)));
      largest = max(max(largest, __float_as_int(fabsf(v[i].z))), __float_as_int(fabsf(v[i].w)));
    }
    largest = max(largest, __shfl_xor_sync(ALL, largest, 1));
    // A NaN or an infinity makes the step a NaN, and this block gives nothing but NaNs.
    const float top = largest < INFINITE ? __int_as_float(largest) : __int_as_float(0x7fc00000);
    const float step = top / 127.0f, inverse = top >= TINY ? 127.0f / top : 0.0f;
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int a = __float2int_rn(v[i].x * inverse), b = __float2int_rn(v[i].y * inverse);
      const int c = __float2int_rn(v[i].z * inverse), d = __float2int_rn(v[i].w * inverse);
      words[i] = (a & 255u) | (b & 255u) << 8 | (c & 255u) << 16 | (unsigned)d << 24;
      sum = __dp4a((int)words[i], 0x01010101, sum);
    }
    const int other = __shfl_xor_sync(ALL, sum, 1), both = sum + other;
    if (!is_there) continue;
    const int place = BITS == 8 ? at : at % 2 * blocks + at / 2;
    quants[t * halves + place] = make_uint4(words[0], words[1], words[2], words[3]);
    if (at % 2) continue;
    Block block = {step, MAGIC - OFFSET * both};
    if (HALVES) block.sum = (int)((sum & 0xffffu) | (unsigned)other << 16);
    if (HAS_MIN) block.sum = __float_as_int(step * (float)both);
    found[t * blocks + at / 2] = block;
  }
  if (!NORM) return;
#pragma unroll
  for (int mask = 16; mask; mask /= 2) square += __shfl_xor_sync(ALL, square, mask);
  if (lane == 0) squares[warp] = square;
}

// Sum each of `sums` over the lanes: lane i gets that of sums[i * SUMS / 32]. At each step a lane gives half of its
// sums away, for the other lane to go on with, and takes its part of those it keeps.
static __device__ __forceinline__ float over_lanes(float *sums, int lane) {
#pragma unroll
  for (int step = 0; step < 5; step++) {
    const int mask = 16 >> step, kept = SUMS >> (step + 1);
    const bool is_upper = lane & mask;
    if (kept == 0) sums[0] += __shfl_xor_sync(ALL, sums[0], mask);
#pragma unroll
    for (int i = 0; i < kept; i++) {
      const float given = is_upper ? sums[i] : sums[i + kept];
      sums[i] = (is_upper ? sums[i + kept] : sums[i]) + __shfl_xor_sync(ALL, given, mask);
    }
  }
  return sums[0];
}

// Shared memory: the quants, blocks and squares of round_x. See gemv.py: shared_bytes.
extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM)
    gemv_dp4a(const float *x, int x_stride, const float *weight, float eps, float weight_offset,
              const uint4 *w_quants, const unsigned *w_high, const void *w_scales, const void *w_supers,
              const uint4 *up_quants, const unsigned *up_high, const void *up_scales, const void *up_supers,
              const float *bias, float *y, int y_stride, int rows, int columns, int features) {
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = columns / 32, units = columns / UNIT;
  // Without a sign: `features` may be near 2**31, and a stride lies behind it.
  const unsigned begin = (blockIdx.x * WARPS + warp) * W_ROWS, stride = gridDim.x * WARPS * W_ROWS;
  const Planes w = {w_quants, w_high, w_scales, w_supers}, up = {up_quants, up_high, up_scales, up_supers};
  uint4 *quants = shared;
  Block *found = (Block *)(quants + ROWS * 2 * blocks);
  float *squares = (float *)(found + ROWS * blocks);

  {  // the first of each row, 128 bytes per lane: half of the lanes quants, the others scales
    const int source = lane % SOURCES, line = lane % 16 / SOURCES * 128;
    const unsigned row = begin + source % W_ROWS;
    const bool is_quants = lane < 16, is_w = source < W_ROWS;
    const int row_bytes = is_quants ? units * 16 : blocks * SCALE_BYTES;
    const void *of_w = is_quants ? w_quants : w_scales, *of_up = is_quants ? up_quants : up_scales;
    const char *plane = (const char *)(is_w ? of_w : of_up);
    if (row < (unsigned)features && line < row_bytes) ask_for(plane + (long long)row * row_bytes + line);
  }
  round_x(x, x_stride, weight, weight_offset, rows, columns, quants, found, squares);
  __syncthreads();

  // The sum that this lane will have in the end: of row t of x and of row `source` of those that the warp reads.
  const int index = lane / (32 / SUMS), t = index % ROWS, source = index / ROWS;
  float factor = 1.0f;
  if (NORM && t < rows) {
    float square = 0.0f;
#pragma unroll
    for (int i = t; i < WARPS; i += ROWS) square += squares[i];
    factor = rsqrtf(square / (float)columns + eps);
  }

  for (unsigned first = begin; first < (unsigned)features; first += stride) {
    float sums[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
    for (int begin_at = lane; begin_at < units; begin_at += 32 * UNITS_UNDER_WAY) {
      Unit loaded[UNITS_UNDER_WAY][SOURCES];
#pragma unroll
      for (int u = 0; u < UNITS_UNDER_WAY; u++)
#pragma unroll
        for (int s = 0; s < SOURCES; s++) {  // behind the last row it is read again
          const unsigned row = min(first + s % W_ROWS, (unsigned)features - 1);
          const int at = begin_at + 32 * u;
          if (at < units) loaded[u][s] = load_unit(s < W_ROWS ? w : up, (long long)row * units + at);
        }
#pragma unroll
      for (int u = 0; u < UNITS_UNDER_WAY; u++) {
        const int at = begin_at + 32 * u;
        if (at >= units) continue;
        Weights weights[SOURCES];
#pragma unroll
        for (int s = 0; s < SOURCES; s++) weights[s] = unpack(loaded[u][s]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const uint4 lo = quants[r * 2 * blocks + at], hi = BITS == 8 ? lo : quants[(r * 2 + 1) * blocks + at];
          const Block block = found[r * blocks + (BITS == 8 ? at >> 1 : at)];
#pragma unroll
          for (int s = 0; s < SOURCES; s++) sums[s * ROWS + r] += product(weights[s], lo, hi, block);
        }
      }
    }
    float value = over_lanes(sums, lane) * factor;
    if (GLU) value = activation(value) * __shfl_xor_sync(ALL, value, 16);  // in the upper lanes: of up, not stored
    const unsigned row = first + source;
    if (lane % (32 / SUMS) == 0 && source < W_ROWS && row < (unsigned)features && t < rows) {
      float *to = y + (long long)t * y_stride + row;
      if (BIAS) value += bias[row];
      if (ADD) value += *to;
      *to = value;
    }
  }
}
