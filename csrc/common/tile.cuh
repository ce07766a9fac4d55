// The 128x128 tile of a matrix that a block of a quantizer works on, in shared memory.
//
// The input is read once, 16 bytes a lane, and both copies are made from the tile: the row-wise one
// of its rows, the column-wise one of its columns. A side is one of the two. Its unit of work is a
// run, 16 neighbours along the contraction; 8 neighbouring lanes own the 8 runs of a line (a row or
// a column of the tile), so that the codes of a line leave as 64 or 128 bytes in a row on either
// side.
//
// The 16-byte chunks of a tile row are permuted by the row's run (xor), which keeps the 8 lanes of
// a column in different banks.
#pragma once

#include "math.cuh"
#include "source.cuh"

namespace tigon {

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kRun = 16;
constexpr int kRuns = kTile / kRun;       // of a line
constexpr int kLines = kThreads / kRuns;  // at work at a time
static_assert(kLines == 32, "the 128x4 layout puts every 32nd line side by side");
constexpr int kTileBlocks = kRuns * kRuns;  // of 16x16

// One of the two copies, as this block sees it. Its lines are rows of x, or columns.
struct Side {
    bool column;
    int first_line, lines;  // of this tile; of the matrix
    int first, length;      // along the contraction, likewise

    __device__ Side(const Source& a, int first_row, int first_column, bool column)
        : column(column),
          first_line(column ? first_column : first_row),
          lines(column ? a.k : a.m),
          first(column ? first_row : first_column),
          length(column ? a.m : a.k) {}
    __device__ int blocks(int size) const { return (length + size - 1) / size; }
};

// Shared memory, in this order; python/native/quantize.py counts the same.
struct TileMemory {
    float weight[kTile];
    float signs[kRun];
    float warps[kThreads / 32];
    uint8 scale[kTileBlocks], other_scale[kTileBlocks];
};

__device__ __forceinline__ TileMemory& tile_memory() {
    return *reinterpret_cast<TileMemory*>(shared_memory());
}
template <typename Io>
__device__ __forceinline__ Io* tile_data() {
    return reinterpret_cast<Io*>(&tile_memory() + 1);
}
// What comes after the tile, 16 KB at most.
template <typename Io>
__device__ __forceinline__ void* tile_scratch() {
    return tile_data<Io>() + kTile * kTile;
}

// Where the chunk of a row lies.
template <typename Io>
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kTile + (chunk ^ (row / kRun)) * kVector<Io>;
}

// Rows of the tile that are filled: whole groups of kLines, or all of them for columns.
__device__ __forceinline__ int filled_rows(const Source& a, int first_row, bool columns) {
    return columns ? kTile : min(kTile, (a.m - first_row + kLines - 1) / kLines * kLines);
}

// Reads the tile, applies the prologue, and fills `filled` rows of the tile; zeros outside of x.
// signs (may be null) go along. A barrier must follow.
template <typename Io>
__device__ void load_tile(const Source& a, int first_row, int first_column, int filled,
                          const float* signs) {
    constexpr int kStep = kVector<Io>, kChunks = kTile / kStep;
    TileMemory& memory = tile_memory();
    if (signs && threadIdx.x < kRun) memory.signs[threadIdx.x] = signs[threadIdx.x];
    if (a.prologue >= kNorm) {
        const int column = first_column + threadIdx.x;
        if (threadIdx.x < kTile)
            memory.weight[threadIdx.x] =
                column < a.k ? load_as(a.weight, column, a.weight_dtype) : 0.0f;
        __syncthreads();
    }
    // A thread keeps its chunk of the row, and steps over rows.
    const int chunk = threadIdx.x % kChunks, column = first_column + chunk * kStep;
    const int rows = a.m - first_row, count = a.k - column;
    const bool gated = a.prologue >= kGateFirst;
    Io* tile = tile_data<Io>();
    const auto begin = [&](const void* matrix, int64 stride, bool real) {
        return real ? static_cast<const Io*>(matrix) + first_row * stride + column : nullptr;
    };
    const Io* x = begin(a.x, a.x_stride, count > 0);
    const Io* z = begin(a.z, a.z_stride, count > 0 && gated);
    const auto load = [&](const Io* from, int64 stride, int row) {
        if (row >= rows || count <= 0) return make_uint4(0, 0, 0, 0);
        return fetch(from + row * stride, count, a.vectors);
    };
    const auto store = [&](int row, uint4 bits) {
        if (row < filled) *reinterpret_cast<uint4*>(tile + place<Io>(row, chunk)) = bits;
    };
    constexpr int kStepRows = kThreads / kChunks, kBatch = 4;
    int row = threadIdx.x / kChunks;
    if (a.prologue == kPlain && a.vectors && count >= kStep) {
#pragma unroll 1
        for (; row < filled; row += kBatch * kStepRows) {
            uint4 bits[kBatch];  // in flight together
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                bits[i] = make_uint4(0, 0, 0, 0);
                const int at = row + i * kStepRows;
                if (at < rows) bits[i] = *reinterpret_cast<const uint4*>(x + at * a.x_stride);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) store(row + i * kStepRows, bits[i]);
        }
        return;
    }
