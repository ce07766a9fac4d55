// The Mamba-2 decode step for 1 to 32 new tokens whose rejection costs nothing: new inputs go to
// rings, and the state is rewritten at absolute positions that are multiples of `flush` only.
//
// A slot's state is the one after `checkpoint` tokens; tokens checkpoint..length-1 are committed
// and lie in the rings x (slots,L,h,p), B (slots,L,g,n), dt' (slots,L,h), token t at place t % L.
// The call's tokens take the positions from `length` on. With F the multiple of flush at or below
// length and c the sum of A dt':
//
//   S   = round(exp(c) S + sum_k exp(c after k) dt'_k x_k B_k^T), k = checkpoint..F-1    and stored
//   y_t = exp(c up to t) C_t.S + sum_k exp(c after k up to t) dt'_k (C_t.B_k) x_k, k = F..t
//   y_t = (y_t + D x_t) silu(z_t)
//
// Tokens at or past F + flush (there is one such boundary at most, as m <= flush) use a state that
// is folded and rounded once more as the later write will be, and not stored: some of these tokens
// are drafts. So every result is a function of the request's tokens alone, bit for bit, whatever
// was grouped or rejected. With `ancestors` the new tokens are a tree: node i sees committed tokens
// and the nodes of its bits, and all use the state at F.
//
// A block owns `rows` rows of p of one head in registers (common/state_tile.cuh) and makes one
// pass, or two where tokens lie past the boundary: fold and round if due, then outputs: one product
// an element of the state and token, C.B for pairs of tokens, and the triangular sum over x.
//
// No block reads what another one writes in the same launch. Tokens of this call are read from the
// inputs, older ones from the rings; L >= flush + 2m - 1 keeps the places of checkpoint..length-1
// (at most flush + m - 1) apart from the m new ones. Each ring element has one writer: x the block
// of its rows, dt' the first block of its head, B that of its group's first head.
//
// Sums that must not depend on the grouping name their roundings, so that the compiler fuses none.
#include "common/state_tile.cuh"

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

// Tokens by their offset from `length`: those below 0 lie in the rings, those from 0 on are new.
template <typename Io>
struct Tokens {
    const SsdReplay& a;
    int64 row, slot;
    int head, group, first_place;

