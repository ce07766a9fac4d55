// The scores of a token's logits: sigmoid of each, or softmax over all of them.
#pragma once

#include "math.cuh"

namespace tigon {

// max and log sum exp of a row, from which a softmax and the loss of large logits follow.
struct Exponents {
    float largest, shift, sum;  // sum of exp(z - shift)

    __device__ float log_sum() const { return shift + logf(sum); }
    // As torch does: a row whose largest logit is infinite has no softmax.
    __device__ float inverse() const { return fabsf(largest) == INFINITY ? NAN : 1.0f / sum; }
};

// One warp; `logit(i)` is entry i * 32 + lane of the row, or -inf past its end.
template <typename Logit>
__device__ __forceinline__ Exponents exponents(int items, const Logit& logit) {
    Exponents row;
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < items; ++i) most = fmaxf(most, logit(i));
    row.largest = max_lanes(most, 32);
    row.shift = fabsf(row.largest) == INFINITY ? 0.0f : row.largest;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < items; ++i) sum += expf(logit(i) - row.shift);
    row.sum = sum_lanes(sum, 32);
    return row;
}

// 1 / (1 + e^-z), correctly divided. As a quotient of C++ it would branch at every score, and the
// scores of a row would wait for one another.
__device__ __forceinline__ float sigmoid(float z) {
    const float below = 1.0f + expf(-z);
#ifdef TIGON_HOST_BUILD
    return 1.0f / below;
#else
    const float scale = below > 0x1p100f ? 0x1p-64f : 1.0f;  // both reciprocals are normal numbers
    const float x = below * scale;
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    r = __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
    return x == INFINITY ? 0.0f : __fmul_rn(r, scale);
#endif
}

struct Score {
    bool softmax;
    float shift, factor;  // of the softmax

    // Rounded before it is used: a sum with the bias must not become one instruction with it.
    __device__ float of_softmax(float z) const { return __fmul_rn(expf(z - shift), factor); }
    __device__ float operator()(float z) const { return softmax ? of_softmax(z) : sigmoid(z); }
};

}  // namespace tigon
