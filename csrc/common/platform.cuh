// What differs between the three compilers of these files: nvcc, NVRTC, and g++ for the host build
// (one CPU thread or fiber per CUDA thread; tests/csrc provides host_cuda.h).
#pragma once

#if defined(TIGON_HOST_BUILD)
#include "host_cuda.h"
#elif !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#include "kernel_table.cuh"

namespace tigon {

using int64 = long long;
using uint64 = unsigned long long;
using uint8 = unsigned char;

constexpr unsigned kWholeWarp = 0xffffffffu;

// The dynamic shared memory of the block, on a 16-byte boundary.
__device__ __forceinline__ float* shared_memory() {
#if defined(TIGON_HOST_BUILD)
    return host_shared_memory();
#else
    extern __shared__ float4 shared[];
    return reinterpret_cast<float*>(shared);
#endif
}

#if !defined(TIGON_HOST_BUILD) && !defined(__CUDACC_RTC__)
template <typename Arguments>
Kernel table_row(const char* name, void (*kernel)(Arguments)) {
    return {name, reinterpret_cast<const void*>(kernel), sizeof(Arguments)};
}
#endif

}  // namespace tigon