#pragma unroll 1
    for (; row < filled; row += 2 * kStepRows) {
        uint4 bits[2] = {load(x, a.x_stride, row), load(x, a.x_stride, row + kStepRows)};
        uint4 gates[2];
        if (gated) {
            gates[0] = load(z, a.z_stride, row);
            gates[1] = load(z, a.z_stride, row + kStepRows);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = row + i * kStepRows;
            if (a.prologue != kPlain && at < rows && count > 0)
                bits[i] = apply_prologue<Io>(a, bits[i], gates[i], first_row + at, column, count,
                                             memory.weight + chunk * kStep);
            store(at, bits[i]);
        }
    }
}

// A run of the tile as fp32.
template <typename Io>
__device__ __forceinline__ void gather(bool column, int line, int run, float (&v)[kRun]) {
    constexpr int kStep = kVector<Io>;
    const Io* tile = tile_data<Io>();
    if (column) {
        const Io* from = tile + place<Io>(run * kRun, line / kStep) + line % kStep;
#pragma unroll
        for (int i = 0; i < kRun; ++i) v[i] = to_float(from[i * kTile]);
    } else {
#pragma unroll
        for (int c = 0; c < kRun / kStep; ++c) {
            float part[kStep];
            load_vector(tile + place<Io>(line, run * (kRun / kStep) + c), part);
#pragma unroll
            for (int i = 0; i < kStep; ++i) v[c * kStep + i] = part[i];
        }
    }
}

// v times diag(signs) H16 / 4, H16 Sylvester's.
__device__ __forceinline__ void hadamard_16(float (&v)[kRun], const float* signs) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = __fmul_rn(v[i], signs[i]);
#pragma unroll
    for (int step = 1; step < kRun; step *= 2) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (i & step) continue;
            const float a = v[i], b = v[i + step];
            v[i] = __fadd_rn(a, b);
            v[i + step] = __fsub_rn(a, b);
        }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[i] = __fmul_rn(v[i], 0.25f);
}

// max |v| as a tree: a chain would wait for each step.
__device__ __forceinline__ float largest(const float (&v)[kRun]) {
    float most[kRun / 2];
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) most[i] = max_nan(fabsf(v[i]), fabsf(v[i + kRun / 2]));
#pragma unroll
    for (int step = kRun / 4; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < step; ++i) most[i] = max_nan(most[i], most[i + step]);
    return most[0];
}

// The largest value of the block, in all threads. Contains two barriers.
__device__ __forceinline__ float largest_of_block(float value) {
    TileMemory& memory = tile_memory();
    value = max_lanes(value, 32);
    if (threadIdx.x % 32 == 0) memory.warps[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) value = max_nan(value, memory.warps[i]);
    __syncthreads();
    return value;
}

// Where the scale of (line, block) lies: linear, or the "128x4" layout of tensor cores: tiles of
// 128 lines by 4 blocks, 512 bytes each, line l of a tile at (l % 32) 16 + (l / 32) 4.
__device__ __forceinline__ int64 scale_place(int line, int block, int blocks, bool swizzled) {
    if (!swizzled) return int64(line) * blocks + block;
    const int64 tile = int64(line / 128) * ((blocks + 3) / 4) + block / 4;
    return tile * 512 + line % 32 * 16 + line % 128 / 32 * 4 + block % 4;
}

// The scales that a thread writes: of one block of every kLines-th line of the tile. Padding of the
// swizzled layout is written too; a block of nothing has scale 0.
struct ScaleWriter {
    uint8* at;
    int64 step;
    int end;   // of the lines that have a place
    int real;  // of the lines that have a scale

    __device__ ScaleWriter(void* scales, int line, int lines, int block, int blocks, bool swizzled)
        : at(static_cast<uint8*>(scales) + scale_place(line, block, blocks, swizzled)),
          step(swizzled ? 4 : int64(kLines) * blocks),
          end(swizzled ? (lines + 127) / 128 * 128 : lines),
          real(block < blocks ? lines : 0) {
        if (block >= (swizzled ? (blocks + 3) / 4 * 4 : blocks)) end = 0;
    }
    // Of the next line in turn; 32 lines on is one word on in the swizzled layout.
    __device__ void write(int line, unsigned scale) {
        if (line < end) *at = scale;
        at += step;
    }
};

}  // namespace tigon
