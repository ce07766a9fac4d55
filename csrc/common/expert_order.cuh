// The choices c = token * k + j of t tokens in the order of their experts, by c within one.
//
// A token chooses an expert at most once (choices of unknown origin count as tokens with k = 1). So
// among 32 tokens the choices of an expert are bits of a word, set in any order, and a choice's
// rank is the number of bits below its own.
#pragma once

#include "math.cuh"
#include "select.cuh"

namespace tigon {

// offsets (e+1) from counts (e), which may be global or shared memory; base (e, shared) begins as
// the offsets. totals: one word a warp. Ends with a barrier.
__device__ __forceinline__ void offsets_of_experts(const int* counts, int experts, int* base,
                                                   int* totals) {
    const int each = (experts + blockDim.x - 1) / blockDim.x;
    const int first = min(int(threadIdx.x) * each, experts), last = min(first + each, experts);
    int sum = 0;
    for (int i = first; i < last; ++i) sum += counts[i];
    int place = sum_before(sum);
    if (lane_of_warp() == 31) totals[threadIdx.x / 32] = place + sum;
    __syncthreads();
    for (int w = 0; w < int(threadIdx.x) / 32; ++w) place += totals[w];
    for (int i = first; i < last; ++i) {
        const int count = counts[i];
        base[i] = place;
        place += count;
    }
    if (last == experts && first < last) base[experts] = place;
    __syncthreads();
}

// Places the choices of tokens first to last - 1. base: where the next choice of each expert goes.
// bits: a word an expert.
__device__ __forceinline__ void place_choices(const int* indices, int* order, int* inverse,
                                              int first, int last, int k, int experts, int* base,
                                              unsigned* bits) {
    for (int i = threadIdx.x; i < experts; i += blockDim.x) bits[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (; first < last; first += 32) {
        const int64 start = int64(first) * k;
        const unsigned choices = min(last - first, 32) * k;
        for (unsigned c = threadIdx.x; c < choices; c += blockDim.x) {
            const int expert = indices[start + c];
            if (unsigned(expert) < unsigned(experts)) atomicOr(bits + expert, 1u << c / k);
        }
        __syncthreads();
        for (unsigned c = threadIdx.x; c < choices; c += blockDim.x) {
            const int expert = indices[start + c];
            int place = -1;
            if (unsigned(expert) < unsigned(experts)) {
                place = base[expert] + __popc(bits[expert] & ((1u << c / k) - 1));
                order[place] = int(start + c);
            }
            inverse[start + c] = place;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < experts; i += blockDim.x) {
            base[i] += __popc(bits[i]);
            bits[i] = 0;
        }
        __syncthreads();
    }
}

}  // namespace tigon
