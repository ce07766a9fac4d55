// The k best of a row, by one warp: larger scores first, equal ones by index.
//
// A score becomes a key, an integer of the same order; 0 is below all of them and means "no entry".
// Entry i of a row belongs to lane i % 32. Instead of k rounds of finding the largest,
//
//   1. a threshold is found that k to 64 keys reach. The k-th largest of the lanes' largest keys is
//      one that at least k keys reach, and of 512 random ones some 36 reach it for k = 22; if too
//      many do, bisection goes on from there;
//   2. the keys that reach it are gathered, and each counts the larger ones: its place. If keys are
//      equal, which their number of larger ones tells, it counts the lower indices too.
#pragma once

#include "math.cuh"

namespace tigon {

constexpr int kMaxChosen = 64;

__device__ __forceinline__ int lane_of_warp() {
    return threadIdx.x % 32;
}

// A NaN counts as -inf, whose key is not 0 either.
__device__ __forceinline__ unsigned key_of(float score) {
    const unsigned bits = __float_as_uint(score != score ? -INFINITY : score);
    return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float score_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A row of 32-bit words in registers; entry i * 32 + lane is word i.
template <int kItems>
struct Row {
    unsigned word[kItems];

    __device__ Row(unsigned*, int) {}
    __device__ static constexpr int items() { return kItems; }
    __device__ unsigned& operator[](int i) { return word[i]; }
    __device__ unsigned operator[](int i) const { return word[i]; }
};

// The same in shared memory, where all lanes can read it. `memory` holds whole multiples of 32.
template <>
struct Row<0> {
    unsigned* memory;
    int count;

    __device__ Row(unsigned* memory, int entries) : memory(memory), count((entries + 31) / 32) {}
    __device__ int items() const { return count; }
    __device__ unsigned& operator[](int i) { return memory[i * 32 + lane_of_warp()]; }
    __device__ unsigned operator[](int i) const { return memory[i * 32 + lane_of_warp()]; }
};

// What a warp needs in shared memory to choose.
struct Chosen {
    uint64 candidate[kMaxChosen];  // key and, below it, ~index: no two are equal
    int index[kMaxChosen];         // the result, best first
};

// The sum over the lanes before this one.
__device__ __forceinline__ int sum_before(int value) {
    int sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int below = __shfl_up_sync(kWholeWarp, sum, offset);
        if (lane_of_warp() >= offset) sum += below;
    }
    return sum - value;
}

template <int kItems>
__device__ __forceinline__ unsigned largest_of_lane(const Row<kItems>& row) {
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < row.items(); ++i) most = max(most, row[i]);
    return most;
}

template <int kItems>
__device__ __forceinline__ int reaching(const Row<kItems>& row, unsigned low) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < row.items(); ++i) count += row[i] >= low;
    return count;
}

// The k-th largest (k <= 32) of the lanes' values; scratch: 32 words.
__device__ __forceinline__ unsigned largest_of_lanes(unsigned value, int k, unsigned* scratch) {
    scratch[lane_of_warp()] = value;
    __syncwarp();
    int above = 0;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        const uint4 other = *reinterpret_cast<const uint4*>(scratch + i);
        above += (other.x > value) + (other.y > value) + (other.z > value) + (other.w > value);
    }
    __syncwarp();
    return __reduce_min_sync(kWholeWarp, above < k ? value : 0xffffffffu);
}

// Raises `low`, which `least` keys or more reach, until at most `most` do, and returns how many. Of
// equal keys that are too many, those of the highest indices are removed from the row.
template <int kItems>
__device__ __forceinline__ int narrow(Row<kItems>& row, unsigned largest, unsigned& low, int least,
                                      int most) {
    int count = __reduce_add_sync(kWholeWarp, reaching(row, low));
    unsigned high = largest + 1;  // fewer than `least` reach it
#pragma unroll 1
    while (count > most && high - low > 1) {
        const unsigned middle = low + (high - low) / 2;
        const int reach = __reduce_add_sync(kWholeWarp, reaching(row, middle));
        if (reach >= least) {
            low = middle;
            count = reach;
        } else {
            high = middle;
        }
    }
    if (count <= most) return count;
    int room = most - __reduce_add_sync(kWholeWarp, reaching(row, low + 1));
    const unsigned before = (1u << lane_of_warp()) - 1;
#pragma unroll
    for (int i = 0; i < row.items(); ++i) {
        const bool equal = row[i] == low;
        const unsigned equals = __ballot_sync(kWholeWarp, equal);
        if (equal && __popc(equals & before) >= room) row[i] = 0;
        room -= __popc(equals);
    }
    return most;
}

// Narrows the row to k to `most` keys that reach `low`; at least k must not be 0.
template <int kItems>
__device__ __forceinline__ int threshold(Row<kItems>& row, int k, int most, Chosen& chosen,
                                         unsigned& low) {
    const unsigned mine = largest_of_lane(row);
    low = 1;
    if (k <= 32)
        low = max(low, largest_of_lanes(mine, k, reinterpret_cast<unsigned*>(chosen.index)));
    return narrow(row, __reduce_max_sync(kWholeWarp, mine), low, k, most);
}

// Writes the candidates that fewer than k come before to their places.
__device__ __forceinline__ void place_candidates(int count, int k, Chosen& chosen) {
    constexpr int kEach = kMaxChosen / 32;
    uint64 mine[kEach];
    int rank[kEach], sum = 0;
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
        const int slot = h * 32 + lane_of_warp();
        mine[h] = slot < count ? chosen.candidate[slot] : ~0ull;
        rank[h] = 0;
    }
#pragma unroll 2
    for (int i = 0; i < count; i += 2) {
        const uint4 pair = *reinterpret_cast<const uint4*>(chosen.candidate + i);
#pragma unroll
        for (int h = 0; h < kEach; ++h) {
            const unsigned key = mine[h] >> 32;
            rank[h] += (pair.y > key) + (pair.w > key);
        }
    }
#pragma unroll
    for (int h = 0; h < kEach; ++h) sum += rank[h];
    // Of every two candidates one has the larger key, unless they are equal.
    const bool ties = __reduce_add_sync(kWholeWarp, sum) != count * (count - 1) / 2;
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
        if (h * 32 + lane_of_warp() >= count) continue;
        if (ties) {
            rank[h] = 0;
#pragma unroll 1
            for (int i = 0; i < count; ++i) rank[h] += chosen.candidate[i] > mine[h];
        }
        if (rank[h] < k) chosen.index[rank[h]] = ~static_cast<unsigned>(mine[h]);
    }
}

// chosen.index[0] to [k-1]: the k best. At least k keys of the row must not be 0.
template <int kItems>
__device__ __forceinline__ void choose(Row<kItems>& row, int k, Chosen& chosen) {
    unsigned low;
    const int count = threshold(row, k, kMaxChosen, chosen, low);
    int place = sum_before(reaching(row, low));
#pragma unroll
    for (int i = 0; i < row.items(); ++i)
        if (row[i] >= low)
            chosen.candidate[place++] = uint64(row[i]) << 32 | ~unsigned(i * 32 + lane_of_warp());
    if (lane_of_warp() == 0 && count < kMaxChosen) chosen.candidate[count] = 0;  // read in pairs
    __syncwarp();
    place_candidates(count, k, chosen);
    __syncwarp();
}

}  // namespace tigon
