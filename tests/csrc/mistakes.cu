// A kernel that reverses 64 numbers through shared memory, with two mistakes to choose from: the
// sanitizer builds must report both.
#include "common/platform.cuh"

namespace tigon {

struct Reverse {
    float* data;
    int barrier;  // 0: no barrier between writing and reading
    int extra;    // elements written past the end
};

__global__ void reverse(const Reverse a) {
    float* shared = shared_memory();
    const int i = threadIdx.x, n = blockDim.x;
    shared[i] = a.data[i];
    if (a.barrier) __syncthreads();
    a.data[i + a.extra] = shared[n - 1 - i];
}

KernelTable ssd_update_kernels() {
    return {table_row("reverse", reverse)};
}
KernelTable conv1d_replay_kernels() {
    return {};
}
KernelTable gather_rows_kernels() {
    return {};
}
KernelTable logit_stats_kernels() {
    return {};
}
KernelTable select_tokens_kernels() {
    return {};
}
KernelTable ssd_replay_kernels() {
    return {};
}
KernelTable verify_draft_kernels() {
    return {};
}
KernelTable verify_tree_kernels() {
    return {};
}
KernelTable amax_kernels() {
    return {};
}
KernelTable conv1d_update_kernels() {
    return {};
}
KernelTable dequantize_kernels() {
    return {};
}
KernelTable moe_route_backward_kernels() {
    return {};
}
KernelTable moe_route_kernels() {
    return {};
}
KernelTable moe_sort_kernels() {
    return {};
}
KernelTable moe_sums_kernels() {
    return {};
}
KernelTable quantize_fp8_kernels() {
    return {};
}
KernelTable quantize_nvfp4_kernels() {
    return {};
}

}  // namespace tigon