    __device__ int64 place_of(int offset) const {
        int place = first_place + offset;
        place += place < 0 ? a.places : 0;
        return place - (place >= a.places ? a.places : 0);
    }
    __device__ const Io* x(int offset) const {
        const int64 at = int64(head) * a.p;
        if (offset >= 0)
            return static_cast<const Io*>(a.x) + row * a.x_stride_batch +
                   offset * a.x_stride_token + at;
        return ring_x(offset) + at;
    }
    __device__ const Io* B(int offset) const {
        const int64 at = int64(group) * a.n;
        if (offset >= 0)
            return static_cast<const Io*>(a.B) + row * a.B_stride_batch +
                   offset * a.B_stride_token + at;
        return ring_B(offset) + at;
    }
    __device__ const Io* C(int offset) const {
        return static_cast<const Io*>(a.C) + row * a.C_stride_batch + offset * a.C_stride_token +
               int64(group) * a.n;
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
    __device__ Io* ring_x(int offset) const {
        return static_cast<Io*>(a.ring_x) + slot * a.ring_x_stride_slot +
               place_of(offset) * a.heads * a.p;
    }
    __device__ Io* ring_B(int offset) const {
        return static_cast<Io*>(a.ring_B) + slot * a.ring_B_stride_slot +
               place_of(offset) * a.groups * a.n;
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

// dt', A dt' and this block's rows of x of the tokens from offset `first` on.
template <typename Io>
__device__ __forceinline__ void stage_window(const Staged& staged, const Tokens<Io>& tokens,
                                             int first, int count, int first_row, int inside) {
    const SsdReplay& a = tokens.a;
    for (int i = (threadIdx.x + blockDim.x / 2) % blockDim.x; i < count; i += blockDim.x) {
        staged.dt[i] = tokens.dt(first + i);
        staged.step[i] = __fmul_rn(load_as(a.A, tokens.head, a.A_dtype), staged.dt[i]);
    }
#pragma unroll 1
    for (int i = blockDim.x - 1 - threadIdx.x; i < count * a.rows; i += blockDim.x) {
        const int t = i / a.rows, r = i % a.rows;
        staged.x[i] = r < inside ? to_float(tokens.x(first + t)[first_row + r]) : 0.0f;
    }
}

// silu(z) of the tokens first..end-1, and D.
template <typename Io>
__device__ __forceinline__ void stage_gates(const Staged& staged, const Tokens<Io>& tokens,
                                            int first, int end, int first_row, int inside) {
    const SsdReplay& a = tokens.a;
    const int64 at = int64(tokens.head) * a.p + first_row;
    const Io* z = a.z ? static_cast<const Io*>(a.z) + tokens.row * a.z_stride_batch + at : nullptr;
#pragma unroll 1
    for (int i = blockDim.x - 1 - threadIdx.x; i < (end - first) * a.rows; i += blockDim.x) {
        const int t = first + i / a.rows, r = i % a.rows;
        const bool real = r < inside;
        staged.gate[t * a.rows + r] =
            real && z ? silu(to_float(z[t * a.z_stride_token + r])) : 1.0f;
        if (t > first) continue;
        const int64 place = tokens.head * a.D_stride_head + (first_row + r) * a.D_stride_p;
        staged.D[r] = real && a.D ? load_as(a.D, place, a.D_dtype) : 0.0f;
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
        for (int j = t; j > k; --j)
            if (sees(t, path, j)) sum = __fadd_rn(sum, step[j - base]);
        return sum;
    }
};

template <typename Io, typename State, bool kVectors>
__global__ void __launch_bounds__(kThreads, kVectors ? 4 : 3) ssd_replay(const SsdReplay a) {
    const int64 batch_row = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads, per_group = a.heads / a.groups;
    const int first_row = blockIdx.y * a.rows;
    const int64 slot = a.state_indices ? a.state_indices[batch_row] : batch_row;
    const bool valid = slot >= 0 && slot < a.slots;
    const int tokens =
        !valid ? 0 : (a.num_tokens ? min(max(a.num_tokens[batch_row], 0), a.tokens) : a.tokens);

    Io* y = static_cast<Io*>(a.y) + (batch_row * a.tokens * a.heads + head) * a.p + first_row;
    const int64 y_stride = int64(a.heads) * a.p;
    const int inside = min(a.rows, a.p - first_row);
    for (int t = tokens; t < a.tokens; ++t)
        for (int i = threadIdx.x; i < inside; i += blockDim.x)
            y[t * y_stride + i] = from_float<Io>(0.0f);
    if (!valid) return;

    // Positions from here on are offsets from `length`. Whatever the cursor holds, they stay in
    // the ring.
    const int64 length = a.length[slot] < 0 ? 0 : a.length[slot];
    const int boundary = -int(length % a.flush);
    const int64 behind = a.checkpoint[slot] - length;
    const int oldest = max(boundary - a.flush, a.tokens - a.places);
    const int start = behind < oldest ? oldest : behind > 0 ? 0 : int(behind);
    if (tokens == 0 && start >= boundary) return;

    const int lane = threadIdx.x % a.lanes, row = threadIdx.x / a.lanes * kRows;
    const int64 first = int64(head) * a.p + first_row + row;  // row of the state, of this lane
    State* state = static_cast<State*>(a.state) + slot * a.state_stride_slot + first * a.n;
    float* scale = kScaled<State> ? a.state_scale + slot * a.scale_stride_slot + first : nullptr;
    Tile<State, kVectors> tile(lane, a.lanes, inside - row, a.n);
    tile.load(state, scale);

    const Tokens<Io> source{a, batch_row, slot, head, head / per_group, int(length % a.places)};
    const Staged staged(shared_memory(), a);
    Rounding how{a.seeds != nullptr, 0, 0, unsigned(a.layer)};
    if (kRounded<State> && a.seeds) how.seed = uint64(a.seeds[batch_row]);

    // Tokens at offsets fold..base-1 go into the state, then done..end-1 get their outputs.
    int fold = start, base = max(start, boundary), done = 0;
#pragma unroll 1
    for (bool stored = true;; stored = false) {
        const int end = a.ancestors
                            ? tokens
                            : min(tokens, base < boundary + a.flush ? boundary + a.flush : tokens);
        if (fold < base) {
#pragma unroll 1
            for (int k = fold; k < base; k += kTokens) {
                const int count = min(kTokens, base - k);
                __syncthreads();
                if (k == fold) stage_window(staged, source, fold, base - fold, first_row, inside);
                stage_vectors<Io, tile.kWidth>(a, staged, staged.B, count,
                                               [&](int i) { return source.B(k + i); });
                __syncthreads();
                if (k == fold) {
                    const Sight all{fold, false};
                    for (int i = threadIdx.x; i <= base - fold; i += blockDim.x) {
                        const float kept = expf(all.after(staged.step, base - 1, 0, fold + i - 1));
                        if (i == 0) staged.decay[a.tokens] = kept;
                        if (i > 0) staged.weight[i - 1] = __fmul_rn(kept, staged.dt[i - 1]);
                    }
                    __syncthreads();
                    tile.multiply(staged.decay[a.tokens]);
                }
#pragma unroll 1
                for (int i = 0; i < count; ++i) {
                    const int at = k - fold + i;
                    float input[kRows];
#pragma unroll
                    for (int r = 0; r < kRows; ++r)
                        input[r] = __fmul_rn(staged.weight[at], staged.x[at * a.rows + row + r]);
                    tile.add(staged.B + i * staged.stride, staged.n_padded, input);
                }
            }
            float scales[kRows];
            how.position = length + base;
            tile.round(how, first * a.n, a.lanes, scales);
            if (stored) tile.store(state);
            if constexpr (kScaled<State>) {
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    if (stored && lane == 0 && r < tile.rows) scale[r] = scales[r];
                tile.unscale(scales);
            }
        }
        if (done == end) break;

        const Sight sight{base, a.ancestors != nullptr};
        const int* paths = a.ancestors ? a.ancestors + batch_row * a.tokens : nullptr;
        const int window = end - base;
        __syncthreads();
        stage_vectors<Io, tile.kWidth>(a, staged, staged.C + done * staged.stride, end - done,
                                       [&](int i) { return source.C(done + i); });
        stage_window(staged, source, base, window, first_row, inside);
        stage_gates(staged, source, done, end, first_row, inside);
        for (int k = 0; k < window; k += kTokens) {
            const int count = min(kTokens, window - k);
            if (k > 0) __syncthreads();
            stage_vectors<Io, tile.kWidth>(a, staged, staged.B, count,
                                           [&](int i) { return source.B(base + k + i); });
            __syncthreads();
            // 8 neighbouring lanes have 8 rows of B, and a quarter of the elements of each.
            const int in_warp = threadIdx.x % 32, chunks = (count + kPairs - 1) / kPairs;
            for (int i = threadIdx.x / 32; i < (end - done) * chunks; i += blockDim.x / 32) {
                const int t = done + i / chunks, at = i % chunks * kPairs + in_warp % kPairs;
                const float* b = staged.B + min(at, count - 1) * staged.stride;
                const float* c = staged.C + t * staged.stride;
                float sum = 0.0f;
                for (int j = in_warp / kPairs * 4; j < staged.n_padded; j += 16) {
                    float left[4], right[4];
                    read4(b + j, left);
                    read4(c + j, right);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum = __fmaf_rn(left[e], right[e], sum);
                }
                sum += __shfl_xor_sync(kWholeWarp, sum, kPairs);
                sum += __shfl_xor_sync(kWholeWarp, sum, 2 * kPairs);
                const int other = base + k + at;
                const unsigned path = paths ? unsigned(paths[t]) : 0;
                if (in_warp >= kPairs || at >= count || !sight.sees(t, path, other)) continue;
                const float weight =
                    __fmul_rn(expf(sight.after(staged.step, t, path, other)), staged.dt[k + at]);
                staged.mixing[t * a.window + k + at] = __fmul_rn(weight, sum);
            }
        }
        for (int t = done + int(threadIdx.x); t < end; t += blockDim.x)
            staged.decay[t] =
                expf(sight.after(staged.step, t, paths ? unsigned(paths[t]) : 0, base - 1));
#pragma unroll 1
        for (int t = done; t < end; ++t) {
            float dot[kRows];
            tile.dot(staged.C + t * staged.stride, staged.n_padded, dot);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                dot[r] = sum_lanes(dot[r], a.lanes);
                if (lane == 0) staged.dot[t * a.rows + row + r] = dot[r];
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < (end - done) * a.rows; i += blockDim.x) {
            const int t = done + i / a.rows, r = i % a.rows;
            if (r >= inside) continue;
            const unsigned path = paths ? unsigned(paths[t]) : 0;
            float sum = __fmul_rn(staged.decay[t], staged.dot[t * a.rows + r]);
            for (int k = base; k <= t; ++k)
                if (sight.sees(t, path, k))
                    sum = __fmaf_rn(staged.mixing[t * a.window + k - base],
                                    staged.x[(k - base) * a.rows + r], sum);
            if (a.D) sum = __fmaf_rn(staged.D[r], staged.x[(t - base) * a.rows + r], sum);
            y[t * y_stride + r] = from_float<Io>(__fmul_rn(sum, staged.gate[t * a.rows + r]));
        }
        // What is new goes to the rings.
        if (blockIdx.y == 0)
            for (int t = done + int(threadIdx.x); t < end; t += blockDim.x)
                *source.ring_dt(t) = staged.dt[t - base];
        if (end == tokens) break;
        fold = base;
        base = boundary + a.flush;
        done = end;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * inside; i += blockDim.x) {
        const int t = i / inside, at = first_row + i % inside;
        source.ring_x(t)[int64(head) * a.p + at] = source.x(t)[at];
    }
    if (blockIdx.y == 0 && head % per_group == 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * a.n; i += blockDim.x) {
            const int t = i / a.n, k = i % a.n;
            source.ring_B(t)[int64(source.group) * a.n + k] = source.B(t)[k];
        }
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io, State, Vectors)                                               \
    table_row("tigon::ssd_replay<tigon::" #Io ", tigon::" #State ", " #Vectors ">", \
              ssd_replay<Io, State, Vectors>)
#define TIGON_ROWS(Io)                                                                   \
    TIGON_ROW(Io, f32, true), TIGON_ROW(Io, f32, false), TIGON_ROW(Io, bf16, true),      \
        TIGON_ROW(Io, bf16, false), TIGON_ROW(Io, f16, true), TIGON_ROW(Io, f16, false), \
        TIGON_ROW(Io, i8, true), TIGON_ROW(Io, i8, false), TIGON_ROW(Io, e4m3, true),    \
        TIGON_ROW(Io, e4m3, false)

KernelTable ssd_replay_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
