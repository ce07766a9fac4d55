// Scalar functions and warp reductions in fp32. A NaN stays a NaN in all of them.
#pragma once

#include "platform.cuh"

#ifdef __CUDACC_RTC__  // NVRTC has no <cmath>
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif

namespace tigon {

// log(1 + e^x); above 20 it equals x to fp32.
__device__ __forceinline__ float softplus(float x) {
    return x > 20.0f ? x : log1pf(expf(x));
}

__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

// fminf and fmaxf would turn a NaN into a limit.
__device__ __forceinline__ float clamp(float x, float low, float high) {
    return x < low ? low : (x > high ? high : x);
}

// The larger one; a NaN wins.
__device__ __forceinline__ float max_nan(float a, float b) {
#ifdef TIGON_HOST_BUILD
    return a != a || b != b ? NAN : (a < b ? b : a);
#else
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#endif
}

// The largest value of `lanes` (a power of two) neighbouring lanes, in all of them.
__device__ __forceinline__ float max_lanes(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
        value = max_nan(value, __shfl_xor_sync(kWholeWarp, value, offset));
    return value;
}

// The sum over `lanes` (a power of two) neighbouring lanes, in all of them, in a fixed order.
__device__ __forceinline__ float sum_lanes(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(kWholeWarp, value, offset);
    return value;
}

}  // namespace tigon
