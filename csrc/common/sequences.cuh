// Which sequence a token of a packed batch belongs to.
#pragma once

#include "platform.cuh"

namespace tigon {

// cu_seqlens (s+1), int32 or int64; null: one sequence. Whatever it holds, answers stay in range;
// tokens before the first bound count to the first sequence, those past the last one to the last.
struct Sequences {
    const void* bounds;
    int count, wide;  // wide: int64

    __device__ int64 bound(int i) const {
        return wide ? static_cast<const int64*>(bounds)[i] : static_cast<const int*>(bounds)[i];
    }
    // The number of inner bounds at or before the token.
    __device__ int of(int token) const {
        int low = 0, high = count - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (bound(middle + 1) <= token)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    __device__ int first(int sequence, int tokens) const {
        return sequence == 0 ? 0 : clamped(bound(sequence), tokens);
    }
    __device__ int last(int sequence, int tokens) const {
        return sequence == count - 1 ? tokens : clamped(bound(sequence + 1), tokens);
    }
    __device__ static int clamped(int64 token, int tokens) {
        return token < 0 ? 0 : token < tokens ? int(token) : tokens;
    }
};

}  // namespace tigon
