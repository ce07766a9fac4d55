// The best tokens of each sequence, in their order.
//
// A sequence of length l keeps min(l, max(keep, p) rounded up to a multiple) tokens: its p
// protected ones, then those with the highest scores, equal ones by lower index. NaN counts as
// -inf, -0 as 0. scores (t), bounds (s+1); index (capacity) holds what stays of all sequences, -1
// past the last; cu_kept (s+1); inverse (t) is a token's place in index or -1.
//
// select_threshold: a block a sequence. A score becomes an integer of the same order, and three
// rounds of counting its digits (11, 11 and 10 bits, from the top) find the key of the last token
// that stays and how many tokens with just that key do. It leaves them, and for each chunk of
// tokens how many lie above and at the key.
//
// place_tokens: a block a chunk. What stays before a chunk follows from those counts, so every
// place is computed and none is grabbed.
//
// Chunk c of sequence i has number bounds[i] / kChunk + i + c: unique, and t / kChunk + s + 1
// numbers are enough, the tokens past the last bound being one more sequence, of which nothing
// stays.
#include "common/select.cuh"

namespace tigon {

constexpr int kChunk = 1024;   // tokens; python/native/tokens.py has the same
constexpr int kDigits = 2048;  // of a round
constexpr int kEach = 4;       // tokens of a thread of place_tokens

// One bound or count of a vector that may be int32 or int64, in 0 to tokens.
__device__ __forceinline__ int bounded(const void* vector, int wide, int64 i, int tokens) {
    const int64 value =
        wide ? static_cast<const int64*>(vector)[i] : static_cast<const int*>(vector)[i];
    return value < 0 ? 0 : value < tokens ? int(value) : tokens;
}

struct Cut {
    int kept, room;  // room: tokens with the key itself that stay
    unsigned key;
    int unused;
};

// Protected tokens come before all others.
__device__ __forceinline__ unsigned token_key(const float* scores, const uint8* is_protected,
                                              int64 token) {
    if (is_protected && is_protected[token]) return 0xffffffffu;
    const float score = scores[token];
    return key_of(score == 0.0f ? 0.0f : score);
}

// Tells `body` the keys of tokens start, start + step, ... below last; four loads are on their way
// together.
template <typename Body>
__device__ __forceinline__ void each_key(const float* scores, const uint8* is_protected, int start,
                                         int last, int step, Body body) {
#pragma unroll 1
    for (int i = start; i < last; i += 4 * step) {
        unsigned key[4];
#pragma unroll
        for (int u = 0; u < 4; ++u)
            key[u] = i + u * step < last ? token_key(scores, is_protected, i + u * step) : 0;
#pragma unroll
        for (int u = 0; u < 4; ++u)
            if (i + u * step < last) body(key[u]);
    }
}

struct SelectThreshold {
    const float* scores;
    const uint8* is_protected;  // may be null
    const void* keep;
    const void* bounds;
    Cut* chosen;  // (s)
    int* counts;  // (chunks,2) tokens above and at the key
    int tokens, sequences, multiple, keep_wide, bounds_wide, unused;
};

// Shared memory, in words: digits, a total a warp, what was found.
struct ThresholdMemory {
    int* digits;
    int* totals;
    int* found;  // digit, how many are still wanted

