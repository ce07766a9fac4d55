// The decode step of the depthwise causal convolution with a ring of inputs in place of a window,
// so that rejected tokens need no undoing.
//
//   y[b,t,c] = act(bias[c] + sum_k weight[c,k] * u[tap k of t]),   act = silu or identity
//
// ring (slots,d,Lc), the input of position q at q % Lc; positions below 0 count as zeros. The m new
// inputs x (b,m,d) go to positions length, length + 1, ...; Lc >= width - 1 + m keeps them apart
// from the window, the width - 1 inputs before. A token's taps are itself and the inputs before it.
// With `ancestors` (b,m) bits the new tokens are a tree: a node's taps are its ancestors, nearest
// first, then the window.
//
// One thread owns one (row, channel): it reads the window, then writes. The window lies in
// registers, right-aligned, and moves on with the tokens of a chain, so that one instance serves
// every width.
#include "common/math.cuh"
#include "common/types.cuh"

namespace tigon {

constexpr int kMaxWidth = 8;
constexpr int kPast = kMaxWidth - 1;  // inputs before the current one, in registers

struct Conv1dReplay {
    void* ring;
    const int64* length;
    const void* x;
    const void* weight;
    const void* bias;          // may be null
    const int* state_indices;  // null: row b uses slot b
    const int* num_tokens;     // null: every row has `tokens`
    const int* ancestors;      // null: a chain
    void* y;                   // contiguous
    int64 slots, ring_stride_slot;
    int64 x_stride_batch, x_stride_token;
    int tokens, channels, width, places;
    int weight_dtype, bias_dtype;
    int activate;
    int unused;
};

template <typename Io>
__global__ void __launch_bounds__(128, 8) conv1d_replay(const Conv1dReplay a) {
    const int channel = blockIdx.y * blockDim.x + threadIdx.x;
    if (channel >= a.channels) return;
    const int64 row = blockIdx.x;
    const int64 slot = a.state_indices ? a.state_indices[row] : row;
    const bool valid = slot >= 0 && slot < a.slots;
    const int tokens =
        !valid ? 0 : (a.num_tokens ? min(max(a.num_tokens[row], 0), a.tokens) : a.tokens);

    Io* y = static_cast<Io*>(a.y) + row * a.tokens * a.channels + channel;
    for (int t = tokens; t < a.tokens; ++t) y[int64(t) * a.channels] = from_float<Io>(0.0f);
    if (tokens == 0) return;

    const Io* x = static_cast<const Io*>(a.x) + row * a.x_stride_batch + channel;
    Io* ring = static_cast<Io*>(a.ring) + slot * a.ring_stride_slot + int64(channel) * a.places;
    const int64 length = a.length[slot] < 0 ? 0 : a.length[slot];
    const int first_place = int(length % a.places);

    const int first = kMaxWidth - a.width;  // the oldest tap in use
    // The input at position length - back, back >= 1. No token of this call is written to its
    // place.
    const auto window = [&](int back) {
        const int place = first_place - back;
        return back > length ? 0.0f : to_float(ring[place < 0 ? place + a.places : place]);
    };
    float weight[kMaxWidth], past[kPast];
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
        weight[k] = 0.0f;
        if (k >= first)
            weight[k] = load_as(a.weight, int64(channel) * a.width + k - first, a.weight_dtype);
        if (k < kPast) past[k] = k >= first ? window(kPast - k) : 0.0f;
    }
    const float bias = a.bias ? load_as(a.bias, channel, a.bias_dtype) : 0.0f;

    for (int t = 0; t < tokens; ++t) {
        const Io given = x[t * a.x_stride_token];
        const int place = first_place + t;
        ring[place < a.places ? place : place - a.places] = given;
        float taps[kMaxWidth];
        taps[kPast] = to_float(given);
        if (a.ancestors) {
            // The nearest ancestors from the newest tap on, then the window from its newest input.
            unsigned rest = unsigned(a.ancestors[row * a.tokens + t]) & ((1u << t) - 1);
            int back = 0;
#pragma unroll
            for (int k = kPast - 1; k >= 0; --k) {
                taps[k] = 0.0f;
                if (k < first) continue;
                if (rest) {
                    const int node = 31 - __clz(int(rest));
                    rest ^= 1u << node;
                    taps[k] = to_float(x[node * a.x_stride_token]);
                } else {
                    taps[k] = window(++back);
                }
            }
        } else {
#pragma unroll
            for (int k = 0; k < kPast; ++k) taps[k] = past[k];
#pragma unroll
            for (int k = 0; k < kPast; ++k) past[k] = taps[k + 1];
        }
        float sum = bias;
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k)
            if (k >= first) sum = __fmaf_rn(weight[k], taps[k], sum);
        y[int64(t) * a.channels] = from_float<Io>(a.activate ? silu(sum) : sum);
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io) table_row("tigon::conv1d_replay<tigon::" #Io ">", conv1d_replay<Io>)

KernelTable conv1d_replay_kernels() {
    return {TIGON_ROW(f32), TIGON_ROW(bf16), TIGON_ROW(f16)};
}

#undef TIGON_ROW
#endif

}  // namespace tigon
