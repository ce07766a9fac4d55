// Rows of several tensors by one index, in one launch: out[i] = in[index[i]], or a fill where
// index[i] names no row.
//
// It moves what belongs to kept tokens, and with the inverse map it is its own backward: every row
// of the gradient is written once, those of dropped tokens with zeros.
//
// Rows are bytes: a tensor says the largest access (1 to 16 bytes) that its rows allow, and how
// many threads share a row. blockIdx.y is the tensor.
#include "common/platform.cuh"

namespace tigon {

constexpr int kTensors = 8;  // python/native/tokens.py has the same
constexpr int kFlight = 4;

struct GatherItem {
    const char* from;
    char* to;
    int64 stride;     // of a row of `from`, in bytes
    int64 row_bytes;  // of both; the rows of `to` are packed
    uint64 fill;      // the fill's bytes, repeated
    int unit, lanes;  // bytes an access; threads a row, a power of two
};

struct GatherRows {
    GatherItem item[kTensors];
    const int* index;
    int rows, source_rows;
};

template <typename Unit>
__device__ __forceinline__ void move(const GatherItem& item, const char* from, char* to, int lane,
                                     Unit fill) {
    const int64 count = item.row_bytes / int64(sizeof(Unit));
    const Unit* source = reinterpret_cast<const Unit*>(from);
    Unit* target = reinterpret_cast<Unit*>(to);
#pragma unroll 1
    for (int64 i = lane; i < count; i += kFlight * item.lanes) {
        Unit value[kFlight];  // loads on their way together
#pragma unroll
        for (int u = 0; u < kFlight; ++u) {
            const int64 at = i + u * item.lanes;
            value[u] = from && at < count ? source[at] : fill;
        }
#pragma unroll
        for (int u = 0; u < kFlight; ++u)
            if (i + u * item.lanes < count) target[i + u * item.lanes] = value[u];
    }
}

__global__ void __launch_bounds__(256) gather_rows(const GatherRows a) {
    const GatherItem& item = a.item[blockIdx.y];
    const int64 row = int64(blockIdx.x) * (blockDim.x / item.lanes) + threadIdx.x / item.lanes;
    if (row >= a.rows) return;
    const int lane = threadIdx.x % item.lanes, source = a.index[row];
    const bool real = source >= 0 && source < a.source_rows;
    const char* from = real ? item.from + source * item.stride : nullptr;
    char* to = item.to + row * item.row_bytes;
    const unsigned low = unsigned(item.fill), high = unsigned(item.fill >> 32);
    switch (item.unit) {
        case 16:
            move(item, from, to, lane, uint4{low, high, low, high});
            break;
        case 8:
            move(item, from, to, lane, uint2{low, high});
            break;
        case 4:
            move(item, from, to, lane, low);
            break;
        case 2:
            move(item, from, to, lane, static_cast<unsigned short>(low));
            break;
        default:
            move(item, from, to, lane, static_cast<unsigned char>(low));
            break;
    }
}

#ifndef __CUDACC_RTC__
KernelTable gather_rows_kernels() {
    return {table_row("tigon::gather_rows", gather_rows)};
}
#endif

}  // namespace tigon
