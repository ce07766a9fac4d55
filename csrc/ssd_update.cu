// The Mamba-2 recurrence for 1 to 16 new tokens, on a slot-indexed state that is updated in place.
//
//   dt' = clamp(softplus(dt + dt_bias), dt_min, dt_max)      softplus and bias optional
//   S   = exp(A dt') S + dt' x B^T                           S (p,n), one per head
//   y   = (S C + D x) * silu(z)                              D and z optional
//
// state (slots,h,p,n) in one of the formats of common/state_format.cuh, rounded once, at the end;
// x, z, y (b,m,h,p); dt (b,m,h); A, dt_bias (h); B, C (b,m,g,n); D (h)|(h,p); state_scale
// (slots,h,p). Rows past num_tokens[b] and rows without a valid slot get y = 0; without a token the
// state is not touched. Two rows of a call must not share a slot.
//
// A decode step is bytes: the state is read once and written once. A block owns `rows` rows of p of
// one head, in registers through all tokens (common/state_tile.cuh). All else is staged in shared
// memory as fp32 while the state is on its way: B and C by the first warps, the step sizes from the
// middle on, x, z and D by the last ones, so that at small m no warp waits for memory twice.
#include "common/state_tile.cuh"

namespace tigon {

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
    float* state_scale;        // null but for 8-bit states
    const int64* seeds;        // null: the state is rounded to nearest
    const int64* positions;    // of each row's first token; with seeds
    int64 slots, state_stride_slot, scale_stride_slot;
    int64 x_stride_batch, x_stride_token, z_stride_batch, z_stride_token;
    int64 B_stride_batch, B_stride_token, C_stride_batch, C_stride_token;
    int64 dt_stride_batch, dt_stride_token, dt_stride_head;
    int64 D_stride_head, D_stride_p;
    int tokens, heads, groups, p, n;
    int lanes, rows;  // lanes a row of p; rows of p a block
    int dt_dtype, A_dtype, D_dtype, dt_bias_dtype;
    int dt_softplus, staging_vectors;
    float dt_min, dt_max;
    int layer;
};

// Shared memory, in floats; python/native/mamba2.py counts the same.
struct Staged {
    float *B, *C;       // (tokens, n_padded), see place()
    float *x, *gate;    // (tokens, rows); gate = silu(z) or 1
    float* D;           // (rows)
    float *dt, *decay;  // (tokens)
    int n_padded;

    __device__ Staged(float* memory, const SsdUpdate& a) {
        n_padded = padded(a.n);
        B = memory;
        C = B + a.tokens * n_padded;
        x = C + a.tokens * n_padded;
        gate = x + a.tokens * a.rows;
        D = gate + a.tokens * a.rows;
        dt = D + a.rows;
        decay = dt + a.tokens;
    }
};

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

template <typename Io, typename State, bool kVectors>
__global__ void __launch_bounds__(kThreads, kVectors          ? 5
                                            : kRounded<State> ? 3
                                                              : 4) ssd_update(const SsdUpdate a) {
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
    const int64 first = int64(head) * a.p + first_row + row;  // row of the state, of this lane
    State* state = static_cast<State*>(a.state) + slot * a.state_stride_slot + first * a.n;
    float* scale = kScaled<State> ? a.state_scale + slot * a.scale_stride_slot + first : nullptr;
    Tile<State, kVectors> tile(lane, a.lanes, inside - row, a.n);
    tile.load(state, scale);

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
    Rounding how{a.seeds != nullptr, 0, 0, unsigned(a.layer)};
    if (kRounded<State> && a.seeds) {
        how.seed = uint64(a.seeds[batch_row]);
        how.position = a.positions[batch_row] + tokens;
    }
    float scales[kRows];
    tile.round(how, first * a.n, a.lanes, scales);
    tile.store(state);
    if constexpr (kScaled<State>) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (lane == 0 && r < tile.rows) scale[r] = scales[r];
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io, State, Vectors)                                               \
    table_row("tigon::ssd_update<tigon::" #Io ", tigon::" #State ", " #Vectors ">", \
              ssd_update<Io, State, Vectors>)
#define TIGON_ROWS(Io)                                                                   \
    TIGON_ROW(Io, f32, true), TIGON_ROW(Io, f32, false), TIGON_ROW(Io, bf16, true),      \
        TIGON_ROW(Io, bf16, false), TIGON_ROW(Io, f16, true), TIGON_ROW(Io, f16, false), \
        TIGON_ROW(Io, i8, true), TIGON_ROW(Io, i8, false), TIGON_ROW(Io, e4m3, true),    \
        TIGON_ROW(Io, e4m3, false)

KernelTable ssd_update_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
