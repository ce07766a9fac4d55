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
constexpr int kRuns = kTile / kRun;         // of a line
constexpr int kLines = kThreads / kRuns;    // at work at a time
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
    constexpr int kStep = kVector<Io>, kChunks = kTile / kStep, kBatch = 4;
    TileMemory& memory = tile_memory();
    Io* tile = tile_data<Io>();
    const bool gated = a.prologue >= kGateFirst;
    if (signs && threadIdx.x < kRun) memory.signs[threadIdx.x] = signs[threadIdx.x];
    if (a.prologue >= kNorm) {
        const int column = first_column + threadIdx.x;
        if (threadIdx.x < kTile)
            memory.weight[threadIdx.x] =
                column < a.k ? load_as(a.weight, column, a.weight_dtype) : 0.0f;
        __syncthreads();
    }
    const Io* x = static_cast<const Io*>(a.x) + first_row * a.x_stride + first_column;
    const Io* z =
        gated ? static_cast<const Io*>(a.z) + first_row * a.z_stride + first_column : nullptr;
    const int rows = a.m - first_row, columns = a.k - first_column;
    const bool vectors = a.vectors && columns >= kTile;  // whole 16 bytes everywhere
    // Loads of a batch are in flight together.
#pragma unroll 1
    for (int first = threadIdx.x; first < filled * kChunks; first += kBatch * kThreads) {
        uint4 x_bits[kBatch], z_bits[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = first + i * kThreads, row = at / kChunks, column = at % kChunks * kStep;
            x_bits[i] = z_bits[i] = make_uint4(0, 0, 0, 0);
            if (row >= filled || row >= rows) continue;
            if (vectors) {
                x_bits[i] = *reinterpret_cast<const uint4*>(x + row * a.x_stride + column);
                if (gated)
                    z_bits[i] = *reinterpret_cast<const uint4*>(z + row * a.z_stride + column);
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = first + i * kThreads, row = at / kChunks, chunk = at % kChunks;
            if (row >= filled) continue;
            const int column = chunk * kStep, count = columns - column;
            if (!vectors && row < rows && count > 0) {
                x_bits[i] = fetch(x + row * a.x_stride + column, count, a.vectors);
                if (gated) z_bits[i] = fetch(z + row * a.z_stride + column, count, a.vectors);
            }
            if (a.prologue != kPlain && row < rows && count > 0)
                x_bits[i] =
                    apply_prologue<Io>(a, x_bits[i], z_bits[i], first_row + int64(row),
                                       first_column + column, count, memory.weight + column);
            *reinterpret_cast<uint4*>(tile + place<Io>(row, chunk)) = x_bits[i];
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

__device__ __forceinline__ float largest(const float (&v)[kRun]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kRun; ++i) most = max_nan(most, fabsf(v[i]));
    return most;
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

// Whether (line, block) exists, or is padding of the swizzled layout, which is zero.
__device__ __forceinline__ bool has_scale(int line, int lines, int block, int blocks,
                                          bool swizzled) {
    if (!swizzled) return line < lines && block < blocks;
    return line < (lines + 127) / 128 * 128 && block < (blocks + 3) / 4 * 4;
}

}  // namespace tigon
