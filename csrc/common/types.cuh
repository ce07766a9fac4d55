// Number formats: fp32, bf16, fp16 in memory, fp32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "platform.cuh"

namespace tigon {

using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = __half;

// Codes of python/native/ for operands whose format is known at run time only.
enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

__device__ __forceinline__ float to_float(f32 value) {
    return value;
}
__device__ __forceinline__ float to_float(bf16 value) {
    return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(f16 value) {
    return __half2float(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ f32 from_float<f32>(float value) {
    return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
    return __float2half_rn(value);
}

// One element of an operand that may be fp32 beside 16-bit activations.
__device__ __forceinline__ float load_as(const void* base, int64 index, int dtype) {
    if (dtype == kF32) return static_cast<const f32*>(base)[index];
    if (dtype == kBF16) return to_float(static_cast<const bf16*>(base)[index]);
    return to_float(static_cast<const f16*>(base)[index]);
}

// Elements in one 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[kVector<T>]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    T values[kVector<T>];
    memcpy(values, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = to_float(values[i]);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[kVector<T>]) {
    T values[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] = from_float<T>(from[i]);
    uint4 bits;
    memcpy(&bits, values, sizeof(bits));
    *reinterpret_cast<uint4*>(to) = bits;
}

}  // namespace tigon
