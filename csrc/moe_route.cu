// Which experts a token goes to, and with what weights.
//
//   s = sigmoid(z) or softmax(z);  the k best of s + bias;  w = scale s / (sum of the k s + eps)
//
// logits z (t,e), their rows strided at will; bias (e); indices, weights and scores (t,k), best
// first, equal ones by index. With groups only the experts of the best groups may be chosen: those
// whose two best s + bias have the largest sums. A masked token chooses e, which is no expert.
//
// One warp a token; up to 1,024 experts its scores lie in registers, otherwise, and with groups, in
// shared memory. A block owns a chunk of tokens and counts their choices in shared memory: row
// `chunk` of the histogram, from which moe_sort.cu makes the order by expert. A single chunk is
// sorted at once.
//
// For the losses, z_sums is the chunk's sum of logsumexp(z)^2, and a second pass without the bias
// leaves a bit for each expert that would be chosen, and the shift and factor that turn a logit
// into its share of the scores.
#include "common/expert_order.cuh"
#include "common/expert_score.cuh"
#include "common/select.cuh"

namespace tigon {

struct MoeRoute {
    const float* logits;
    const float* bias;  // may be null
    const uint8* mask;  // may be null
    int* indices;
    float* weights;
    float* scores;
    int* histogram;   // (chunks,e)
    float* z_sums;    // (chunks), null: not wanted
    float* shares;    // (t,2) shift and factor, null: no sums wanted
    unsigned* plain;  // (t, words) bits of the choice without the bias
    int* offsets;     // the rest is for a single chunk; null otherwise
    int* order;
    int* inverse;
    int64 stride;  // of the logits' rows
    int tokens, experts, k, chunk;
    int groups, top_groups, softmax, normalize;
    float scale, eps;
};

// Shared memory, in this order; python/native/moe.py counts the same. Sizes in words.
struct RouteMemory {
    int* histogram;  // (e), later where the next choice of an expert goes (e+1)
    unsigned* bits;  // (e)
    float* bias;     // (e) in whole multiples of 32 items; zeros without one
    Chosen* chosen;  // a warp each
    float* z;        // a warp each; likewise totals
    unsigned* rows;  // keys of experts and groups, a warp each

    // columns: entries of a row, whole warps of them.
    __device__ RouteMemory(float* memory, int experts, int columns) {
        const int warps = blockDim.x / 32, padded = (experts + 4) / 4 * 4;
        histogram = reinterpret_cast<int*>(memory);
        bits = reinterpret_cast<unsigned*>(memory) + padded;
        bias = memory + 2 * padded;
        chosen = reinterpret_cast<Chosen*>(bias + columns);
        z = reinterpret_cast<float*>(chosen + warps);
        rows = reinterpret_cast<unsigned*>(z + 32);
    }
};

// Turns a row of logits into keys of their scores plus bias; returns this lane's sum of the scores.
template <int kItems, typename Rule>
__device__ __forceinline__ float rank(Row<kItems>& row, int experts, const float* bias,
                                      const Rule& score) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < row.items(); ++i) {
        const int expert = i * 32 + lane_of_warp();
        const float s = score(__uint_as_float(row[i]));
        total += s;  // 0 past the end, where the logit is -inf
        const unsigned key = key_of(bias ? s + bias[expert] : s);
        row[i] = expert < experts ? key : 0;
    }
    return total;
}

// Removes the experts of all groups but the best ones from the row of keys.
__device__ __forceinline__ void keep_groups(const MoeRoute& a, Row<0>& row, unsigned* keys,
                                            unsigned* group_keys) {
    const int size = a.experts / a.groups, lane = lane_of_warp();
    int lanes = 32;  // a group
    while (lanes > 1 && lanes * a.groups > 32) lanes /= 2;
    Row<0> groups(group_keys, a.groups);
    for (int i = 0; i < groups.items(); ++i) groups[i] = 0;
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < a.groups; first += 32 / lanes) {
        const int group = first + lane / lanes;
        float best = -INFINITY, second = -INFINITY;
        if (group < a.groups) {
#pragma unroll 1
            for (int i = lane % lanes; i < size; i += lanes) {
                const float score = score_of(keys[group * size + i]);
                second = fmaxf(second, fminf(best, score));
                best = fmaxf(best, score);
            }
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(kWholeWarp, best, offset);
            second = fmaxf(fmaxf(second, __shfl_xor_sync(kWholeWarp, second, offset)),
                           fminf(best, other));
            best = fmaxf(best, other);
        }
        const float sum = size > 1 ? best + second : best;
        // inf - inf comes first, as in a sort of torch's.
        if (lane % lanes == 0 && group < a.groups)
            group_keys[group] = sum != sum ? 0xfffffffeu : key_of(sum);
    }
    __syncwarp();
    unsigned low = 1;
    narrow(groups, __reduce_max_sync(kWholeWarp, largest_of_lane(groups)), low, a.top_groups,
           a.top_groups);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < row.items(); ++i) {
        const int expert = i * 32 + lane;
        if (expert < a.experts && group_keys[expert / size] < low) row[i] = 0;
    }
    __syncwarp();
}

// Writes the k choices of a token. `bad`: one of its logits is NaN.
__device__ __forceinline__ void emit(const MoeRoute& a, int token, const float* logits,
                                     const Score& score, const Chosen& chosen, bool bad,
                                     int* histogram) {
    constexpr int kEach = kMaxChosen / 32;
    const int lane = lane_of_warp();
    int index[kEach];
    float s[kEach], sum = 0.0f;
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
        s[h] = 0.0f;
        index[h] = 0;
        if (h * 32 + lane >= a.k) continue;
        index[h] = chosen.index[h * 32 + lane];
        s[h] = bad ? NAN : score(logits[index[h]]);
        sum += s[h];
    }
    sum = sum_lanes(sum, 32) + a.eps;
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
        const int j = h * 32 + lane;
        if (j >= a.k) continue;
        const int64 at = int64(token) * a.k + j;
        a.indices[at] = index[h];
        a.scores[at] = s[h];
        a.weights[at] = (a.normalize ? s[h] / sum : s[h]) * a.scale;
        atomicAdd(histogram + index[h], 1);
    }
}

