// The normalizer of each line of logits, and what top-k and top-p leave of it.
//
//   max = max x,   sum = sum 2^(log2(e) / temperature (x - max))
//
// logit_stats reads every logit once, a block a chunk; a thread keeps a running maximum and
// rescales its sum when that grows, 16-byte loads, four on their way. At b 32, K 5, V 131,072 in
// bf16 the `token` rule reads 50 MB of the target and 42 MB of the drafts, in 5,632 blocks of 16
// KB.
//
// logit_cuts finds the k-th largest logit, and then the smallest of those whose mass reaches p, by
// descent on the digits of order-preserving keys: histograms of 11 bits of how many there are and
// what they weigh, in shared memory, one pass over the line a digit (two digits for 16-bit logits,
// three for fp32). Masses are integers of a unit that cannot overflow, so that sums do not depend
// on the order of the atomics. Of equal logits at the threshold those of the lowest indices are
// kept: one more pass finds the last of them. A block a line, which stays in the L2 cache.
#include "common/logits.cuh"

namespace tigon {

__device__ __forceinline__ Peak joined(Peak a, Peak b, float scale) {
    const float most = max_nan(a.max, b.max);
    const float left = a.max == most ? a.sum : a.sum * exp2f(scale * (a.max - most));
    const float right = b.max == most ? b.sum : b.sum * exp2f(scale * (b.max - most));
    return {most, left + right};
}

template <typename Io>
__global__ void __launch_bounds__(256) logit_stats(const Sampling a) {
    const Line<Io> line(a, blockIdx.x / a.splits);
    const int split = blockIdx.x % a.splits;
    if (!(rejects(a, line.row) || is_cut(a, line.row)) || !line.is_live(a)) return;
    const float scale = scale_of(a, line.row);
    const int begin = split * a.chunk, end = min(begin + a.chunk, a.V);
    Peak mine{-INFINITY, 0.0f};
    each_piece<4>(line.logits, begin, end, a.vectors, [&](int, const float (&x)[kVector<Io>]) {
        float most = x[0];
#pragma unroll
        for (int i = 1; i < kVector<Io>; ++i) most = max_nan(most, x[i]);
        if (!(most <= mine.max) && mine.max == mine.max) {  // a NaN is the maximum for good
            if (mine.max > -INFINITY) mine.sum *= exp2f(scale * (mine.max - most));
            mine.max = most;
        }
        if (mine.max > -INFINITY) {
#pragma unroll
            for (int i = 0; i < kVector<Io>; ++i) mine.sum += power(scale * (x[i] - mine.max));
        }
    });
    for (int offset = 16; offset > 0; offset /= 2)
        mine = joined(mine,
                      {__shfl_xor_sync(kWholeWarp, mine.max, offset),
                       __shfl_xor_sync(kWholeWarp, mine.sum, offset)},
                      scale);
    Peak* warps = reinterpret_cast<Peak*>(shared_memory());
    if (lane_of_warp() == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < blockDim.x / 32; ++w) mine = joined(mine, warps[w], scale);
    a.peaks[blockIdx.x] = mine;
}

constexpr int kBins = 2048, kGroup = 32, kGroups = kBins / kGroup;

// Shared memory of a search; python/native/sampling.py counts the same.
struct Search {
    unsigned count[kBins];
    unsigned low[kBins], high[kBins];  // of the masses
    unsigned group_count[kGroups];
    uint64 group_mass[kGroups];
    uint64 need;   // still to be found, entries or mass
    uint64 above;  // mass of what is kept for certain
    int bin;       // where the need is met, -1: nowhere
    Peak peak;

    __device__ uint64 mass(int i) const { return uint64(high[i]) << 32 | low[i]; }
};
static_assert(sizeof(Search) <= 12 * kBins + 1024, "shared memory of logit_cuts");

__device__ __forceinline__ void clear(Search& s) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) s.count[i] = s.low[i] = s.high[i] = 0;
    __syncthreads();
}

