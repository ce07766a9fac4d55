// The Mamba-2 recurrence for 1 to 16 new tokens, on a slot-indexed state that is updated in place.
//
//   dt' = clamp(softplus(dt + dt_bias), dt_min, dt_max)      softplus and bias optional
//   S   = exp(A dt') S + dt' x B^T                           S (p,n), one per head
//   y   = (S C + D x) * silu(z)                              D and z optional
//
// state (slots,h,p,n); x, z, y (b,m,h,p); dt (b,m,h); A, dt_bias (h); B, C (b,m,g,n); D (h)|(h,p).
// Rows past num_tokens[b] and rows without a valid slot get y = 0; without a token the state is
// not touched. Two rows of a call must not share a slot.
//
// A decode step is bytes: the state is read once and written once. A block owns `rows` rows of p of
// one head. A group of `lanes` lanes owns kRows of those rows; a lane holds 16 elements of n of
// each of them in registers through all tokens: 128 bytes of an fp32 state a thread in flight. All
// else is staged in shared memory as fp32 while the state is on its way: B and C by the first
// warps, the step sizes from the middle on, x, z and D by the last ones, so that at small m no warp
// waits for memory twice.
//
// Which lane adds which elements depends on n and the formats alone, never on the batch, m,
// alignment or strides, so a row's bits do not either.
#include "common/math.cuh"
#include "common/types.cuh"

namespace tigon {

constexpr int kElements = 16;  // of n, a lane
constexpr int kRows = 2;       // of p, a lane
constexpr int kThreads = 128;  // a block, at most

struct SsdUpdate {
    void* state;
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
    void* y;                   // contiguous
    int64 slots, state_stride_slot;
    int64 x_stride_batch, x_stride_token, z_stride_batch, z_stride_token;
    int64 B_stride_batch, B_stride_token, C_stride_batch, C_stride_token;
    int64 dt_stride_batch, dt_stride_token, dt_stride_head;
    int64 D_stride_head, D_stride_p;
    int tokens, heads, groups, p, n;
    int lanes, rows;  // lanes a row of p; rows of p a block
    int dt_dtype, A_dtype, D_dtype, dt_bias_dtype;
    int dt_softplus, staging_vectors;
    float dt_min, dt_max;
    int unused;
};

// Shared memory, in floats; python/native/mamba2.py counts the same.
struct Staged {
    float *B, *C;       // (tokens, n_padded), see place()
    float *x, *gate;    // (tokens, rows); gate = silu(z) or 1
    float* D;           // (rows)
    float *dt, *decay;  // (tokens)
    int n_padded;

    __device__ Staged(float* memory, const SsdUpdate& a) {
        n_padded = (a.n + 7) / 8 * 8;
        B = memory;
        C = B + a.tokens * n_padded;
        x = C + a.tokens * n_padded;
        gate = x + a.tokens * a.rows;
        D = gate + a.tokens * a.rows;
        dt = D + a.rows;
        decay = dt + a.tokens;
    }
};

// Where element k of B or C lies. A lane of a 16-bit state needs 8 neighbours, two 16-byte reads;
// with the odd quads in a half of their own, 8 lanes read 128 bytes in a row, without conflicts.
template <int kWidth>
__device__ __forceinline__ int place(int k, int n_padded) {
    return kWidth == 4 ? k : (k & 4 ? n_padded / 2 : 0) + k / 8 * 4 + k % 4;
}

template <typename Io, int kWidth>
__device__ void stage_BC(const SsdUpdate& a, const Staged& staged, const Io* B, const Io* C,
                         int tokens) {
    if (a.staging_vectors) {
        constexpr int kStep = kVector<Io>;
        const int steps = a.n / kStep;
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * steps; i += blockDim.x) {
            const int t = i / steps, k = i % steps * kStep;
            float b[kStep], c[kStep];
            load_vector(B + t * a.B_stride_token + k, b);
            load_vector(C + t * a.C_stride_token + k, c);
#pragma unroll
            for (int j = 0; j < kStep; j += 4) {
                const int at = t * staged.n_padded + place<kWidth>(k + j, staged.n_padded);
                *reinterpret_cast<float4*>(staged.B + at) =
                    make_float4(b[j], b[j + 1], b[j + 2], b[j + 3]);
                *reinterpret_cast<float4*>(staged.C + at) =
                    make_float4(c[j], c[j + 1], c[j + 2], c[j + 3]);
            }
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * a.n; i += blockDim.x) {
            const int t = i / a.n, k = i % a.n;
            const int at = t * staged.n_padded + place<kWidth>(k, staged.n_padded);
            staged.B[at] = to_float(B[t * a.B_stride_token + k]);
            staged.C[at] = to_float(C[t * a.C_stride_token + k]);
        }
    }
}

// dt' and exp(A dt') of each token: one thread a token.
__device__ __forceinline__ void stage_steps(const SsdUpdate& a, const Staged& staged, int64 row,
                                            int head, int tokens) {
    const int t = (threadIdx.x + blockDim.x / 2) % blockDim.x;
    if (t >= tokens) return;
    const float A = load_as(a.A, head, a.A_dtype);
    float dt =
        load_as(a.dt, row * a.dt_stride_batch + t * a.dt_stride_token + head * a.dt_stride_head,
                a.dt_dtype);
    if (a.dt_bias) dt += load_as(a.dt_bias, head, a.dt_bias_dtype);
    if (a.dt_softplus) dt = softplus(dt);
    dt = clamp(dt, a.dt_min, a.dt_max);
    staged.dt[t] = dt;
    staged.decay[t] = expf(A * dt);
}

