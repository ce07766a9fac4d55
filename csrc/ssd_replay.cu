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
#include "common/replay_tokens.cuh"

namespace tigon {

// The state after the tokens at offsets first..end-1, rounded, and stored or not.
template <typename Io, typename State, bool kVectors>
__device__ __forceinline__ void fold(const SsdReplay& a, const Place& place,
                                     Tile<State, kVectors>& tile, int first, int end, bool stored) {
    const int lane = threadIdx.x % a.lanes, row = threadIdx.x / a.lanes * kRows;
#pragma unroll 1
    for (int k = first; k < end; k += kTokens) {
        const Staged staged(shared_memory() + opaque(0), a);
        const int count = min(kTokens, end - k);
        __syncthreads();
        {
            const Tokens<Io> tokens(a, place);
            if (k == first) stage_window(staged, tokens, first, end - first);
            stage_vectors<Io, kVector<State>>(a, staged, staged.B, count,
                                              [&](int i) { return tokens.B(k + i); });
        }
        __syncthreads();
        if (k == first) {
            const Sight all{first, false};
            for (int i = threadIdx.x; i <= end - first; i += blockDim.x) {
                const float kept = expf(all.after(staged.step, end - 1, 0, first + i - 1));
                if (i == 0) staged.decay[a.tokens] = kept;
                if (i > 0) staged.weight[i - 1] = __fmul_rn(kept, staged.dt[i - 1]);
            }
            __syncthreads();
            tile.multiply(staged.decay[a.tokens]);
        }
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const int at = k - first + i;
            float input[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                input[r] = __fmul_rn(staged.weight[at], staged.x[at * a.rows + row + r]);
            tile.add(staged.B + i * staged.stride, staged.n_padded, input);
        }
    }
    const Place here = place.again();
    const int64 state_row = int64(here.head) * a.p + here.first_row + row;
    Rounding how{a.seeds != nullptr, 0, here.length + end, unsigned(a.layer)};
    if (kRounded<State> && a.seeds) how.seed = uint64(a.seeds[here.row]);
    float scales[kRows];
    tile.round(how, state_row * a.n, a.lanes, scales);
    if (stored)
        tile.store(static_cast<State*>(a.state) + here.slot * a.state_stride_slot +
                   state_row * a.n);
    if constexpr (kScaled<State>) {
        float* scale = a.state_scale + here.slot * a.scale_stride_slot + state_row;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (stored && lane == 0 && r < tile.rows) scale[r] = scales[r];
        tile.unscale(scales);
    }
}

// mixing[t][k] for the tokens t in done..end-1 and the `count` tokens from offset base + first on,
// whose B is staged. 8 neighbouring lanes have 8 rows of B, and a quarter of the elements of each.
template <typename Io>
__device__ __forceinline__ void mix(const Staged& staged, const Tokens<Io>& tokens,
                                    const Sight& sight, int done, int end, int first, int count) {
    const int lane = threadIdx.x % 32, chunks = (count + kPairs - 1) / kPairs;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < (end - done) * chunks; i += blockDim.x / 32) {
        const int t = done + i / chunks, at = i % chunks * kPairs + lane % kPairs;
        const float* b = staged.B + min(at, count - 1) * staged.stride;
        const float* c = staged.C + t * staged.stride;
        float sum = 0.0f;
#pragma unroll 2
        for (int j = lane / kPairs * 4; j < staged.n_padded; j += 16) {
            float left[4], right[4];
            read4(b + j, left);
            read4(c + j, right);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum = __fmaf_rn(left[e], right[e], sum);
        }
        sum = __fadd_rn(sum, __shfl_xor_sync(kWholeWarp, sum, kPairs));
        sum = __fadd_rn(sum, __shfl_xor_sync(kWholeWarp, sum, 2 * kPairs));
        const int k = first + at, other = sight.base + k;
        const unsigned path = tokens.path(t);
        if (lane >= kPairs || at >= count || !sight.sees(t, path, other)) continue;
        const float kept = expf(sight.after(staged.step, t, path, other));
        staged.mixing[t * tokens.a.window + k] = __fmul_rn(__fmul_rn(kept, staged.dt[k]), sum);
    }
}

// y and the ring's dt' of the tokens done..end-1, from the state at offset base.
template <typename Io, typename State, bool kVectors>
__device__ __forceinline__ void outputs(const SsdReplay& a, const Place& place,
                                        Tile<State, kVectors>& tile, int base, int done, int end) {
    const Sight sight{base, a.ancestors != nullptr};
    const int window = end - base;
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < window; k += kTokens) {
        const Staged staged(shared_memory() + opaque(0), a);
        const Tokens<Io> tokens(a, place);
        const int count = min(kTokens, window - k);
        if (k == 0) {
            stage_vectors<Io, kVector<State>>(a, staged, staged.C + done * staged.stride,
                                              end - done,
                                              [&](int i) { return tokens.C(done + i); });
            stage_window(staged, tokens, base, window);
            stage_gates(staged, tokens, done, end);
        } else {
            __syncthreads();
        }
        stage_vectors<Io, kVector<State>>(a, staged, staged.B, count,
                                          [&](int i) { return tokens.B(base + k + i); });
        __syncthreads();
        mix(staged, tokens, sight, done, end, k, count);
    }
    const Staged staged(shared_memory() + opaque(0), a);
    const int lane = threadIdx.x % a.lanes, row = threadIdx.x / a.lanes * kRows;
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
    const Tokens<Io> tokens(a, place);
