// CUDA C++ on a CPU: as much of the language as backends/cuda/*.cu use, and blocks whose threads are fibers.
//
// A named stand-in for a GPU, which cannot be had here; see cuda_host.py. A thread runs until it waits for its warp or
// its block, then the next one does: always in the same order, on one thread of the operating system. Shared memory
// (the array `shared`) begins as NaNs, and nothing may be written behind what was asked for. A warp or block that some
// of its threads do not reach together is an error.
#ifndef CUDA_HOST_H
#define CUDA_HOST_H

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; } __attribute__((aligned(8)));
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
struct dim3 { unsigned x, y, z; };

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int LANES = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 256 << 10, MOST_SHARED = 256 << 10, GUARD = 4 << 10;
constexpr unsigned char EMPTY = 0xff;  // of all four bytes: a NaN

// Where threads wait for each other; `round` counts how often all of them came.
struct Meeting {
  int arrived = 0;
  long round = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  bool is_done = false;
  long exchanges = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t values[2][LANES];  // of this exchange and the next, which a lane may begin before all have read
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Meeting block;
ucontext_t caller;
int current, alive;
long waits;  // since anything moved on
const char *problem;
void (*run_thread)();

inline void enter(int next) {
  current = next;
  threadIdx.x = next;
}

// On to the next thread that has not ended.
inline void pass_on() {
  const int from = current;
  int next = from;
  do next = (next + 1) % (int)fibers.size();
  while (fibers[next].is_done);
  enter(next);
  if (next != from) swapcontext(&fibers[from].context, &fibers[next].context);
}

inline void fail(const char *text) {
  problem = text;
  setcontext(&caller);
}

inline void meet(Meeting &meeting, int count) {
  const long mine = meeting.round;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    meeting.round++;
    waits = 0;
    return;
  }
  while (meeting.round == mine) {
    if (++waits > 4 * (long)fibers.size()) fail("threads wait for others that do not come");
    pass_on();
  }
}

inline void thread_main() {
  run_thread();
  fibers[current].is_done = true;
  waits = 0;
  if (--alive == 0) setcontext(&caller);
  pass_on();
}

template <typename T>
T from_lane(unsigned mask, T value, int lane) {
  if (mask != ~0u) fail("only whole warps exchange values");
  Fiber &fiber = fibers[current];
  Warp &warp = warps[current / LANES];
  uint64_t *values = warp.values[fiber.exchanges++ % 2];
  values[current % LANES] = 0;
  memcpy(&values[current % LANES], &value, sizeof value);
  meet(warp.meeting, LANES);
  memcpy(&value, &values[lane], sizeof value);
  return value;
}

}  // namespace host

extern "C" {
uint4 shared[(host::MOST_SHARED + host::GUARD) / sizeof(uint4)];
}

inline void __syncthreads() { host::meet(host::block, (int)host::fibers.size()); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return host::from_lane(mask, value, (host::current % host::LANES) ^ other);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int lane = host::current % host::LANES;
  return host::from_lane(mask, value, lane + delta < host::LANES ? lane + delta : lane);
}

inline int __dp4a(int a, int b, int sum) {
  for (int shift = 0; shift < 32; shift += 8)
    sum = (int)((unsigned)sum + (unsigned)((int)(int8_t)(a >> shift) * (int8_t)(b >> shift)));
  return sum;
}

template <typename T>
T __ldg(const T *at) {
  return *at;
}

inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// PTX ISA 8.8, cvt: to nearest even; NaN gives 0, what is too large the nearest integer.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  return (int)std::min(std::max(std::nearbyint((double)value), -2147483648.0), 2147483647.0);
}

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

// What the kernels write in PTX.
inline float half_of(unsigned word) {
  const unsigned sign = (word & 0x8000u) << 16, exponent = (word >> 10) & 31u, rest = word & 1023u;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)rest * 0x1p-24f;
  return __int_as_float((int)(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | rest << 13));
}

inline uint4 load_once(const uint4 *at) { return *at; }

inline void ask_for(const void *at) { (void)*(const volatile char *)at; }

namespace host {

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*(A *)arguments[I]...);
}

inline const char *run_block(int threads, size_t shared_bytes) {
  fibers.resize(threads);
  warps.assign(threads / LANES, Warp());
  block = Meeting();
  waits = 0, problem = nullptr, alive = threads;
  ASAN_UNPOISON_MEMORY_REGION(shared, sizeof shared);
  memset(shared, EMPTY, shared_bytes + GUARD);
  ASAN_POISON_MEMORY_REGION((char *)shared + shared_bytes, sizeof shared - shared_bytes);
  for (Fiber &fiber : fibers) {
    fiber.is_done = false, fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_main, 0);
  }
  enter(0);
  swapcontext(&caller, &fibers[0].context);
  ASAN_UNPOISON_MEMORY_REGION(shared, sizeof shared);
  for (size_t i = 0; i < GUARD; i++)
    if (!problem && ((unsigned char *)shared)[shared_bytes + i] != EMPTY) problem = "written behind shared memory";
  return problem;
}

template <typename... A>
const char *launch(void (*kernel)(A...), void **arguments, int grid, int threads, size_t shared_bytes) {
  static void (*called)(A...);
  static void **given;
  called = kernel, given = arguments;
  run_thread = [] { call(called, given, std::index_sequence_for<A...>()); };
  if (threads % LANES || threads > MOST_THREADS || shared_bytes > MOST_SHARED) return "no block is like this";
  gridDim = {(unsigned)grid, 1, 1}, blockDim = {(unsigned)threads, 1, 1};
  for (int i = 0; i < grid; i++) {
    blockIdx = {(unsigned)i, 0, 0};
    if (const char *text = run_block(threads, shared_bytes)) return text;
  }
  return nullptr;
}

}  // namespace host

#endif
