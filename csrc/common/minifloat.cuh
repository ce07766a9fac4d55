// E2M1, E4M3 and E5M2 by their bits, and E8M0, the exponent of a power-of-two scale.
//
// A magnitude a is rounded by adding an anchor, a power of two whose last place is the format's
// last place at a: the adder rounds to nearest even (or towards zero), and the low bits of the sum
// count the last places. The binade w, the exponent of a but at least the format's lowest, gives
// both the anchor and the exponent field, so subnormals need no case of their own. The same bits
// come from every compiler and every architecture; where the chip has the conversion, it is used
// instead.
#pragma once

#include "platform.cuh"

namespace tigon {

constexpr float kLargestFloat = 3.402823466e38f;

template <int kMantissaBits, int kLowestExponent, int kMaximum>
struct MiniFloat {
    static constexpr int kMantissa = kMantissaBits;
    static constexpr int kLowest = kLowestExponent;
    static constexpr float kMax = kMaximum;
};
using E2M1 = MiniFloat<1, 0, 6>;
using E4M3 = MiniFloat<3, -6, 448>;
using E5M2 = MiniFloat<2, -14, 57344>;

template <typename F>
__device__ __forceinline__ unsigned binade(float magnitude) {
    return max(__float_as_uint(magnitude) & 0x7f800000u, unsigned(127 + F::kLowest) << 23);
}

template <typename F>
__device__ __forceinline__ float anchor(unsigned binade) {
    return __uint_as_float(binade + (unsigned(23 - F::kMantissa) << 23));
}

// The code's low bits, from the rounded sum: last places counted, and the exponent field.
template <typename F>
__device__ __forceinline__ unsigned code_of(float sum, unsigned binade) {
    return __float_as_uint(sum) + (binade >> (23 - F::kMantissa)) -
           (unsigned(127 + F::kLowest) << F::kMantissa);
}

// Code of a magnitude in [0, kMax], ties to even. Bits above the code are not zero.
template <typename F>
__device__ __forceinline__ unsigned nearest_code(float magnitude) {
    const unsigned w = binade<F>(magnitude);
    return code_of<F>(__fadd_rn(magnitude, anchor<F>(w)), w);
}

// The value of that code.
template <typename F>
__device__ __forceinline__ float nearest_value(float magnitude) {
    const float up = anchor<F>(binade<F>(magnitude));
    return __fsub_rn(__fadd_rn(magnitude, up), up);
}

// The E2M1 code of v in the upper 4 bits, for a magnitude in [0, 6] that is rounded to nearest even
// or cut. The anchor is 2 last places above a power of two: that makes the exponent field right.
template <bool kCut>
__device__ __forceinline__ unsigned upper_e2m1(float magnitude, float v) {
    const unsigned w = binade<E2M1>(magnitude);
    const float up = __uint_as_float(w + (22u << 23) + 2);
    const float sum = kCut ? __fadd_rz(magnitude, up) : __fadd_rn(magnitude, up);
    const unsigned code = (__float_as_uint(sum) << 28) + (w << 6);
    return (code & 0x7fffffff) | (__float_as_uint(v) & 0x80000000);
}

// Codes of 8 numbers, the first one in the lowest 4 bits. None may be a NaN.
__device__ __forceinline__ unsigned nearest_e2m1(const float* v) {
    unsigned codes = 0;
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
    asm("{ .reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d}; }"
        : "=r"(codes)
        : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
#else
#pragma unroll
    for (int i = 7; i >= 0; --i)
        codes = codes << 4 | upper_e2m1<false>(fminf(fabsf(v[i]), E2M1::kMax), v[i]) >> 28;
#endif
    return codes;
}

// The same after adding byte/256 of the last place to each magnitude and cutting: 8 random bytes.
__device__ __forceinline__ unsigned stochastic_e2m1(const float* v, const unsigned* random) {
    unsigned codes = 0;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
        const unsigned byte = random[i / 4] >> (8 * (i % 4)) & 255;
        // 2^23 + byte by its bits: cheaper than a conversion. Its product is exact, so fusing is
        // too.
        const float whole = __fsub_rn(__uint_as_float(0x4b000000u | byte), 8388608.0f);
        const float magnitude = fminf(fabsf(v[i]), E2M1::kMax);
        const float place = __uint_as_float(binade<E2M1>(magnitude) - (9u << 23));
        const float moved = __fmaf_rn(whole, place, magnitude);
        codes = codes << 4 | upper_e2m1<true>(moved, v[i]) >> 28;
    }
    return codes;
}

// Codes of 4 numbers, saturating; a NaN becomes 0x7f.
template <typename F>
__device__ __forceinline__ unsigned encode_fp8(const float* v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    unsigned short low, high;
    if constexpr (F::kMantissa == 3) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2]));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2]));
    }
    return low | unsigned(high) << 16;
#else
    unsigned codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        unsigned code = nearest_code<F>(fminf(fabsf(v[i]), F::kMax)) & 0x7f;
        code = v[i] != v[i] ? 0x7f : code | (__float_as_uint(v[i]) >> 24 & 0x80);
        codes += code << (8 * i);
    }
    return codes;
#endif
}

// A block scale: p >= 0 saturates at 448, a NaN becomes 0x7f.
__device__ __forceinline__ unsigned encode_scale(float p) {
    return p != p ? 0x7f : nearest_code<E4M3>(fminf(p, E4M3::kMax)) & 0x7f;
}

// The low 4 bits.
__device__ __forceinline__ float decode_e2m1(unsigned code) {
    const float magnitude = __fmul_rn(__uint_as_float((code & 7) << 22), 0x1p126f);
    return __uint_as_float(__float_as_uint(magnitude) | (code & 8) << 28);
}

__device__ __forceinline__ float decode_e4m3(unsigned code) {
    const float magnitude = __fmul_rn(__uint_as_float((code & 0x7f) << 20), 0x1p120f);
    const unsigned bits = (code & 0x7f) == 0x7f ? 0x7fc00000u : __float_as_uint(magnitude);
    return __uint_as_float(bits | (code & 0x80) << 24);
}

// E5M2 is the upper half of fp16; exponent 31 is infinity or NaN.
__device__ __forceinline__ float decode_e5m2(unsigned code) {
    const float magnitude = __fmul_rn(__uint_as_float((code & 0x7f) << 21), 0x1p112f);
    const unsigned special = 0x7f800000u | (code & 3) << 21;
    const unsigned bits = (code & 0x7c) == 0x7c ? special : __float_as_uint(magnitude);
    return __uint_as_float(bits | (code & 0x80) << 24);
}

// The exponent code of the power of two at or above v >= 0: 254 at most, 255 for a NaN.
__device__ __forceinline__ unsigned encode_e8m0(float v) {
    const unsigned bits = __float_as_uint(v), exponent = bits >> 23 & 255, rest = bits & 0x7fffff;
    if (v != v) return 255;
    if (exponent >= 254) return 254;
    return exponent + (exponent == 0 ? rest > 0x400000 : rest != 0);
}

// 2^(code - 127); 255 is NaN.
__device__ __forceinline__ float decode_e8m0(unsigned code) {
    return __uint_as_float(code == 0 ? 0x400000u : code == 255 ? 0x7fc00000u : code << 23);
}

}  // namespace tigon