    __device__ explicit ThresholdMemory(float* memory)
        : digits(reinterpret_cast<int*>(memory)), totals(digits + kDigits), found(totals + 32) {}
};

// The largest digit such that at least `wanted` keys have it or a larger one: memory.found[0]; and
// memory.found[1], how many of those with just this digit are wanted. Ends with a barrier.
__device__ __forceinline__ void find_digit(const ThresholdMemory& memory, int wanted) {
    const int each = kDigits / blockDim.x, top = kDigits - 1 - int(threadIdx.x) * each;
    int sum = 0;
    for (int i = 0; i < each; ++i) sum += memory.digits[top - i];
    int before = sum_before(sum);
    if (lane_of_warp() == 31) memory.totals[threadIdx.x / 32] = before + sum;
    __syncthreads();
    for (int w = 0; w < int(threadIdx.x) / 32; ++w) before += memory.totals[w];
    if (before < wanted && wanted <= before + sum) {
        int digit = top;
        for (; before + memory.digits[digit] < wanted; --digit) before += memory.digits[digit];
        memory.found[0] = digit;
        memory.found[1] = wanted - before;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(1024) select_threshold(const SelectThreshold a) {
    const ThresholdMemory memory(shared_memory());
    const int sequence = blockIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first = sequence ? bounded(a.bounds, a.bounds_wide, sequence, a.tokens) : 0;
    const int last = max(bounded(a.bounds, a.bounds_wide, sequence + 1, a.tokens), first);
    int64 least = bounded(a.keep, a.keep_wide, sequence, a.tokens);
    if (a.is_protected) {
        if (threadIdx.x == 0) memory.found[0] = 0;
        __syncthreads();
        int count = 0;
        for (int i = first + threadIdx.x; i < last; i += blockDim.x)
            count += a.is_protected[i] != 0;
        count = __reduce_add_sync(kWholeWarp, count);
        if (lane_of_warp() == 0 && count) atomicAdd(memory.found, count);
        __syncthreads();
        least = max(least, int64(memory.found[0]));
    }
    least = (least + a.multiple - 1) / a.multiple * a.multiple;
    const int kept = int(min(least, int64(last - first)));

    unsigned key = kept ? 0u : 0xffffffffu, mask = 0;
    int wanted = kept;
    if (kept && kept < last - first) {
#pragma unroll 1
        for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
            const unsigned digit = shift ? kDigits - 1 : 1023;
            __syncthreads();
            for (int i = threadIdx.x; i < kDigits; i += blockDim.x) memory.digits[i] = 0;
            __syncthreads();
            each_key(a.scores, a.is_protected, first + threadIdx.x, last, blockDim.x,
                     [&](unsigned own) {
                         if ((own & mask) == key)
                             atomicAdd(memory.digits + (own >> shift & digit), 1);
                     });
            __syncthreads();
            find_digit(memory, wanted);
            key |= unsigned(memory.found[0]) << shift;
            wanted = memory.found[1];
            mask |= digit << shift;
        }
    } else {
        wanted = 0;
    }
    if (threadIdx.x == 0) a.chosen[sequence] = {kept, wanted, key, 0};

    const int chunks = (last - first + kChunk - 1) / kChunk;
    for (int c = warp; c < chunks; c += warps) {
        const int begin = first + c * kChunk, end = min(begin + kChunk, last);
        int above = 0, equal = 0;
        each_key(a.scores, a.is_protected, begin + lane_of_warp(), end, 32, [&](unsigned own) {
            above += own > key;
            equal += own == key;
        });
        above = __reduce_add_sync(kWholeWarp, above);
        equal = __reduce_add_sync(kWholeWarp, equal);
        if (lane_of_warp() == 0) {
            int* counts = a.counts + 2 * (int64(first / kChunk) + sequence + c);
            counts[0] = above;
            counts[1] = equal;
        }
    }
}

struct PlaceTokens {
    const float* scores;
    const uint8* is_protected;
    const void* bounds;
    const Cut* chosen;
    const int* counts;
    int* index;
    int* cu_kept;
    int* inverse;
    int tokens, sequences, capacity, bounds_wide, blocks, unused;
};

// The sum over the block, in all threads; totals: a word a warp. Begins and ends with a barrier.
__device__ __forceinline__ int sum_of_block(int value, int* totals) {
    value = __reduce_add_sync(kWholeWarp, value);
    __syncthreads();
    if (lane_of_warp() == 0) totals[threadIdx.x / 32] = value;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += totals[w];
    return sum;
}

__global__ void __launch_bounds__(256) place_tokens(const PlaceTokens a) {
    int* totals = reinterpret_cast<int*>(shared_memory());
    const auto bound = [&](int i) {
        return i == 0 ? 0 : bounded(a.bounds, a.bounds_wide, i, a.tokens);
    };
    const int block = blockIdx.x;
    int low = 0, high = a.sequences;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (int64(bound(middle) / kChunk) + middle <= block)
            low = middle;
        else
            high = middle - 1;
    }
    const int sequence = low, begin = bound(sequence);
    const int end = sequence < a.sequences ? bound(sequence + 1) : a.tokens;
    const int chunk = block - begin / kChunk - sequence;
    const int64 start = begin + int64(chunk) * kChunk;

    // What all sequences keep, those before this one, and what of this one lies in earlier chunks.
    unsigned all = 0, before = 0;
    for (int i = threadIdx.x; i < a.sequences; i += blockDim.x) {
        const unsigned kept = a.chosen[i].kept;
        all += kept;
        before += i < sequence ? kept : 0;
    }
    const int total = sum_of_block(int(all), totals);
    const int base = sum_of_block(int(before), totals);
    int above = 0, equal = 0;
    const bool live = sequence < a.sequences && start < end;
    if (live) {
        const int* counts = a.counts + 2 * (int64(begin / kChunk) + sequence);
        for (int i = threadIdx.x; i < chunk; i += blockDim.x) {
            above += counts[2 * i];
            equal += counts[2 * i + 1];
        }
    }
    above = sum_of_block(above, totals);
    equal = sum_of_block(equal, totals);

    const Cut chosen = sequence < a.sequences ? a.chosen[sequence] : Cut{0, 0, 0, 0};
    if (chunk == 0 && threadIdx.x == 0 && sequence < a.sequences)
        a.cu_kept[sequence + 1] = max(0, min(base + chosen.kept, a.capacity));
    if (block == 0 && threadIdx.x == 0) a.cu_kept[0] = 0;

    unsigned key[kEach];
    int mine = 0;  // above in the lower half, equal in the upper one: a chunk has 1,024 of each
    const int64 own = start + int(threadIdx.x) * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const bool real = live && own + i < end;
        key[i] = real ? token_key(a.scores, a.is_protected, own + i) : 0;
        mine += real ? (key[i] > chosen.key) + ((key[i] == chosen.key) << 16) : 0;
    }
    int below = sum_before(mine);
    __syncthreads();
    if (lane_of_warp() == 31) totals[threadIdx.x / 32] = below + mine;
    __syncthreads();
    for (int w = 0; w < int(threadIdx.x) / 32; ++w) below += totals[w];
    above += below & 0xffff;
    equal += below >> 16;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (own + i >= end) break;
        const bool higher = live && key[i] > chosen.key, same = live && key[i] == chosen.key;
        int place = base + above + min(equal, chosen.room);
        if (!(higher || (same && equal < chosen.room)) || place < 0 || place >= a.capacity)
            place = -1;
        if (place >= 0) a.index[place] = int(own + i);
        a.inverse[own + i] = place;
        above += higher;
        equal += same;
    }
    const int64 step = int64(a.blocks) * blockDim.x;
    for (int64 i = max(total, 0) + int64(block) * blockDim.x + threadIdx.x; i < a.capacity;
         i += step)
        a.index[i] = -1;
}

#ifndef __CUDACC_RTC__
KernelTable select_tokens_kernels() {
    return {table_row("tigon::select_threshold", select_threshold),
            table_row("tigon::place_tokens", place_tokens)};
}
#endif

}  // namespace tigon
