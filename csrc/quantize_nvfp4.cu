// NVFP4: E2M1 codes in blocks of 16 along the contraction, E4M3 block scales, an fp32 tensor scale.
//
//   s_enc = most / g                 g the amax of the tensor (or row), most = 2688 = 6 * 448
//   s     = e4m3(b s_enc / 6)        b the amax of the block
//   code  = e2m1(y / (s / s_enc))    y what common/source.cuh says, or 16 of it times diag(signs)
//   H16/4 tensor scale = g / most
//
// Every step is one fp32 rounding in the order of python/reference/quantize.py: the bytes are
// equal. codes (m, kp/2), element 2i in the low nibble, scale (m, kp/16) or "128x4"; "_t": of the
// transpose. kp is k rounded up to 16; elements past k are zeros before all else, and padding of
// scales is zero.
//
// Rounding is nearest even, or stochastic: 8 random bits an element, drawn by its index in (m,k).
// Blocks may be 16x16: then both copies have the same scales. Four-over-six takes, for each block,
// that of the scales for 6 and for 4 with the smaller error.
//
// Which block holds an element depends on nothing but its place, so neither do the bytes.
#include "common/minifloat.cuh"
#include "common/philox.cuh"
#include "common/tile.cuh"

namespace tigon {

struct QuantizeNvfp4 {
    Source source;
    void* codes;
    void* scale;
    float* tensor_scale;
    void* codes_t;
    void* scale_t;
    float* tensor_scale_t;
    const float* amax;    // of the row-wise copy: () or, with per_row, (m)
    const float* amax_t;  // of the column-wise copy
    const float* hadamard;
    const int64* seed;
    int64 offset;
    float most, sixth;  // what amax and a block's amax are mapped to: 2688 and 1/6
    int make_row, make_column, per_row, square;
    int hadamard_row, hadamard_column, squared_error, swizzled;
};

enum Rounding : int { kNearest = 0, kStochastic = 1, kFourOverSix = 2 };

// The encode scale of a tensor or row, and what follows from it.
struct Level {
    float inverse, sixth;

    __device__ Level(const QuantizeNvfp4& a, float amax) {
        float encode = __fdiv_rn(a.most, amax);
        if (encode > kLargestFloat) encode = kLargestFloat;
        if (amax == 0.0f || encode == 0.0f) encode = 1.0f;
        inverse = __frcp_rn(encode);
        sixth = __fmul_rn(encode, a.sixth);
    }
    // Of a block with this scale; 448 at most, so it is never 0.
    __device__ float multiplier(unsigned scale) const {
        return fminf(__frcp_rn(__fmul_rn(decode_e4m3(scale), inverse)), kLargestFloat);
    }
};

__device__ __forceinline__ float tensor_scale(float amax, float most) {
    const float scale = __fdiv_rn(amax, most);
    if (amax == 0.0f) return 1.0f;
    return scale < 1.0f / kLargestFloat ? 1.0f / kLargestFloat : scale;
}

// What the block loses with this scale, over 16 neighbours one by one.
__device__ __forceinline__ float error_with(const float (&y)[kRun], unsigned scale,
                                            const Level& level, bool squared) {
    const float multiplier = level.multiplier(scale), s = decode_e4m3(scale);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        const float a = fminf(fabsf(__fmul_rn(y[i], multiplier)), E2M1::kMax);
        const float back = __fmul_rn(__fmul_rn(nearest_value<E2M1>(a), s), level.inverse);
        const float d = __fsub_rn(fabsf(y[i]), back);
        sum = __fadd_rn(sum, squared ? __fmul_rn(d, d) : fabsf(d));
    }
    return sum;
}

__device__ __forceinline__ unsigned scale_of(float amax, const Level& level) {
    return encode_scale(__fmul_rn(amax, level.sixth));
}
__device__ __forceinline__ unsigned scale_for_four(float amax, const Level& level) {
    return encode_scale(__fmul_rn(__fmul_rn(amax, level.sixth), 1.5f));
}

// The 16x16 blocks of a tile. Values of runs (128 rows, 8 runs) lie in scratch, and the first 64
// threads own a block each.
struct Blocks {
    int block, run;  // 8 (row / 16) + run
    bool owner;
    float* of_runs;

