// The part of CUDA that csrc/ uses, on a CPU: csrc/*.cu compile with g++ -x c++ -DTIGON_HOST_BUILD.
//
// Every CUDA thread is a std::thread, so that ThreadSanitizer sees a missing __syncthreads as the
// data race that it is; with HOST_FIBERS every CUDA thread is a fiber of one thread, which is some
// hundred times faster and deterministic. Blocks run one after the other. Dynamic shared memory is
// a heap block of the launch's size (in whole 16 bytes), filled with NaNs.
#pragma once

#include <cuda_runtime.h>  // types and, for g++, empty qualifiers

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "common/kernel_table.cuh"

#ifdef HOST_FIBERS
#include <ucontext.h>

#include <csetjmp>
#else
#include <barrier>
#include <thread>
#endif

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace host {

constexpr int kWarp = 32;

#ifdef HOST_FIBERS
void yield();

// All of `count` fibers meet here; each that comes early lets the others run.
class Barrier {
public:
    explicit Barrier(int count) : count_(count), missing_(count) {}
    void arrive_and_wait() {
        if (--missing_ == 0) {
            missing_ = count_;
            ++round_;
            return;
        }
        for (const int round = round_; round == round_;) yield();
    }

private:
    int count_, missing_, round_ = 0;
};
#else
using Barrier = std::barrier<>;
#endif

struct Warp {
    Barrier barrier{kWarp};
    float value[2][kWarp];  // by turns, so that one meeting a shuffle is enough
};

struct Block {
    uint3 index;
    dim3 size;
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    std::unique_ptr<float4[]> shared;
};

struct Thread {
    uint3 index;
    Block* block;
    bool turn = false;

    Warp& warp() const { return *block->warps[index.x / kWarp]; }
    int lane() const { return index.x % kWarp; }
};

#ifdef HOST_FIBERS
inline Thread* current = nullptr;
#else
inline thread_local Thread* current = nullptr;
#endif

void run_block(Block& block, const std::function<void()>& body);

// What a row of the kernel table points to here: a function of the packed arguments.
using Packed = std::function<void(const void*)>;
inline std::deque<Packed> packed_kernels;

}  // namespace host

#define threadIdx (host::current->index)
#define blockIdx (host::current->block->index)
#define blockDim (host::current->block->size)

inline void __syncthreads() {
    host::current->block->barrier.arrive_and_wait();
}

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    host::Warp& warp = host::current->warp();
    const int lane = host::current->lane();
    float (&values)[host::kWarp] = warp.value[host::current->turn];
    host::current->turn = !host::current->turn;
    values[lane] = value;
    warp.barrier.arrive_and_wait();
    return values[lane ^ offset];
}

// What the lane `source` gives; all lanes of the warp take part.
template <typename T>
T host_lane(T value, int source) {
    static_assert(sizeof(T) == 4);
    float bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits = __shfl_xor_sync(0, bits, host::current->lane() ^ source);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline int __shfl_up_sync(unsigned, int value, int offset) {
    const int lane = host::current->lane();
    return host_lane(value, lane < offset ? lane : lane - offset);
}
template <typename T, typename Combine>
T host_reduce(T value, Combine combine) {
    for (int offset = 1; offset < host::kWarp; offset *= 2)
        value = combine(value, host_lane(value, host::current->lane() ^ offset));
    return value;
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
    return host_reduce(value, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
    return host_reduce(value, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
    return host_reduce(value, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __ballot_sync(unsigned, bool value) {
    return host_reduce(value ? 1u << host::current->lane() : 0u,
                       [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool value) {
    return __ballot_sync(mask, value) != 0;
}
inline void __syncwarp() {
    host::current->warp().barrier.arrive_and_wait();
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}

inline int __clz(int bits) {
    return bits ? __builtin_clz(unsigned(bits)) : 32;
}

inline float* host_shared_memory() {
    return reinterpret_cast<float*>(host::current->block->shared.get());
}

inline int atomicMax(int* place, int value) {
    int seen = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(place, &seen, value, true, __ATOMIC_RELAXED,
                                                        __ATOMIC_RELAXED)) {
    }
    return seen;
}

inline int atomicAdd(int* place, int value) {
    return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAdd(unsigned* place, unsigned value) {
    return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}
inline unsigned atomicOr(unsigned* place, unsigned value) {
    return __atomic_fetch_or(place, value, __ATOMIC_RELAXED);
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline int __float_as_int(float value) {
    return static_cast<int>(__float_as_uint(value));
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// One rounding each: the host builds have no instruction that fuses two.
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __frcp_rn(float a) {
    return 1.0f / a;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __fadd_rz(float a, float b) {
    const double exact = static_cast<double>(a) + b;
    const float nearest = static_cast<float>(exact);
    return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <typename T>
T min(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

namespace tigon {

template <typename Arguments>
Kernel table_row(const char* name, void (*kernel)(Arguments)) {
    host::packed_kernels.push_back([kernel](const void* bytes) {
        Arguments arguments;
        std::memcpy(&arguments, bytes, sizeof(arguments));
        kernel(arguments);
    });
    return {name, &host::packed_kernels.back(), sizeof(Arguments)};
}

}  // namespace tigon