__device__ __forceinline__ void put(Search& s, int bin, uint64 mass) {
    atomicAdd(s.count + bin, 1u);
    const unsigned low = static_cast<unsigned>(mass);
    unsigned high = static_cast<unsigned>(mass >> 32);
    if (low) high += atomicAdd(s.low + bin, low) + low < low;  // the carry
    if (high) atomicAdd(s.high + bin, high);
}

// Finds the bin, from the highest down, in which `need` is met; what lies above is subtracted from
// it. share < 1: first sets the need to this share of the whole mass.
__device__ __forceinline__ void locate(Search& s, bool by_mass, float share) {
    __syncthreads();
    for (int g = threadIdx.x; g < kGroups; g += blockDim.x) {
        unsigned entries = 0;
        uint64 mass = 0;
#pragma unroll 4
        for (int i = 0; i < kGroup; ++i) {
            const int bin = g * kGroup + ((i + g) & (kGroup - 1));  // each lane another bank
            entries += s.count[bin];
            mass += s.mass(bin);
        }
        s.group_count[g] = entries;
        s.group_mass[g] = mass;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint64 need = s.need, above = s.above;
        if (share < 1.0f) {
            uint64 whole = 0;
            for (int g = 0; g < kGroups; ++g) whole += s.group_mass[g];
            const double wanted = static_cast<double>(share) * static_cast<double>(whole);
            need = static_cast<uint64>(wanted);
            need += static_cast<double>(need) < wanted;
            need = max(min(need, whole), 1ull);
        }
        int g = kGroups - 1, bin = -1;
        for (; g >= 0; --g) {
            const uint64 mass = s.group_mass[g], reached = by_mass ? mass : s.group_count[g];
            if (reached >= need) break;
            need -= reached;
            above += mass;
        }
        if (g >= 0) {
            for (bin = g * kGroup + kGroup - 1;; --bin) {
                const uint64 mass = s.mass(bin), reached = by_mass ? mass : s.count[bin];
                if (reached >= need) break;
                need -= reached;
                above += mass;
            }
        }
        s.need = need;
        s.above = above;
        s.bin = bin;
    }
    __syncthreads();
}

// The index of the entry number `need` (from 1) whose key is `key`.
template <typename Io>
__device__ __forceinline__ int index_of_equal(Search& s, const Sampling& a, const Io* logits,
                                              unsigned key) {
    int shift = 0;
    while ((a.V - 1) >> shift >= kBins) ++shift;
    clear(s);
    each_piece<2>(logits, 0, a.V, a.vectors, [&](int at, const float (&x)[kVector<Io>]) {
#pragma unroll
        for (int i = 0; i < kVector<Io>; ++i)
            if (at + i < a.V && key_of(x[i]) == key)
                atomicAdd(s.count + (kBins - 1 - ((at + i) >> shift)), 1u);
    });
    locate(s, false, 1.0f);
    const int begin = (kBins - 1 - s.bin) << shift;
    unsigned need = static_cast<unsigned>(s.need);
    for (int first = begin;; first += 32) {
        const int i = first + lane_of_warp();
        const bool equal = i < a.V && key_of(to_float(logits[i]) + 0.0f) == key;
        unsigned found = __ballot_sync(kWholeWarp, equal);
        const unsigned count = __popc(found);
        if (count < need && first + 32 < a.V) {
            need -= count;
            continue;
        }
        while (need-- > 1) found &= found - 1;
        return first + __popc((found & -found) - 1);
    }
}

