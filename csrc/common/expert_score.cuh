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

__device__ __forceinline__ float sigmoid(float z) {
    return 1.0f / (1.0f + expf(-z));
}

struct Score {
    bool softmax;
    float shift, factor;  // of the softmax

    __device__ float operator()(float z) const {
        // Rounded here: a sum with the bias must not become one instruction with it.
        return softmax ? __fmul_rn(expf(z - shift), factor) : sigmoid(z);
    }
};

}  // namespace tigon
