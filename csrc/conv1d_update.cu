// Depthwise causal convolution for 1 to 16 new tokens, with a rolling window per slot.
//
//   y[b,t,c] = act(bias[c] + sum_k weight[c,k] * u[t - (width-1) + k]),   act = silu or identity
//
// u is the slot's stored inputs followed by x[b]. x and y are (b,m,d), weight (d,width) with width
// 2 to 8, state (slots,d,W) with W >= width-1, newest input last; all W inputs move on by the
// number of real tokens. Rows past num_tokens[b] and rows without a valid slot get y = 0.
//
// One thread owns one (row, channel): the newest 7 inputs live in registers, right-aligned, so that
// one instance serves every width, and the state is read and written once.
#include "common/math.cuh"
#include "common/types.cuh"

namespace tigon {

constexpr int kMaxWidth = 8;
constexpr int kPast = kMaxWidth - 1;  // inputs before the current one, in registers

struct Conv1dUpdate {
    void* state;
    const void* x;
    const void* weight;
    const void* bias;          // may be null
    const int* state_indices;  // null: row b uses slot b
    const int* num_tokens;     // null: every row has `tokens`
    void* y;                   // contiguous
    int64 slots, state_stride_slot, state_stride_channel, state_stride_time;
    int64 x_stride_batch, x_stride_token;
    int tokens, channels, width, window;
    int weight_dtype, bias_dtype;
    int activate;
    int unused;
};

template <typename Io, typename State>
__global__ void __launch_bounds__(128, 8) conv1d_update(const Conv1dUpdate a) {
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
    State* state = static_cast<State*>(a.state) + slot * a.state_stride_slot +
                   channel * a.state_stride_channel;

    const int first = kMaxWidth - a.width;  // the oldest tap in use
    const int kept = a.window - kPast;      // inputs older than the registers hold; may be negative
    float weight[kMaxWidth], input[kMaxWidth];
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
        weight[k] = input[k] = 0.0f;
        if (k >= first)
            weight[k] = load_as(a.weight, int64(channel) * a.width + k - first, a.weight_dtype);
        if (k < kPast && kept + k >= 0)
            input[k] = to_float(state[int64(kept + k) * a.state_stride_time]);
    }
    const float bias = a.bias ? load_as(a.bias, channel, a.bias_dtype) : 0.0f;

    for (int t = 0; t < tokens; ++t) {
        input[kPast] = to_float(x[t * a.x_stride_token]);
        float sum = bias;
#pragma unroll
        for (int k = 0; k < kMaxWidth; ++k)
            if (k >= first) sum += weight[k] * input[k];
        y[int64(t) * a.channels] = from_float<Io>(a.activate ? silu(sum) : sum);
#pragma unroll
        for (int k = 0; k < kPast; ++k) input[k] = input[k + 1];
    }

    // A longer window: upwards, each place is read before it is written.
    for (int i = 0; i < kept; ++i) {
        const int source = i + tokens;
        state[i * a.state_stride_time] =
            source < a.window
                ? state[source * a.state_stride_time]
                : from_float<State>(to_float(x[(source - a.window) * a.x_stride_token]));
    }
#pragma unroll
    for (int k = 0; k < kPast; ++k)
        if (kept + k >= 0)
            state[int64(kept + k) * a.state_stride_time] = from_float<State>(input[k]);
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io, State) \
    table_row("tigon::conv1d_update<tigon::" #Io ", tigon::" #State ">", conv1d_update<Io, State>)
#define TIGON_ROWS(Io) TIGON_ROW(Io, f32), TIGON_ROW(Io, bf16), TIGON_ROW(Io, f16)

KernelTable conv1d_update_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
