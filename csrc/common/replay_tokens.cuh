// What the blocks of csrc/ssd_replay.cu read: a call's tokens, new ones from the inputs and older
// ones from the rings, and shared memory, in which a pass keeps the tokens that it works on.
#pragma once

#include "state_tile.cuh"

namespace tigon {

constexpr int kTokens = 16;  // rows of B in shared memory at a time
constexpr int kPairs = 8;    // pairs (t, k) a warp works on at a time, 4 lanes each
constexpr int kRowPad = 4;   // floats; 8 rows then start in different banks

struct SsdReplay {
    void* state;
    float* state_scale;  // null but for 8-bit states
    void* ring_x;
    void* ring_B;
    float* ring_dt;
    const int64* checkpoint;
    const int64* length;
    const void* x;
    const void* dt;
    const void* A;
    const void* B;
    const void* C;
    const void* D;             // may be null
    const void* z;             // may be null
    const void* dt_bias;       // may be null
    const int* state_indices;  // null: row b uses slot b
    const int* num_tokens;     // null: every row has `tokens`
    const int* ancestors;      // null: a chain; else (b,m) bits
    const int64* seeds;        // null: the state is rounded to nearest
    void* y;                   // contiguous
    int64 slots, state_stride_slot, scale_stride_slot;
    int64 ring_x_stride_slot, ring_B_stride_slot, ring_dt_stride_slot;
    int64 x_stride_batch, x_stride_token, z_stride_batch, z_stride_token;
    int64 B_stride_batch, B_stride_token, C_stride_batch, C_stride_token;
    int64 dt_stride_batch, dt_stride_token, dt_stride_head;
    int64 D_stride_head, D_stride_p;
    int tokens, heads, groups, p, n, places, flush, window;
    int lanes, rows;  // lanes a row of p; rows of p a block
    int dt_dtype, A_dtype, D_dtype, dt_bias_dtype;
    int dt_softplus, staging_vectors, layer;
    float dt_min, dt_max;
    int unused;
};

// Shared memory, in floats; python/native/replay.py counts the same. `window` tokens are in sight
// of a pass at most: flush, or flush - 1 + m of a tree.
struct Staged {
    float *B, *C;               // (kTokens | tokens, stride), see place()
    float* x;                   // (window, rows)
    float *gate, *dot;          // (tokens, rows); gate = silu(z) or 1, dot = S C
    float* D;                   // (rows)
    float *dt, *step, *weight;  // (window); step = A dt', weight = exp(steps after it) dt'
    float* mixing;              // (tokens, window)
    float* decay;               // (tokens), and one for the fold
    int n_padded, stride;