// Narrows `cut` to the largest `need` entries of those it keeps, or to the share of their mass.
template <typename Io>
__device__ __forceinline__ void narrow_cut(Search& s, const Sampling& a, const Io* logits,
                                           float scale, bool by_mass, int count, float share,
                                           Cut& cut) {
    constexpr int kLevels = sizeof(Io) == 4 ? 3 : 2;  // 16-bit logits have no bits below the 10th
    const Softmax kept{scale, cut.max, 0.0f, cut.key, cut.index, true, false};
    unsigned prefix = 0;
    __syncthreads();  // the search before is read
    if (threadIdx.x == 0) {
        s.need = count;
        s.above = 0;
    }
#pragma unroll 1
    for (int level = 0; level < kLevels; ++level) {
        const int shift = level == 0 ? 21 : level == 1 ? 10 : 0;
        const int known = level == 0 ? 32 : level == 1 ? 21 : 10;
        clear(s);
        each_piece<2>(logits, 0, a.V, a.vectors, [&](int at, const float (&x)[kVector<Io>]) {
#pragma unroll
            for (int i = 0; i < kVector<Io>; ++i) {
                const unsigned key = key_of(x[i]);
                if (!(x[i] > -INFINITY) || !kept.keeps(x[i], at + i)) continue;
                if (known < 32 && key >> known != prefix) continue;
                const float weight = power(scale * (x[i] - cut.max)) * a.mass_unit;
                put(s, key >> shift & (kBins - 1) >> (level == 2), static_cast<uint64>(weight));
            }
        });
        locate(s, by_mass, by_mass && level == 0 ? share : 1.0f);
        if (s.bin < 0) {  // fewer entries than wanted: all are kept
            cut.sum = static_cast<float>(s.above) / a.mass_unit;
            return;
        }
        prefix = level == 2 ? prefix << 10 | s.bin : prefix << 11 | s.bin;
    }
    if (kLevels == 2) prefix = prefix << 10 | (prefix >> 21 ? 0 : 0x3ffu);
    const unsigned equals = s.count[s.bin];
    const uint64 each = s.mass(s.bin) / equals;
    uint64 need = s.need;
    if (by_mass) need = each ? (need + each - 1) / each : equals;
    cut.sum = static_cast<float>(s.above + need * each) / a.mass_unit;
    cut.key = prefix;
    cut.index = 0x7fffffff;
    if (need < equals) {
        // A cut that was made before may share the key: of its equals the first ones remain.
        __syncthreads();
        if (threadIdx.x == 0) s.need = need;
        cut.index = index_of_equal<Io>(s, a, logits, prefix);
    } else if (prefix == kept.key) {
        cut.index = kept.index;
    }
}

template <typename Io>
__global__ void __launch_bounds__(512) logit_cuts(const Sampling a) {
    const Line<Io> line(a, blockIdx.x);
    if (!is_cut(a, line.row) || !line.is_live(a)) return;
    Search& s = *reinterpret_cast<Search*>(shared_memory());
    const float scale = scale_of(a, line.row);
    if (threadIdx.x < 32) {
        const Peak peak = join_peaks(a.peaks + int64(blockIdx.x) * a.splits, a.splits, scale);
        if (threadIdx.x == 0) s.peak = peak;
    }
    __syncthreads();
    Cut cut{0, 0x7fffffff, s.peak.max, s.peak.sum};
    if (cut.sum > 0.0f && cut.sum < INFINITY) {
        const int k = a.top_ks ? a.top_ks[line.row] : a.top_k;
        const float p = a.top_ps ? a.top_ps[line.row] : a.top_p;
        if (k > 0 && k < a.V) narrow_cut<Io>(s, a, line.logits, scale, false, k, 1.0f, cut);
        if (p < 1.0f) narrow_cut<Io>(s, a, line.logits, scale, true, 0, p, cut);
    }
    if (threadIdx.x == 0) a.cuts[blockIdx.x] = cut;
}

#ifndef __CUDACC_RTC__
#define TIGON_ROWS(Io)                                                \
    table_row("tigon::logit_stats<tigon::" #Io ">", logit_stats<Io>), \
        table_row("tigon::logit_cuts<tigon::" #Io ">", logit_cuts<Io>)

KernelTable logit_stats_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#endif

}  // namespace tigon
