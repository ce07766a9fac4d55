// The sums of the load-balancing loss, of each sequence and expert, in a fixed order.
//
//   score_sums[q,i] = sum of p_ti over the tokens t of sequence q,   p = s / sum of s over all
//   experts aux_counts[q,i] = how many of them would choose i without the bias
//
// From what moe_route.cu leaves: p_ti = sigmoid(z_ti) factor_t or exp(z_ti - shift_t) factor_t, and
// a bit for each choice. moe_sums adds over the part of a sequence that lies in one chunk: its part
// (b,q) is row b + q, for from one part to the next either b or q grows. moe_join adds the parts.
#include "common/expert_score.cuh"
#include "common/sequences.cuh"

namespace tigon {

constexpr int kColumns = 32;  // experts a block of moe_join
constexpr int kRuns = 8;      // threads that share a column

struct MoeSums {
    const float* logits;
    const float* shares;    // (t,2)
    const unsigned* plain;  // (t, words)
    const uint8* mask;      // may be null
    const void* bounds;     // cu_seqlens, null: one sequence
    float* part_sums;       // (chunks + s, e)
    int* part_counts;
    int64 stride;
    int tokens, experts, chunk, sequences, wide, softmax;
};

__global__ void __launch_bounds__(128, 8) moe_sums(const MoeSums a) {
    const int expert = blockIdx.y * blockDim.x + threadIdx.x;
    if (expert >= a.experts) return;
    const int first = blockIdx.x * a.chunk, last = min(first + a.chunk, a.tokens);
    const Sequences sequences{a.bounds, a.sequences, a.wide};
    const int words = (a.experts + 31) / 32;
    for (int token = first; token < last;) {
        const int sequence = sequences.of(token);
        const int end = sequence + 1 < a.sequences
                            ? min(last, max(sequences.last(sequence, a.tokens), token + 1))
                            : last;
        float sum = 0.0f;
        int count = 0;
#pragma unroll 4
        for (; token < end; ++token) {
            const bool live = !a.mask || a.mask[token];
            const float* share = a.shares + int64(token) * 2;
            const float z = a.logits[token * a.stride + expert];
            const float s = a.softmax ? expf(z - share[0]) : sigmoid(z);
            const unsigned bits = a.plain[int64(token) * words + expert / 32];
            sum += live ? __fmul_rn(s, share[1]) : 0.0f;
            count += live ? bits >> (expert % 32) & 1 : 0;
        }
        const int64 at = (int64(blockIdx.x) + sequence) * a.experts + expert;
        a.part_sums[at] = sum;
        a.part_counts[at] = count;
    }
}

struct MoeJoin {
    const void* bounds;
    const float* part_sums;
    const int* part_counts;
    float* score_sums;  // (s,e)
    int* aux_counts;
    int tokens, experts, chunk, sequences, wide, unused;
};

__global__ void __launch_bounds__(kColumns* kRuns) moe_join(const MoeJoin a) {
    float* sums = shared_memory();                            // (kRuns, kColumns)
    int* counts = reinterpret_cast<int*>(sums) + blockDim.x;  // likewise
    const int across = (a.experts + kColumns - 1) / kColumns;
    const int sequence = blockIdx.x / across, run = threadIdx.x / kColumns;
    const int column = threadIdx.x % kColumns, expert = blockIdx.x % across * kColumns + column;
    const Sequences sequences{a.bounds, a.sequences, a.wide};
    const int begin = sequences.first(sequence, a.tokens);
    const int end = sequences.last(sequence, a.tokens);
    float sum = 0.0f;
    int count = 0;
    if (begin < end && expert < a.experts) {
        const int first = begin / a.chunk, chunks = (end - 1) / a.chunk + 1 - first;
        const int each = (chunks + kRuns - 1) / kRuns;
        const int last = min((run + 1) * each, chunks);
#pragma unroll 8
        for (int i = run * each; i < last; ++i) {
            const int64 at = (int64(first + i) + sequence) * a.experts + expert;
            sum += a.part_sums[at];
            count += a.part_counts[at];
        }
    }
    sums[threadIdx.x] = sum;
    counts[threadIdx.x] = count;
    __syncthreads();
    if (run > 0 || expert >= a.experts) return;
    for (int r = 1; r < kRuns; ++r) {
        sum += sums[r * kColumns + column];
        count += counts[r * kColumns + column];
    }
    a.score_sums[int64(sequence) * a.experts + expert] = sum;
    a.aux_counts[int64(sequence) * a.experts + expert] = count;
}

#ifndef __CUDACC_RTC__
KernelTable moe_sums_kernels() {
    return {table_row("tigon::moe_sums", moe_sums), table_row("tigon::moe_join", moe_join)};
}
#endif

}  // namespace tigon
