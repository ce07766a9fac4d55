// The largest magnitude of a matrix, of its rows, or of its columns, for the scales of a quantizer.
//
//   amax = max |y|,   y = what common/source.cuh says, or 16 neighbours of it times diag(signs) H16
//   / 4
//
// Results are fp32 and must begin as zeros; a NaN makes them NaN. Rows and columns come from one
// read of x. The maximum of non-negative floats is the maximum of their bits, NaN on top, so the
// integer atomics give the same result in any order.
#include "common/tile.cuh"

namespace tigon {

struct Amax {
    Source source;
    int* row;               // () or (m); bits of fp32
    int* column;            // () or (k)
    const float* hadamard;  // null: none
    int make_row, make_column;
    int per_line;                       // a result for each row and column
    int hadamard_row, hadamard_column;  // which side the signs are for
    int unused;
};

template <typename Io>
__global__ void __launch_bounds__(kThreads, 4) amax(const Amax a) {
    const int across = (a.source.k + kTile - 1) / kTile;
    const int first_row = blockIdx.x / across * kTile, first_column = blockIdx.x % across * kTile;
    const int filled = filled_rows(a.source, first_row, a.make_column);
    load_tile<Io>(a.source, first_row, first_column, filled, a.hadamard);
    __syncthreads();
#pragma unroll 1
    for (int column = 0; column < 2; ++column) {
        if (!(column ? a.make_column : a.make_row)) continue;
        const Side side(a.source, first_row, first_column, column);
        const bool rotate = column ? a.hadamard_column : a.hadamard_row;
        const int run = threadIdx.x % kRuns;
        int* result = column ? a.column : a.row;
        float most = 0.0f;
#pragma unroll 1
        for (int line = threadIdx.x / kRuns; line < (column ? kTile : filled); line += kLines) {
            float v[kRun];
            gather<Io>(column, line, run, v);
            if (rotate) hadamard_16(v, tile_memory().signs);
            const float here = largest(v);
            if (a.per_line) {
                const float all = max_lanes(here, kRuns);
                if (run == 0 && side.first_line + line < side.lines)
                    atomicMax(result + side.first_line + line, __float_as_int(all) & 0x7fffffff);
            }
            most = max_nan(most, here);
        }
        if (a.per_line) continue;
        most = largest_of_block(most);
        if (threadIdx.x == 0) atomicMax(result, __float_as_int(most) & 0x7fffffff);
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io) table_row("tigon::amax<tigon::" #Io ">", amax<Io>)

KernelTable amax_kernels() {
    return {TIGON_ROW(f32), TIGON_ROW(bf16), TIGON_ROW(f16)};
}

#undef TIGON_ROW
#endif

}  // namespace tigon
