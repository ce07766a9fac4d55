// How a recurrent state is stored: fp32, bf16, fp16, or int8 and E4M3 codes with a scale a row of
// n,
//
//   scale = max |S| / 127 (/ 448),   code = round(S / scale),   value = code * scale
//
// to nearest even or stochastically: 16 random bits are added below the last place that is kept,
// then it is cut. Integer arithmetic on the bits, the same as in python/reference/state_format.py;
// a row of zeros has scale 0 and codes 0, one with a NaN or infinity a scale that is not finite.
#pragma once

#include "math.cuh"
#include "minifloat.cuh"
#include "philox.cuh"
#include "types.cuh"

namespace tigon {

using i8 = signed char;
struct e4m3 {
    uint8 code;
};

// The largest code of a format with a scale; 0: there is none.
template <typename State>
constexpr float kLargestCode = 0.0f;
template <>
constexpr float kLargestCode<i8> = 127.0f;
template <>
constexpr float kLargestCode<e4m3> = 448.0f;

template <typename State>
constexpr bool kScaled = kLargestCode<State> != 0.0f;
template <typename State>
constexpr bool kRounded = sizeof(State) < 4;

__device__ __forceinline__ float to_float(i8 value) {
    return value;
}
__device__ __forceinline__ float to_float(e4m3 value) {
    return decode_e4m3(value.code);
}
template <>
__device__ __forceinline__ i8 from_float<i8>(float value) {
    return static_cast<i8>(static_cast<int>(value));
}
template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float value) {
    const unsigned code = nearest_code<E4M3>(fabsf(value)) & 0x7f;
    return {static_cast<uint8>(code | (__float_as_uint(value) >> 24 & 0x80))};
}

__device__ __forceinline__ float with_sign_of(float magnitude, float value) {
    return __uint_as_float(__float_as_uint(magnitude) | (__float_as_uint(value) & 0x80000000u));
}

// The number of the format (a code, where there is a scale) that lies nearest, ties to even.
template <typename State>
__device__ __forceinline__ float nearest(float value) {
    return to_float(from_float<State>(value));
}
template <>
__device__ __forceinline__ float nearest<i8>(float value) {
    return clamp(rintf(value), -127.0f, 127.0f);
}
template <>
__device__ __forceinline__ float nearest<e4m3>(float value) {
    return with_sign_of(nearest_value<E4M3>(fminf(fabsf(value), E4M3::kMax)), value);
}

// 16 bits added below the last of `mantissa` places and cut: the code of a magnitude, not limited.
__device__ __forceinline__ unsigned cut_magnitude(unsigned magnitude, unsigned random, int mantissa,
                                                  int lowest) {
    const int exponent = magnitude >> 23;
    const unsigned significand = (magnitude & 0x7fffffu) | (exponent > 0 ? 0x800000u : 0u);
    // Below the smallest normal number the last place stands still, so more bits are dropped.
    const int dropped = 23 - mantissa + max(lowest - exponent, 0);
    const unsigned fraction =
        dropped < 16 ? significand << (16 - dropped) : significand >> min(dropped - 16, 31);
    return (unsigned(max(exponent, lowest) - lowest) << mantissa) + ((fraction + random) >> 16);
}

// The number of the format above or below the value, by 16 random bits. What is finite stays so.
template <typename State>
__device__ __forceinline__ float stochastic(float value, unsigned random);
template <>
__device__ __forceinline__ float stochastic<f32>(float value, unsigned) {
    return value;
}
template <>
__device__ __forceinline__ float stochastic<bf16>(float value, unsigned random) {
    const unsigned magnitude = __float_as_uint(value) & 0x7fffffffu;
    unsigned code = min((magnitude + random) >> 16, 0x7f7fu);
    if (magnitude >= 0x7f800000u) code = magnitude > 0x7f800000u ? 0x7fc0u : 0x7f80u;
    return with_sign_of(__uint_as_float(code << 16), value);
}
template <>
__device__ __forceinline__ float stochastic<f16>(float value, unsigned random) {
    const unsigned magnitude = __float_as_uint(value) & 0x7fffffffu;
    unsigned code = min(cut_magnitude(magnitude, random, 10, 113), 0x7bffu);
    if (magnitude >= 0x7f800000u) code = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    __half_raw bits;
    bits.x = static_cast<unsigned short>(code);
    return with_sign_of(__half2float(__half(bits)), value);
}
template <>
__device__ __forceinline__ float stochastic<i8>(float value, unsigned random) {
    const int lifted = static_cast<int>(floorf(value * 65536.0f)) + static_cast<int>(random);
    return static_cast<float>(max(min(lifted >> 16, 127), -127));
}
template <>
__device__ __forceinline__ float stochastic<e4m3>(float value, unsigned random) {
    const unsigned magnitude = __float_as_uint(value) & 0x7fffffffu;
    const unsigned code = min(cut_magnitude(magnitude, random, 3, 121), 0x7eu);
    return with_sign_of(decode_e4m3(code), value);
}

// How one row of a call is rounded. position: tokens of the request that are folded into the state.
struct Rounding {
    bool stochastic;
    uint64 seed;
    int64 position;
    unsigned layer;

    // The random halfwords of the 8 elements of (h,p,n) from `element` on, low half of a word
    // first: element e takes halfword e % 8 of counter e / 8. aligned: element % 8 is 0.
    __device__ Words bits(int64 element, bool aligned) const {
        const unsigned low = unsigned(position), high = unsigned(uint64(position) >> 32);
        const unsigned at = unsigned(element / 8), purpose = 2u << 24 | layer;
        Words a = philox(at, low, high, purpose, seed);
        if (aligned) return a;
        const Words b = philox(at + 1, low, high, purpose, seed);
        const int skip = element % 8;
        unsigned w[8] = {a.w[0], a.w[1], a.w[2], a.w[3], b.w[0], b.w[1], b.w[2], b.w[3]};
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] = skip & 4 ? w[i + 2] : w[i];
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = skip & 2 ? w[i + 1] : w[i];
#pragma unroll
        for (int i = 0; i < 4; ++i) a.w[i] = skip & 1 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
        return a;
    }
};

}  // namespace tigon
