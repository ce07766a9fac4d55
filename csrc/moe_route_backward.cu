// The gradient of the logits from those of the weights and of the losses' sums.
//
// With g = scale dw, S = sum of the k scores + eps, over the choices j of a token:
//
//   ds_j = (g_j - sum g s / S) / S if normalized, else g_j
//   sigmoid: dz_j = ds_j s_j (1 - s_j)
//   softmax: dz_j = ds_j s_j if normalized, else s_i ([i chosen] g_i - sum g s) for every expert i
//   + p_i (D_i - sum D p) (1 - s_i if sigmoid)      D: gradient of the score sums of t's sequence
//   + 2 dz lse exp(z_i - lse)                       dz: gradient of sum lse^2
//
// dweights, indices, scores (t,k); dscore_sums (s,e); dlogits (t,e), every element of which is
// written once. One warp a token; what falls on the choices waits in shared memory, the logits,
// where they are needed, are read two or three times, from the cache after the first.
#include "common/expert_score.cuh"
#include "common/select.cuh"
#include "common/sequences.cuh"

namespace tigon {

struct MoeRouteBackward {
    const float* dweights;
    const float* dscore_sums;  // may be null
    const float* dz_sum;       // (), may be null
    const float* logits;       // null where neither they nor dscore_sums and dz_sum are needed
    const int* indices;
    const float* scores;
    const void* bounds;  // cu_seqlens, null: one sequence
    const uint8* mask;   // may be null
    float* dlogits;
    int64 stride;  // of the logits' rows
    int tokens, experts, k, sequences, wide, softmax, normalize;
    float scale, eps;
    int unused;
};

// Adds what the weights give to the choices' places; returns sum g s.
__device__ __forceinline__ float choices(const MoeRouteBackward& a, int64 token, float* sparse) {
    constexpr int kEach = kMaxChosen / 32;
    float g[kEach], s[kEach], dot = 0.0f, total = 0.0f;
    int expert[kEach];
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
        const int j = h * 32 + lane_of_warp();
        g[h] = s[h] = 0.0f;
        expert[h] = -1;
        if (j >= a.k) continue;
        expert[h] = a.indices[token * a.k + j];
        g[h] = a.dweights[token * a.k + j] * a.scale;
        s[h] = a.scores[token * a.k + j];
        dot += g[h] * s[h];
        total += s[h];
    }
    dot = sum_lanes(dot, 32);
    total = sum_lanes(total, 32) + a.eps;
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
        if (unsigned(expert[h]) >= unsigned(a.experts)) continue;
        float ds = g[h];
        if (a.normalize) ds = (ds - dot / total) / total;
        ds *= s[h];
        sparse[expert[h]] = a.softmax ? ds : ds * (1.0f - s[h]);
    }
    return dot;
}

__global__ void __launch_bounds__(256) moe_route_backward(const MoeRouteBackward a) {
    const int lane = lane_of_warp(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64 token = int64(blockIdx.x) * warps + warp;
    if (token >= a.tokens) return;
    const int items = (a.experts + 31) / 32;
    float* dlogits = a.dlogits + token * a.experts;
    if (a.mask && !a.mask[token]) {
        for (int i = lane; i < a.experts; i += 32) dlogits[i] = 0.0f;
        return;
    }
    float* sparse = shared_memory() + warp * items * 32;
    for (int i = 0; i < items; ++i) sparse[i * 32 + lane] = 0.0f;
    __syncwarp();
    const float dot = choices(a, token, sparse);
    __syncwarp();
    const bool dense = a.softmax && !a.normalize;
    if (!dense && !a.dscore_sums && !a.dz_sum) {
        for (int i = lane; i < a.experts; i += 32) dlogits[i] = sparse[i];
        return;
    }

    const float* logits = a.logits + token * a.stride;
    Score score{a.softmax != 0, 0.0f, 1.0f};
    float lse = 0.0f, dlse = 0.0f;
    if (a.softmax || a.dz_sum) {
        const Exponents row = exponents(items, [&](int i) {
            const int expert = i * 32 + lane;
            return expert < a.experts ? logits[expert] : -INFINITY;
        });
        score.shift = row.shift;
        score.factor = row.inverse();
        lse = row.log_sum();
        if (a.dz_sum) dlse = 2.0f * *a.dz_sum * lse;
    }
    float inverse = 1.0f, mean = 0.0f;  // 1 / sum s; sum D p
    const float* D = nullptr;
    if (a.dscore_sums) {
        const Sequences sequences{a.bounds, a.sequences, a.wide};
        D = a.dscore_sums + int64(sequences.of(int(token))) * a.experts;
        float total = 0.0f;
        for (int i = lane; i < a.experts; i += 32) {
            const float s = score(logits[i]);
            total += s;
            mean += D[i] * s;
        }
        total = sum_lanes(total, 32);
        if (!a.softmax) inverse = 1.0f / total;
        mean = sum_lanes(mean, 32) * inverse;
    }
    for (int i = lane; i < a.experts; i += 32) {
        const float z = logits[i], s = score(z);
        float d = sparse[i];
        if (dense) d -= s * dot;
        if (D) {
            const float p = s * inverse * (D[i] - mean);
            d += a.softmax ? p : p * (1.0f - s);
        }
        if (a.dz_sum) d += dlse * expf(z - lse);
        dlogits[i] = d;
    }
}

#ifndef __CUDACC_RTC__
KernelTable moe_route_backward_kernels() {
    return {table_row("tigon::moe_route_backward", moe_route_backward)};
}
#endif

}  // namespace tigon
