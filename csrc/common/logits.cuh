// What the kernels of sampling share: their arguments, reading logits, noise, winners.
//
// A row of a call is a request. Its slots are the positions 0..K (or the nodes of a tree) that the
// target has logits for; logits of the drafts, where there are some, are further `lines` of V
// logits: line r < b slots is the target's, the others are the drafts'. V is split into chunks, a
// block each; partial results lie by (line, chunk) and are joined in a fixed order.
#pragma once

#include "philox.cuh"
#include "select.cuh"
#include "types.cuh"

namespace tigon {

// Codes of tigon.reference.sampling.
enum VerifyRule : int { kToken = 0, kBlock = 1, kStrict = 2, kGreedy = 3 };
enum Purpose : int { kDraft = 0, kAccept = 1, kResidual = 2, kBonus = 3 };

constexpr int kMaxSlots = 33;      // K + 1 positions of target and K of the drafts; 32 nodes
constexpr float kColdest = 1e-6f;  // a temperature below counts as 0
constexpr float kLog2E = 1.4426950408889634f;

// 2^x, 0 below the normal numbers: one instruction.
__device__ __forceinline__ float power(float x) {
#ifdef TIGON_HOST_BUILD
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

struct Peak {
    float max;  // of the logits
    float sum;  // of 2^(scale2 (logit - max))
};

// What top-k and top-p leave of a line: logits above the key, and of those equal to it the ones up
// to the index.
struct Cut {
    unsigned key;
    int index;
    float max, sum;
};

struct Verdict {
    int accepted;  // -1: bad logits or padding
    int drafts;
};

// python/native/sampling.py packs the same.
struct Sampling {
    const void* target;         // (b,slots,V)
    const void* draft;          // (b,drafts,V), may be null
    const int* tokens;          // (b,drafts), of trees (b,slots)
    const int* counts;          // (b) drafts or nodes that are real, may be null
    const signed char* rules;   // (b); here and below null: the same for all rows
    const int64* seeds;         // (b)
    const int64* positions;     // (b)
    const float* temperatures;  // (b)
    const int* top_ks;          // (b)
    const float* top_ps;        // (b)
    Peak* peaks;                // (lines, splits)
    Cut* cuts;                  // (lines), null: no row is cut
    float* masses;              // (b,drafts,splits)
    uint64* winners;            // (b,slots,splits)
    Verdict* verdicts;          // (b)
    const unsigned* ancestors;  // (b,slots) of trees
    const int* depths;          // (b,slots) of trees
    const int* first_child;     // of trees; likewise the next
    const int* next_sibling;
    int* out;       // (b,slots), of trees (b,max_depth+1)
    int* accepted;  // (b)
    int* path;      // (b,max_depth)
    int64 target_row, target_slot, draft_row, draft_slot, tokens_row, child_row, sibling_row;
    int batch, slots, drafts, V, splits, chunk;
    int rule, top_k, purpose, tree, vectors, max_depth;
    float temperature, top_p, mass_unit, unused;
};

__device__ __forceinline__ int rule_of(const Sampling& a, int row) {
    return a.rules ? a.rules[row] : a.rule;
}
__device__ __forceinline__ float temperature_of(const Sampling& a, int row) {
    return a.temperatures ? a.temperatures[row] : a.temperature;
}
// The largest logit is taken.
__device__ __forceinline__ bool is_greedy(const Sampling& a, int row) {
    return rule_of(a, row) == kGreedy || !(temperature_of(a, row) >= kColdest);
}
__device__ __forceinline__ bool rejects(const Sampling& a, int row) {
    const int rule = rule_of(a, row);
    return (rule == kToken || rule == kBlock) && !is_greedy(a, row);
}
__device__ __forceinline__ bool is_cut(const Sampling& a, int row) {
    if (a.cuts == nullptr || is_greedy(a, row)) return false;
    const int k = a.top_ks ? a.top_ks[row] : a.top_k;
    const float p = a.top_ps ? a.top_ps[row] : a.top_p;
    return (k > 0 && k < a.V) || p < 1.0f;
}

// Drafts of a row up to the first that is no token; negative: padding.
__device__ __forceinline__ int drafts_of(const Sampling& a, int row) {
    int n = a.counts ? min(a.counts[row], a.drafts) : a.drafts;
    const int* tokens = a.tokens + row * a.tokens_row;
    for (int i = a.drafts - 1; i >= 0; --i) {
        const int token = tokens[i];
        if (token < 0 || token >= a.V) n = min(n, i);
    }
    return n;
}

// Whether the slot's own logits count.
__device__ __forceinline__ bool is_live(const Sampling& a, int row, int slot) {
    if (!a.tree) return slot <= drafts_of(a, row);
    const int nodes = a.counts ? a.counts[row] : a.slots;
    return slot < nodes && (a.ancestors[int64(row) * a.slots + slot] & 1u);
}
__device__ __forceinline__ int64 position_of(const Sampling& a, int row, int slot) {
    return a.positions[row] + (a.tree ? a.depths[int64(row) * a.slots + slot] : slot);
}

__device__ __forceinline__ int64 target_line(const Sampling& a, int row, int slot) {
    return int64(row) * a.slots + slot;
}
__device__ __forceinline__ int64 draft_line(const Sampling& a, int row, int i) {
    return int64(a.batch) * a.slots + int64(row) * a.drafts + i;
}
template <typename Io>
__device__ __forceinline__ const Io* target_logits(const Sampling& a, int row, int slot) {
    return static_cast<const Io*>(a.target) + row * a.target_row + slot * a.target_slot;
}
template <typename Io>
__device__ __forceinline__ const Io* draft_logits(const Sampling& a, int row, int i) {
    return static_cast<const Io*>(a.draft) + row * a.draft_row + i * a.draft_slot;
}

// A line by its number.
template <typename Io>
struct Line {
    int row, slot;  // slot: of the drafts' lines the draft
    bool of_target;
    const Io* logits;

    __device__ Line(const Sampling& a, int line) {
        const int targets = a.batch * a.slots;
        of_target = line < targets;
        const int each = of_target ? a.slots : a.drafts;
        if (!of_target) line -= targets;
        row = line / each;
        slot = line % each;
        logits = of_target ? target_logits<Io>(a, row, slot) : draft_logits<Io>(a, row, slot);
    }
    // Whether a kernel looks at it: a draft's only for rejection.
    __device__ bool is_live(const Sampling& a) const {
        if (of_target) return tigon::is_live(a, row, slot);
        return rejects(a, row) && slot < drafts_of(a, row);
    }
};

// The bits of kVector logits from `index` on; -inf past the end.
template <typename Io>
__device__ __forceinline__ uint4 fetch_logits(const Io* line, int index, int end, bool vectors) {
    if (vectors && index + kVector<Io> <= end) return *reinterpret_cast<const uint4*>(line + index);
    uint4 bits;
    Io values[kVector<Io>];
#pragma unroll
    for (int i = 0; i < kVector<Io>; ++i)
        values[i] = index + i < end ? line[index + i] : from_float<Io>(-INFINITY);
    memcpy(&bits, values, sizeof(bits));
    return bits;
}
// Their values; -0 becomes +0, which it equals, so that keys are equal too.
template <typename Io>
__device__ __forceinline__ void values_of(const uint4& bits, float (&x)[kVector<Io>]) {
    Io values[kVector<Io>];
    memcpy(values, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kVector<Io>; ++i) x[i] = to_float(values[i]) + 0.0f;
}

// Calls visit(index, x) with kVector logits at a time for this thread's part of [begin, end), its
// indices ascending, with kInFlight 16-byte loads on their way.
template <int kInFlight, typename Io, typename Visit>
__device__ __forceinline__ void each_piece(const Io* line, int begin, int end, bool vectors,
                                           const Visit& visit) {
    const int step = blockDim.x * kVector<Io>;
#pragma unroll 1
    for (int first = begin + threadIdx.x * kVector<Io>; first < end; first += kInFlight * step) {
        uint4 bits[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
            if (first + j * step < end)
                bits[j] = fetch_logits(line, first + j * step, end, vectors);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            if (first + j * step >= end) break;
            float x[kVector<Io>];
            values_of<Io>(bits[j], x);
            visit(first + j * step, x);
        }
    }
}

// A line's softmax: 2^(scale (x - max) - log2(sum)) is the probability of a logit that is kept.
struct Softmax {
    float scale, max, log_sum;
    unsigned key;
    int index;
    bool cut, bad;

    __device__ bool keeps(float x, int i) const {
        if (!cut) return true;
        const unsigned k = key_of(x);
        return k > key || (k == key && i <= index);
    }
    __device__ float log2_of(float x, int i) const {
        return keeps(x, i) ? scale * (x - max) - log_sum : -INFINITY;
    }
    __device__ float of(float x, int i) const { return power(log2_of(x, i)); }
};

// The chunks' peaks joined by a warp; the sum is NaN or 0 for logits that are bad.
__device__ __forceinline__ Peak join_peaks(const Peak* peaks, int splits, float scale) {
    const int lane = lane_of_warp();
    float most = -INFINITY, sum = 0.0f;
    for (int i = lane; i < splits; i += 32) most = max_nan(most, peaks[i].max);
    most = max_lanes(most, 32);
    for (int i = lane; i < splits; i += 32)
        if (peaks[i].max > -INFINITY) sum += peaks[i].sum * exp2f(scale * (peaks[i].max - most));
    return {most, most == most ? sum_lanes(sum, 32) : NAN};
}

__device__ __forceinline__ float scale_of(const Sampling& a, int row) {
    return kLog2E / temperature_of(a, row);
}

// By a warp.
__device__ __forceinline__ Softmax softmax_of(const Sampling& a, int row, int64 line) {
    Softmax s;
    s.scale = scale_of(a, row);
    s.cut = is_cut(a, row);
    Peak peak;
    s.key = 0;
    s.index = 0;
    if (s.cut) {
        const Cut cut = a.cuts[line];
        peak = {cut.max, cut.sum};
        s.key = cut.key;
        s.index = cut.index;
    } else {
        peak = join_peaks(a.peaks + line * a.splits, a.splits, s.scale);
    }
    s.max = peak.max;
    s.log_sum = log2f(peak.sum);
    s.bad = !(peak.sum > 0.0f && peak.sum < INFINITY);
    return s;
}

// A uniform number of 32 random bits; those of 1 - 2^-24 and more become that.
__device__ __forceinline__ float uniform(unsigned word) {
    return fminf(fmaf(static_cast<float>(word), 0x1p-32f, 0x1p-33f), 1.0f - 0x1p-24f);
}
__device__ __forceinline__ Words sampling_words(int64 seed, int64 position, int purpose,
                                                unsigned index) {
    const uint64 at = static_cast<uint64>(position);
    return philox(index / 4, unsigned(at), unsigned(at >> 32), 1u << 24 | unsigned(purpose),
                  static_cast<uint64>(seed));
}
constexpr float kMostNoise = 22.9f;  // -log E of the smallest uniform is 22.87

// The entry that leads a race: the largest score as a key, of equal ones the lowest index. Key 0:
// nobody takes part; kBadKey: a logit is NaN.
constexpr unsigned kBadKey = 0xffffffffu;
struct Winner {
    unsigned key;
    unsigned index;

    __device__ void meet(unsigned k, unsigned i) {
        if (k > key || (k == key && i < index)) {
            key = k;
            index = i;
        }
    }
    __device__ uint64 packed() const { return uint64(key) << 32 | index; }
};
__device__ __forceinline__ Winner winner_of_warp(Winner mine) {
    const unsigned key = __reduce_max_sync(kWholeWarp, mine.key);
    return {key, __reduce_min_sync(kWholeWarp, mine.key == key ? mine.index : ~0u)};
}
// The token that won a slot, -1: its logits are bad. By a warp.
__device__ __forceinline__ int winner_of_slot(const Sampling& a, int64 slot) {
    Winner best{0, ~0u};
    for (int i = lane_of_warp(); i < a.splits; i += 32) {
        const uint64 other = a.winners[slot * a.splits + i];
        best.meet(unsigned(other >> 32), unsigned(other));
    }
    best = winner_of_warp(best);
    return best.key == 0 || best.key == kBadKey ? -1 : static_cast<int>(best.index);
}

}  // namespace tigon