#pragma unroll 1
    for (int t = done + int(threadIdx.x); t < end; t += blockDim.x) {
        staged.decay[t] = expf(sight.after(staged.step, t, tokens.path(t), base - 1));
        if (blockIdx.y == 0) *tokens.ring_dt(t) = staged.dt[t - base];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - done) * a.rows; i += blockDim.x) {
        const int t = done + i / a.rows, r = i % a.rows;
        if (r >= tokens.inside) continue;
        const unsigned path = tokens.path(t);
        float sum = __fmul_rn(staged.decay[t], staged.dot[t * a.rows + r]);
#pragma unroll 1
        for (int k = base; k <= t; ++k)
            if (sight.sees(t, path, k))
                sum = __fmaf_rn(staged.mixing[t * a.window + k - base],
                                staged.x[(k - base) * a.rows + r], sum);
        if (a.D) sum = __fmaf_rn(staged.D[r], staged.x[(t - base) * a.rows + r], sum);
        tokens.y(t)[r] = from_float<Io>(__fmul_rn(sum, staged.gate[t * a.rows + r]));
    }
}

// Blocks on a multiprocessor at least. Without 16-byte accesses there are more addresses and random
// words that begin within a run to hold.
template <typename State, bool kVectors>
constexpr int kBlocks = kVectors          ? 4
                        : kRounded<State> ? 2
                                          : 3;

template <typename Io, typename State, bool kVectors>
__global__ void __launch_bounds__(kThreads, kBlocks<State, kVectors>)
    ssd_replay(const SsdReplay a) {
    Place place{
        int(blockIdx.x / a.heads), 0, int(blockIdx.x % a.heads), int(blockIdx.y) * a.rows, 0, 0, 0};
    place.slot = a.state_indices ? a.state_indices[place.row] : place.row;
    place.inside = min(a.rows, a.p - place.first_row);
    const bool valid = place.slot >= 0 && place.slot < a.slots;
    const int count = a.num_tokens ? a.num_tokens[place.row] : a.tokens;
    const int tokens = valid ? min(max(count, 0), a.tokens) : 0;
    {
        const Tokens<Io> padding(a, place);
        for (int t = tokens; t < a.tokens; ++t)
            for (int i = threadIdx.x; i < place.inside; i += blockDim.x)
                padding.y(t)[i] = from_float<Io>(0.0f);
    }
    if (!valid) return;

    const int lane = threadIdx.x % a.lanes, row = threadIdx.x / a.lanes * kRows;
    Tile<State, kVectors> tile(lane, a.lanes, place.inside - row, a.n);
    {
        const int64 first = int64(place.head) * a.p + place.first_row + row;
        tile.load(
            static_cast<const State*>(a.state) + place.slot * a.state_stride_slot + first * a.n,
            kScaled<State> ? a.state_scale + place.slot * a.scale_stride_slot + first : nullptr);
    }

    // Positions from here on are offsets from `length`. Whatever the cursor holds, they stay in
    // the rings.
    place.length = max(a.length[place.slot], int64(0));
    place.first_place = int(place.length % a.places);
    const int boundary = -int(place.length % a.flush);
    const int64 behind = a.checkpoint[place.slot] - place.length;
    const int oldest = max(boundary - a.flush, a.tokens - a.places);
    const int start = behind < oldest ? oldest : behind > 0 ? 0 : int(behind);

    // Tokens at offsets from..base-1 go into the state, then done..end-1 get their outputs.
    int from = start, base = max(start, boundary), done = 0;
#pragma unroll 1
    while (true) {
        const bool first = done == 0;
        const int end = a.ancestors || !first ? tokens : min(tokens, boundary + a.flush);
        if (from < base) fold<Io>(a, place, tile, from, base, first);
        if (done == end) break;
        outputs<Io>(a, place, tile, base, done, end);
        if (end == tokens) break;
        from = base;
        base = boundary + a.flush;
        done = end;
    }

    // What is new goes to the rings.
    const Tokens<Io> source(a, place);
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * place.inside; i += blockDim.x) {
        const int t = i / place.inside, r = i % place.inside;
        source.ring_x(t)[r] = source.x(t)[r];
    }
    if (blockIdx.y == 0 && source.head % (a.heads / a.groups) == 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * a.n; i += blockDim.x)
            source.ring_B(i / a.n)[i % a.n] = source.B(i / a.n)[i % a.n];
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