// x, silu(z) and D of this block's rows: the `inside` first ones are rows of p, the rest read as 0.
template <typename Io>
__device__ __forceinline__ void stage_rows(const SsdUpdate& a, const Staged& staged, int64 row,
                                           int head, int first_row, int inside, int tokens) {
    const int64 at_head = int64(head) * a.p + first_row;
    const Io* x = static_cast<const Io*>(a.x) + row * a.x_stride_batch + at_head;
    const Io* z = a.z ? static_cast<const Io*>(a.z) + row * a.z_stride_batch + at_head : nullptr;
#pragma unroll 1
    for (int i = blockDim.x - 1 - threadIdx.x; i < tokens * a.rows; i += blockDim.x) {
        const int t = i / a.rows, r = i % a.rows;
        const bool real = r < inside;
        staged.x[i] = real ? to_float(x[t * a.x_stride_token + r]) : 0.0f;
        staged.gate[i] = real && z ? silu(to_float(z[t * a.z_stride_token + r])) : 1.0f;
        if (t > 0) continue;
        const int64 at = head * a.D_stride_head + (first_row + r) * a.D_stride_p;
        staged.D[r] = real && a.D ? load_as(a.D, at, a.D_dtype) : 0.0f;
    }
}

// What a lane holds of the state: of kRows neighbouring rows of p, kChunks runs of kWidth elements.
// With 16-byte accesses n is a multiple of kWidth, and a run is inside n whole or not at all.
template <typename State, bool kVectors>
struct Tile {
    static constexpr int kWidth = kVector<State>;
    static constexpr int kChunks = kElements / kWidth;

    float value[kRows][kChunks][kWidth];
    int column, column_step;  // the runs begin at column + chunk * column_step
    int rows, n;              // rows of this lane that are inside p; columns of the state

    // state points at the lane's first row.
    __device__ void load(const State* state) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int k = column + c * column_step;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) value[r][c][i] = 0.0f;
                if (r >= rows || k >= n) continue;
                if constexpr (kVectors) {
                    load_vector(state + r * n + k, value[r][c]);
                } else {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        if (k + i < n) value[r][c][i] = to_float(state[r * n + k + i]);
                }
            }
        }
    }

    __device__ void store(State* state) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int k = column + c * column_step;
                if (r >= rows || k >= n) continue;
                if constexpr (kVectors) {
                    store_vector(state + r * n + k, value[r][c]);
                } else {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        if (k + i < n) state[r * n + k + i] = from_float<State>(value[r][c][i]);
                }
            }
        }
    }

    // S = decay S + input B^T for one token, and this lane's part of S C.
    __device__ void step(const float* B, const float* C, int n_padded, float decay,
                         const float (&input)[kRows], float (&dot)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) dot[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int k = column + c * column_step;
            if (k >= n) continue;
#pragma unroll
            for (int q = 0; q < kWidth; q += 4) {
                const int at = place<kWidth>(k + q, n_padded);
                const float4 b4 = *reinterpret_cast<const float4*>(B + at);
                const float4 c4 = *reinterpret_cast<const float4*>(C + at);
                const float b[4] = {b4.x, b4.y, b4.z, b4.w}, w[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (!kVectors && k + q + i >= n) continue;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        float& s = value[r][c][q + i];
                        s = decay * s + input[r] * b[i];
                        dot[r] += s * w[i];
                    }
                }
            }
        }
    }
};

template <typename Io, typename State, bool kVectors>
__global__ void __launch_bounds__(kThreads, kVectors ? 5 : 4) ssd_update(const SsdUpdate a) {
    const int64 batch_row = blockIdx.x / a.heads;
    const int head = blockIdx.x % a.heads, group = head / (a.heads / a.groups);
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
    if (tokens == 0) return;

    const int lane = threadIdx.x % a.lanes, row = threadIdx.x / a.lanes * kRows;
    State* state = static_cast<State*>(a.state) + slot * a.state_stride_slot +
                   (int64(head) * a.p + first_row + row) * a.n;
    Tile<State, kVectors> tile;
    tile.column = lane * tile.kWidth;
    tile.column_step = a.lanes * tile.kWidth;
    tile.rows = inside - row;
    tile.n = a.n;
    tile.load(state);

    const Staged staged(shared_memory(), a);
    stage_BC<Io, tile.kWidth>(
        a, staged, static_cast<const Io*>(a.B) + batch_row * a.B_stride_batch + group * a.n,
        static_cast<const Io*>(a.C) + batch_row * a.C_stride_batch + group * a.n, tokens);
    stage_rows<Io>(a, staged, batch_row, head, first_row, inside, tokens);
    stage_steps(a, staged, batch_row, head, tokens);
    __syncthreads();

#pragma unroll 1
    for (int t = 0; t < tokens; ++t) {
        const float* x = staged.x + t * a.rows + row;
        float input[kRows], dot[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) input[r] = staged.dt[t] * x[r];
        tile.step(staged.B + t * staged.n_padded, staged.C + t * staged.n_padded, staged.n_padded,
                  staged.decay[t], input, dot);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float sum = sum_lanes(dot[r], a.lanes);
            if (lane != 0 || r >= tile.rows) continue;
            if (a.D) sum += staged.D[row + r] * x[r];
            y[t * y_stride + row + r] = from_float<Io>(sum * staged.gate[t * a.rows + row + r]);
        }
    }
    tile.store(state);
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io, State, Vectors)                                               \
    table_row("tigon::ssd_update<tigon::" #Io ", tigon::" #State ", " #Vectors ">", \
              ssd_update<Io, State, Vectors>)
#define TIGON_ROWS(Io)                                                              \
    TIGON_ROW(Io, f32, true), TIGON_ROW(Io, f32, false), TIGON_ROW(Io, bf16, true), \
        TIGON_ROW(Io, bf16, false), TIGON_ROW(Io, f16, true), TIGON_ROW(Io, f16, false)

KernelTable ssd_update_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
