// The list of kernels that a program offers by name; host code, absent under NVRTC.
//
// Each .cu ends with a function that returns its own rows; bindings.cpp joins them. A row's name is
// the C++ name of the instance, which is also what NVRTC is asked for when there is no extension.
#pragma once

#ifndef __CUDACC_RTC__

#include <cstddef>
#include <vector>

namespace tigon {

struct Kernel {
    const char* name;
    const void* function;
    std::size_t parameter_bytes;  // of the one struct that the kernel takes by value
};

using KernelTable = std::vector<Kernel>;

KernelTable amax_kernels();
KernelTable conv1d_replay_kernels();
KernelTable conv1d_update_kernels();
KernelTable dequantize_kernels();
KernelTable logit_stats_kernels();
KernelTable gather_rows_kernels();
KernelTable moe_route_backward_kernels();
KernelTable moe_route_kernels();
KernelTable moe_sort_kernels();
KernelTable moe_sums_kernels();
KernelTable quantize_fp8_kernels();
KernelTable quantize_nvfp4_kernels();
KernelTable ssd_replay_kernels();
KernelTable select_tokens_kernels();
KernelTable ssd_update_kernels();
KernelTable verify_draft_kernels();
KernelTable verify_tree_kernels();

inline KernelTable all_kernels() {
    KernelTable all;
    for (const KernelTable& part :
         {amax_kernels(), conv1d_replay_kernels(), conv1d_update_kernels(), dequantize_kernels(),
          gather_rows_kernels(), logit_stats_kernels(), moe_route_backward_kernels(),
          moe_route_kernels(), moe_sort_kernels(), moe_sums_kernels(), quantize_fp8_kernels(),
          quantize_nvfp4_kernels(), select_tokens_kernels(), ssd_replay_kernels(),
          ssd_update_kernels(), verify_draft_kernels(), verify_tree_kernels()})
        all.insert(all.end(), part.begin(), part.end());
    return all;
}

}  // namespace tigon

#endif