    __device__ Blocks(void* scratch, int filled)
        : block(threadIdx.x),
          run(threadIdx.x % kRuns),
          owner(block < kTileBlocks && block / kRuns * kRun < filled),
          of_runs(static_cast<float*>(scratch)) {}
    // The value of a block's row; `four`: of the second table.
    __device__ float value(int row, bool four) const {
        return of_runs[((four ? kTile : 0) + block / kRuns * kRun + row) * kRuns + run];
    }
    __device__ float sum(bool four) const {
        float tree[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) tree[i] = value(i, four);
#pragma unroll
        for (int step = 1; step < kRun; step *= 2)
#pragma unroll
            for (int i = 0; i < kRun; i += 2 * step) tree[i] = __fadd_rn(tree[i], tree[i + step]);
        return tree[0];
    }
};

// Where the scale for 4 loses less, it becomes the block's.
template <typename Io>
__device__ void choose_scales(const QuantizeNvfp4& a, const Level& level, int filled,
                              const Blocks& blocks) {
    TileMemory& memory = tile_memory();
#pragma unroll 1
    for (int line = threadIdx.x / kRuns; line < filled; line += kLines) {
        float v[kRun];
        gather<Io>(false, line, blocks.run, v);
        const int block = line / kRun * kRuns + blocks.run, at = line * kRuns + blocks.run;
        blocks.of_runs[at] = error_with(v, memory.scale[block], level, a.squared_error);
        blocks.of_runs[kTile * kRuns + at] =
            error_with(v, memory.other_scale[block], level, a.squared_error);
    }
    __syncthreads();
    if (blocks.owner && blocks.sum(true) < blocks.sum(false))
        memory.scale[blocks.block] = memory.other_scale[blocks.block];
    __syncthreads();
}

// Scales of the tile's 16x16 blocks, into the table: first each run's amax, then each block's.
template <typename Io, int kRounding>
__device__ void square_scales(const QuantizeNvfp4& a, const Level& level, int filled) {
    TileMemory& memory = tile_memory();
    const Blocks blocks(tile_scratch<Io>(), filled);
#pragma unroll 1
    for (int line = threadIdx.x / kRuns; line < filled; line += kLines) {
        float v[kRun];
        gather<Io>(false, line, blocks.run, v);
        blocks.of_runs[line * kRuns + blocks.run] = largest(v);
    }
    __syncthreads();
    if (blocks.owner) {
        float most = 0.0f;
        for (int i = 0; i < kRun; ++i) most = max_nan(most, blocks.value(i, false));
        memory.scale[blocks.block] = scale_of(most, level);
        memory.other_scale[blocks.block] = scale_for_four(most, level);
    }
    __syncthreads();
    if constexpr (kRounding == kFourOverSix) choose_scales<Io>(a, level, filled, blocks);
}

// Random bytes of the column-wise copy: 16 neighbours of a row share a counter, so they are drawn
// by rows, once, and read by columns. Permuted as the tile is.
__device__ __forceinline__ int random_place(int row, int run) {
    return row * kTile + (run ^ (row / kRun)) * kRun;
}
__device__ void random_tile(const QuantizeNvfp4& a, int first_row, int first_column,
                            uint8* random) {
    const int run = threadIdx.x % kRuns;
#pragma unroll 1
    for (int row = threadIdx.x / kRuns; row < kTile; row += kLines) {
        Words bytes = {{0, 0, 0, 0}};
        if (first_row + row < a.source.m) {
            const int64 element = int64(first_row + row) * a.source.k + first_column + run * kRun;
            bytes = rounding_bytes(*a.seed, element + a.offset, 1);
        }
        *reinterpret_cast<uint4*>(random + random_place(row, run)) =
            make_uint4(bytes.w[0], bytes.w[1], bytes.w[2], bytes.w[3]);
    }
    __syncthreads();
}

// Of a run: those of its row, or the tile's; zeros past the end.
__device__ __forceinline__ Words random_of_run(const QuantizeNvfp4& a, const Side& side, int line,
                                               int run, const uint8* random) {
    Words bytes = {{0, 0, 0, 0}};
    if (side.column) {
        const uint8* from = random + random_place(run * kRun, line / kRun) + line % kRun;
#pragma unroll
        for (int i = 0; i < kRun; ++i) bytes.w[i / 4] |= unsigned(from[i * kTile]) << (8 * (i % 4));
        return bytes;
    }
    const int at = side.first + run * kRun;
    bytes = rounding_bytes(*a.seed, int64(side.first_line + line) * a.source.k + at + a.offset, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int left = side.length - at - 4 * i;
        if (left < 4) bytes.w[i] &= left > 0 ? (1u << (8 * left)) - 1 : 0;
    }
    return bytes;
}

