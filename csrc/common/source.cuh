// The matrix that a quantizer reads: x (m,k) after what comes before quantization,
//
//   y = x | relu(x)^2 | x rstd weight | (x silu(z)) rstd weight | x rstd weight silu(z)
//
// rounded to x's format, so that one fused pass gives the bytes of two. k is contiguous, row
// strides are free; weight (k) may be of another format; rstd (m, groups) comes from the norm
// kernel.
#pragma once

#include "types.cuh"

namespace tigon {

// Codes of python/native/quantize.py.
enum Prologue : int { kPlain = 0, kRelu2 = 1, kNorm = 2, kGateFirst = 3, kGateLast = 4 };

struct Source {
    const void* x;
    const void* z;
    const void* weight;
    const float* rstd;
    int64 x_stride, z_stride;
    int m, k, prologue, weight_dtype;
    int group_size, groups, vectors;  // vectors: rows of x and z begin on 16 bytes
    int unused;
};

// 2^x as Triton's kernels have it; on the host the double result, rounded.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef TIGON_HOST_BUILD
    return static_cast<float>(std::exp2(static_cast<double>(x)));
#else
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// z * tl.sigmoid(z), instruction by instruction: kernels/gated_norm.py must give the same bits.
__device__ __forceinline__ float gate(float z) {
    const float below = __fadd_rn(exp2_approximate(__fmul_rn(z, -1.4426950408889634f)), 1.0f);
#ifdef TIGON_HOST_BUILD
    return z * (1.0f / below);
#else
    float sigmoid;
    asm("div.full.f32 %0, %1, %2;" : "=f"(sigmoid) : "f"(1.0f), "f"(below));
    return __fmul_rn(z, sigmoid);
#endif
}

// 16 bytes of a row; zeros past its end.
template <typename Io>
__device__ __forceinline__ uint4 fetch(const Io* from, int count, bool vectors) {
    if (vectors && count >= kVector<Io>) return *reinterpret_cast<const uint4*>(from);
    uint4 bits;
    Io values[kVector<Io>];
#pragma unroll
    for (int i = 0; i < kVector<Io>; ++i) values[i] = i < count ? from[i] : from_float<Io>(0.0f);
    memcpy(&bits, values, sizeof(bits));
    return bits;
}

// What comes before quantization, for 16 bytes of x at (row, column), `count` of them inside k.
// weight: that of the tile's columns, from `column` on.
template <typename Io>
__device__ __forceinline__ uint4 apply_prologue(const Source& a, uint4 x_bits, uint4 z_bits,
                                                int64 row, int column, int count,
                                                const float* weight) {
    Io x[kVector<Io>], z[kVector<Io>];
    memcpy(x, &x_bits, sizeof(x_bits));
    memcpy(z, &z_bits, sizeof(z_bits));
    if (a.prologue == kRelu2) {
#pragma unroll
        for (int i = 0; i < kVector<Io>; ++i) {
            const float v = to_float(x[i]), r = v < 0.0f ? 0.0f : v;
            x[i] = from_float<Io>(__fmul_rn(r, r));
        }
    } else {
        const float* rstd = a.rstd + row * a.groups;
        int group = column / a.group_size, end = (group + 1) * a.group_size - column;
        float r = rstd[group];
#pragma unroll
        for (int i = 0; i < kVector<Io>; ++i) {
            if (i >= count) break;
            if (i >= end) {
                r = rstd[++group];
                end += a.group_size;
            }
            float y = to_float(x[i]);
            if (a.prologue == kGateFirst) y = __fmul_rn(y, gate(to_float(z[i])));
            y = __fmul_rn(__fmul_rn(y, r), weight[i]);
            if (a.prologue == kGateLast) y = __fmul_rn(y, gate(to_float(z[i])));
            x[i] = from_float<Io>(y);
        }
    }
    memcpy(&x_bits, x, sizeof(x_bits));
    return x_bits;
}

}  // namespace tigon