    __device__ Staged(float* memory, const SsdReplay& a) {
        n_padded = padded(a.n);
        stride = n_padded + kRowPad;
        B = memory;
        C = B + kTokens * stride;
        x = C + a.tokens * stride;
        gate = x + a.window * a.rows;
        dot = gate + a.tokens * a.rows;
        D = dot + a.tokens * a.rows;
        dt = D + a.rows;
        step = dt + a.window;
        weight = step + a.window;
        mixing = weight + a.window;
        decay = mixing + a.tokens * a.window;
    }
};

// An int whose origin the compiler does not know. Addresses that are made of such ints are made
// where they are used, and not held in registers, of which the state needs most, through the
// passes.
__device__ __forceinline__ int opaque(int value) {
#ifndef TIGON_HOST_BUILD
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Where a block works.
struct Place {
    int row, slot, head;    // of the batch, of the pools, of the model
    int first_row, inside;  // its rows of p, and how many of them there are
    int first_place;        // in the rings, of the token at `length`
    int64 length;

    __device__ Place again() const {
        return {opaque(row),    opaque(slot),        opaque(head), opaque(first_row),
                opaque(inside), opaque(first_place), length};
    }
};

// Tokens by their offset from `length`: those below 0 lie in the rings, those from 0 on are new.
template <typename Io>
struct Tokens : Place {
    const SsdReplay& a;
    int group;

    __device__ Tokens(const SsdReplay& a, const Place& place)
        : Place(place.again()), a(a), group(head / (a.heads / a.groups)) {}
    __device__ int64 place_of(int offset) const {
        int place = first_place + offset;
        place += place < 0 ? a.places : 0;
        return place - (place >= a.places ? a.places : 0);
    }
    __device__ const Io* x(int offset) const {  // this block's rows
        if (offset < 0) return ring_x(offset);
        return static_cast<const Io*>(a.x) + row * a.x_stride_batch + offset * a.x_stride_token +
               int64(head) * a.p + first_row;
    }
    __device__ const Io* B(int offset) const {
        if (offset < 0) return ring_B(offset);
        return static_cast<const Io*>(a.B) + row * a.B_stride_batch + offset * a.B_stride_token +
               int64(group) * a.n;
    }
    __device__ const Io* C(int offset) const {
        return static_cast<const Io*>(a.C) + row * a.C_stride_batch + offset * a.C_stride_token +
               int64(group) * a.n;
    }
    __device__ const Io* z(int offset) const {
        return static_cast<const Io*>(a.z) + row * a.z_stride_batch + offset * a.z_stride_token +
               int64(head) * a.p + first_row;
    }
    __device__ Io* y(int offset) const {
        return static_cast<Io*>(a.y) + ((int64(row) * a.tokens + offset) * a.heads + head) * a.p +
               first_row;
    }
    __device__ float dt(int offset) const {
        if (offset < 0) return *ring_dt(offset);
        float dt = load_as(
            a.dt, row * a.dt_stride_batch + offset * a.dt_stride_token + head * a.dt_stride_head,
            a.dt_dtype);
        if (a.dt_bias) dt += load_as(a.dt_bias, head, a.dt_bias_dtype);
        if (a.dt_softplus) dt = softplus(dt);
        return clamp(dt, a.dt_min, a.dt_max);
    }
    __device__ unsigned path(int offset) const {
        return a.ancestors ? unsigned(a.ancestors[int64(row) * a.tokens + offset]) : 0u;
    }
    __device__ Io* ring_x(int offset) const {
        return static_cast<Io*>(a.ring_x) + slot * a.ring_x_stride_slot +
               (place_of(offset) * a.heads + head) * a.p + first_row;
    }
    __device__ Io* ring_B(int offset) const {
        return static_cast<Io*>(a.ring_B) + slot * a.ring_B_stride_slot +
               (place_of(offset) * a.groups + group) * a.n;
    }
    __device__ float* ring_dt(int offset) const {
        return a.ring_dt + slot * a.ring_dt_stride_slot + place_of(offset) * a.heads + head;
    }
};

// Rows of B or C for `count` tokens, zeros behind n. from(i): where that of token i begins.
template <typename Io, int kWidth, typename From>
__device__ __forceinline__ void stage_vectors(const SsdReplay& a, const Staged& staged, float* to,
                                              int count, From from) {
    if (a.staging_vectors) {
        constexpr int kStep = kVector<Io>;
        const int steps = staged.n_padded / kStep;
#pragma unroll 1
        for (int i = threadIdx.x; i < count * steps; i += blockDim.x) {
            const int t = i / steps, k = i % steps * kStep;
            float v[kStep];
#pragma unroll
            for (int j = 0; j < kStep; ++j) v[j] = 0.0f;
            if (k < a.n) load_vector(from(t) + k, v);
#pragma unroll
            for (int j = 0; j < kStep; j += 4)
                *reinterpret_cast<float4*>(to + t * staged.stride +
                                           place<kWidth>(k + j, staged.n_padded)) =
                    make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < count * staged.n_padded; i += blockDim.x) {
            const int t = i / staged.n_padded, k = i % staged.n_padded;
            to[t * staged.stride + place<kWidth>(k, staged.n_padded)] =
                k < a.n ? to_float(from(t)[k]) : 0.0f;
        }
    }
}

// dt', A dt' and x of the tokens from offset `first` on.
template <typename Io>
__device__ __forceinline__ void stage_window(const Staged& staged, const Tokens<Io>& tokens,
                                             int first, int count) {
    const SsdReplay& a = tokens.a;
#pragma unroll 1
    for (int i = (threadIdx.x + blockDim.x / 2) % blockDim.x; i < count; i += blockDim.x) {
        staged.dt[i] = tokens.dt(first + i);
        staged.step[i] = __fmul_rn(load_as(a.A, tokens.head, a.A_dtype), staged.dt[i]);
    }
#pragma unroll 1
    for (int i = blockDim.x - 1 - threadIdx.x; i < count * a.rows; i += blockDim.x) {
        const int t = i / a.rows, r = i % a.rows;
        staged.x[i] = r < tokens.inside ? to_float(tokens.x(first + t)[r]) : 0.0f;
    }
}

// silu(z) of the tokens first..end-1, and D.
template <typename Io>
__device__ __forceinline__ void stage_gates(const Staged& staged, const Tokens<Io>& tokens,
                                            int first, int end) {
    const SsdReplay& a = tokens.a;
#pragma unroll 1
    for (int i = blockDim.x - 1 - threadIdx.x; i < (end - first) * a.rows; i += blockDim.x) {
        const int t = first + i / a.rows, r = i % a.rows;
        const bool real = r < tokens.inside;
        staged.gate[t * a.rows + r] = real && a.z ? silu(to_float(tokens.z(t)[r])) : 1.0f;
        if (t > first) continue;
        const int64 at = tokens.head * a.D_stride_head + (tokens.first_row + r) * a.D_stride_p;
        staged.D[r] = real && a.D ? load_as(a.D, at, a.D_dtype) : 0.0f;
    }
}

// What token t (an offset, of bits `path`) sees of the window that begins at `base`.
struct Sight {
    int base;
    bool tree;

    __device__ bool sees(int t, unsigned path, int k) const {
        if (!tree) return k <= t;
        return k < 0 || k == t || (k < t && (path >> k & 1));
    }
    // The sum of A dt' over what t sees after k, from the newest on.
    __device__ float after(const float* step, int t, unsigned path, int k) const {
        float sum = 0.0f;
#pragma unroll 1
        for (int j = t; j > k; --j)
            if (sees(t, path, j)) sum = __fadd_rn(sum, step[j - base]);
        return sum;
    }
};

}  // namespace tigon
