// The choices of all tokens in the order of their experts: a counting sort, stable by token.
//
// moe_histogram counts the choices of an expert in each chunk of tokens (chunks,e); moe_route.cu
// does so while it chooses. moe_count turns that into prefixes: entry (b,i) becomes how many
// choices of expert i the chunks before b hold; it leaves the counts (e), and joins the chunks'
// z_sums. moe_sort then places each chunk's choices: offsets (e+1), order (t k), -1 past
// offsets[e], and inverse (t k), -1 for a skipped choice. Every place is computed, none is grabbed,
// so the result does not depend on when a block runs.
#include "common/expert_order.cuh"

namespace tigon {

constexpr int kColumns = 32;  // experts a block
constexpr int kRuns = 16;     // threads that share a column
constexpr int kRun = 16;      // chunks of a thread, in registers

struct MoeHistogram {
    const int* indices;  // (t,k)
    int* histogram;
    int tokens, experts, k, chunk;
};

__global__ void __launch_bounds__(256) moe_histogram(const MoeHistogram a) {
    int* counts = reinterpret_cast<int*>(shared_memory());  // (e)
    const int first = blockIdx.x * a.chunk, last = min(first + a.chunk, a.tokens);
    for (int i = threadIdx.x; i < a.experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const int64 end = int64(last) * a.k;
    for (int64 c = int64(first) * a.k + threadIdx.x; c < end; c += blockDim.x)
        if (unsigned(a.indices[c]) < unsigned(a.experts)) atomicAdd(counts + a.indices[c], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < a.experts; i += blockDim.x)
        a.histogram[int64(blockIdx.x) * a.experts + i] = counts[i];
}

struct MoeCount {
    int* histogram;
    int* counts;
    const float* z_sums;  // (chunks), null: none wanted
    float* z_sum;
    int chunks, experts;
};

__global__ void __launch_bounds__(kColumns* kRuns) moe_count(const MoeCount a) {
    int* sums = reinterpret_cast<int*>(shared_memory());  // (kRuns, kColumns)
    const int column = threadIdx.x % kColumns, run = threadIdx.x / kColumns;
    const int expert = blockIdx.x * kColumns + column;
    int before = 0;
#pragma unroll 1
    for (int slab = 0; slab < a.chunks; slab += kRuns * kRun) {
        const int first = slab + run * kRun;
        int count[kRun], sum = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const bool real = first + i < a.chunks && expert < a.experts;
            count[i] = real ? a.histogram[int64(first + i) * a.experts + expert] : 0;
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) sum += count[i];
        sums[threadIdx.x] = sum;
        __syncthreads();
        int place = before;
        for (int r = 0; r < kRuns; ++r) {
            const int other = sums[r * kColumns + column];
            if (r < run) place += other;
            before += other;
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (first + i >= a.chunks || expert >= a.experts) continue;
            a.histogram[int64(first + i) * a.experts + expert] = place;
            place += count[i];
        }
        __syncthreads();
    }
    if (run == 0 && expert < a.experts) a.counts[expert] = before;
    if (a.z_sums && blockIdx.x == 0 && threadIdx.x < 32) {
        float z = 0.0f;
        for (int i = threadIdx.x; i < a.chunks; i += 32) z += a.z_sums[i];
        z = sum_lanes(z, 32);
        if (threadIdx.x == 0) *a.z_sum = z;
    }
}

struct MoeSort {
    const int* indices;    // (t,k)
    const int* histogram;  // as moe_count leaves it
    const int* counts;
    int* offsets;
    int* order;
    int* inverse;
    int tokens, experts, k, chunk;
};

__global__ void __launch_bounds__(256) moe_sort(const MoeSort a) {
    int* base = reinterpret_cast<int*>(shared_memory());  // (e+1)
    unsigned* bits = reinterpret_cast<unsigned*>(base + a.experts + 1);
    int* totals = base + 2 * a.experts + 1;
    offsets_of_experts(a.counts, a.experts, base, totals);
    const int first = blockIdx.x * a.chunk, last = min(first + a.chunk, a.tokens);
    const int placed = base[a.experts];
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i <= a.experts; i += blockDim.x) a.offsets[i] = base[i];
    // This block's part of what is past the last choice.
    const int64 end = int64(last) * a.k;
    for (int64 i = max(int64(first) * a.k, int64(placed)) + threadIdx.x; i < end; i += blockDim.x)
        a.order[i] = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < a.experts; i += blockDim.x)
        base[i] += a.histogram[int64(blockIdx.x) * a.experts + i];
    place_choices(a.indices, a.order, a.inverse, first, last, a.k, a.experts, base, bits);
}

#ifndef __CUDACC_RTC__
KernelTable moe_sort_kernels() {
    return {table_row("tigon::moe_histogram", moe_histogram),
            table_row("tigon::moe_count", moe_count), table_row("tigon::moe_sort", moe_sort)};
}
#endif

}  // namespace tigon