// Routes a token and returns logsumexp(z)^2 (or 0 where that is not wanted).
template <int kItems>
__device__ __forceinline__ float route(const MoeRoute& a, int token, const RouteMemory& memory) {
    const int lane = lane_of_warp(), warp = threadIdx.x / 32;
    const float* logits = a.logits + token * a.stride;
    Chosen& chosen = memory.chosen[warp];
    const int entries = (a.experts + 31) / 32 * 32;
    unsigned* keys =
        memory.rows + warp * (entries + (a.groups > 1 ? (a.groups + 31) / 32 * 32 : 0));
    Row<kItems> row(keys, a.experts);
    Score score{a.softmax != 0, 0.0f, 1.0f};
    float z = 0.0f;
    const int passes = a.shares ? 2 : 1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
        bool bad = false;
#pragma unroll
        for (int i = 0; i < row.items(); ++i) {
            const int expert = i * 32 + lane;
            const float logit = expert < a.experts ? logits[expert] : -INFINITY;
            bad |= logit != logit;
            row[i] = __float_as_uint(logit);
        }
        if (pass == 0 && (a.softmax || a.z_sums)) {
            const Exponents found =
                exponents(row.items(), [&](int i) { return __uint_as_float(row[i]); });
            score.shift = found.shift;
            score.factor = found.inverse();
            z = found.log_sum() * found.log_sum();
        }
        const float* bias = pass == 0 ? memory.bias : nullptr;
        float total = 0.0f;
        if (a.softmax)
            total =
                rank(row, a.experts, bias, [&](float logit) { return score.of_softmax(logit); });
        else
            total = rank(row, a.experts, bias, [](float logit) { return sigmoid(logit); });
        if constexpr (kItems == 0) {
            if (a.groups > 1) keep_groups(a, row, keys, keys + entries);
        }
        if (pass == 0) {
            choose(row, a.k, chosen);
            emit(a, token, logits, score, chosen, __any_sync(kWholeWarp, bad), memory.histogram);
        } else {
            unsigned low;
            threshold(row, a.k, a.k, chosen, low);
            const int words = (a.experts + 31) / 32;
#pragma unroll
            for (int i = 0; i < row.items(); ++i) {
                const unsigned bits = __ballot_sync(kWholeWarp, row[i] >= low);
                if (lane == 0 && i < words) a.plain[int64(token) * words + i] = bits;
            }
            total = sum_lanes(total, 32);
            if (lane == 0) {
                a.shares[int64(token) * 2] = score.shift;
                a.shares[int64(token) * 2 + 1] = a.softmax ? score.factor : 1.0f / total;
            }
        }
        __syncwarp();
    }
    return a.z_sums ? z : 0.0f;
}

template <int kItems>
__global__ void __launch_bounds__(512, kItems == 32 ? 1 : 2) moe_route(const MoeRoute a) {
    const int columns = kItems ? kItems * 32 : (a.experts + 31) / 32 * 32;
    const RouteMemory memory(shared_memory(), a.experts, columns);
    const int first = blockIdx.x * a.chunk, last = min(first + a.chunk, a.tokens);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < a.experts; i += blockDim.x) memory.histogram[i] = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        memory.bias[i] = a.bias && i < a.experts ? a.bias[i] : 0.0f;
    __syncthreads();

    float z = 0.0f;
#pragma unroll 1
    for (int token = first + warp; token < last; token += warps) {
        if (a.mask == nullptr || a.mask[token]) {
            z += route<kItems>(a, token, memory);
            continue;
        }
        for (int j = lane_of_warp(); j < a.k; j += 32) {
            const int64 at = int64(token) * a.k + j;
            a.indices[at] = a.experts;
            a.weights[at] = a.scores[at] = 0.0f;
        }
    }
    if (lane_of_warp() == 0) memory.z[warp] = z;
    __syncthreads();
    for (int i = threadIdx.x; i < a.experts; i += blockDim.x)
        a.histogram[int64(blockIdx.x) * a.experts + i] = memory.histogram[i];
    if (a.z_sums && threadIdx.x == 0) {
        z = 0.0f;
        for (int w = 0; w < warps; ++w) z += memory.z[w];
        a.z_sums[blockIdx.x] = z;
    }
    if (a.offsets == nullptr) return;

    __syncthreads();
    offsets_of_experts(a.histogram, a.experts, memory.histogram, reinterpret_cast<int*>(memory.z));
    for (int i = threadIdx.x; i <= a.experts; i += blockDim.x) a.offsets[i] = memory.histogram[i];
    for (int i = memory.histogram[a.experts] + threadIdx.x; i < a.tokens * a.k; i += blockDim.x)
        a.order[i] = -1;
    __syncthreads();
    place_choices(a.indices, a.order, a.inverse, 0, a.tokens, a.k, a.experts, memory.histogram,
                  memory.bits);
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Items) table_row("tigon::moe_route<" #Items ">", moe_route<Items>)

KernelTable moe_route_kernels() {
    return {TIGON_ROW(0), TIGON_ROW(4), TIGON_ROW(8), TIGON_ROW(16), TIGON_ROW(32)};
}

#undef TIGON_ROW
#endif

}  // namespace tigon