// One copy: a thread rounds a run at a time.
template <typename Io, int kRounding>
__device__ __forceinline__ void encode(const QuantizeNvfp4& a, const Side& side, Level level,
                                       int last_line) {
    TileMemory& memory = tile_memory();
    const uint8* random = static_cast<const uint8*>(tile_scratch<Io>());
    const bool rotate = side.column ? a.hadamard_column : a.hadamard_row;
    const int run = threadIdx.x % kRuns, block = side.first / kRun + run;
    const int blocks = side.blocks(kRun), first = threadIdx.x / kRuns;
    ScaleWriter scales(side.column ? a.scale_t : a.scale, side.first_line + first, side.lines,
                       block, blocks, a.swizzled);
    uint2* codes = static_cast<uint2*>(side.column ? a.codes_t : a.codes) +
                   int64(side.first_line + first) * blocks + block;
#pragma unroll 1
    for (int at = first; at < last_line; at += kLines) {
        const int line = side.first_line + at;
        unsigned scale = 0;
        if (line < scales.real) {
            if (a.per_row) level = Level(a, a.amax[line]);
            float v[kRun];
            gather<Io>(side.column, at, run, v);
            if (rotate) hadamard_16(v, memory.signs);
            if (a.square) {
                scale =
                    memory.scale[side.column ? run * kRuns + at / kRun : at / kRun * kRuns + run];
            } else {
                const float most = largest(v);
                scale = scale_of(most, level);
                if (kRounding == kFourOverSix) {
                    const unsigned four = scale_for_four(most, level);
                    const float error = error_with(v, scale, level, a.squared_error);
                    if (error_with(v, four, level, a.squared_error) < error) scale = four;
                }
            }
            const float multiplier = level.multiplier(scale);
#pragma unroll
            for (int i = 0; i < kRun; ++i) v[i] = __fmul_rn(v[i], multiplier);
            uint2 pair;
            if constexpr (kRounding == kStochastic) {
                const Words bytes = random_of_run(a, side, at, run, random);
                pair = make_uint2(stochastic_e2m1(v, bytes.w), stochastic_e2m1(v + 8, bytes.w + 2));
            } else {
                pair = make_uint2(nearest_e2m1(v), nearest_e2m1(v + 8));
            }
            if (scale == 0x7f) pair = make_uint2(0x77777777u, 0x77777777u);
            *codes = pair;
        }
        scales.write(line, scale);
        codes += int64(kLines) * blocks;
    }
}

template <typename Io, int kRounding>
__global__ void __launch_bounds__(kThreads, kRounding == kNearest ? 4 : 3)
    quantize_nvfp4(const QuantizeNvfp4 a) {
    const int across = max(1, (a.source.k + kTile - 1) / kTile);
    const int first_row = blockIdx.x / across * kTile, first_column = blockIdx.x % across * kTile;
    const int filled = filled_rows(a.source, first_row, a.make_column);
    if (a.per_row) {
        const int row = first_row + threadIdx.x;
        if (first_column == 0 && threadIdx.x < kTile && row < a.source.m)
            a.tensor_scale[row] = tensor_scale(a.amax[row], a.most);
    } else if (blockIdx.x == 0 && threadIdx.x == 0) {
        if (a.make_row) *a.tensor_scale = tensor_scale(*a.amax, a.most);
        if (a.make_column) *a.tensor_scale_t = tensor_scale(*a.amax_t, a.most);
    }
    load_tile<Io>(a.source, first_row, first_column, filled, a.hadamard);
    __syncthreads();
    // The two sides share the amax of square blocks, which are never rotated.
    if (a.square)
        square_scales<Io, kRounding>(a, Level(a, a.make_row ? *a.amax : *a.amax_t), filled);
    if (kRounding == kStochastic && a.make_column)
        random_tile(a, first_row, first_column, static_cast<uint8*>(tile_scratch<Io>()));
#pragma unroll 1
    for (int column = 0; column < 2; ++column) {
        if (!(column ? a.make_column : a.make_row)) continue;
        const Side side(a.source, first_row, first_column, column);
        const Level level(a, a.per_row ? 1.0f : *(column ? a.amax_t : a.amax));
        encode<Io, kRounding>(a, side, level, a.swizzled || column ? kTile : filled);
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io, Rounding) \
    table_row("tigon::quantize_nvfp4<tigon::" #Io ", " #Rounding ">", quantize_nvfp4<Io, Rounding>)
#define TIGON_ROWS(Io) TIGON_ROW(Io, 0), TIGON_ROW(Io, 1), TIGON_ROW(Io, 2)

KernelTable quantize_nvfp4_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
