// The part of hls_math.h that the kernels use (UG1399, "HLS math library"), by the C library.
#pragma once
#include <cmath>

namespace hls {

inline float exp(float x) { return std::exp(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float erf(float x) { return std::erf(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float rint(float x) { return std::rint(x); }

}  // namespace hls
