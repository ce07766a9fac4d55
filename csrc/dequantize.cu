// The values that quantized rows stand for: NVFP4, MXFP8, or FP8 under fp32 scales.
//
//   NVFP4   y = (e2m1(code) block_scale) tensor_scale      block_scale E4M3, for 16 elements
//   MXFP8   y = code 2^(block_scale - 127)                 for 32 elements
//   FP8     y = code scale                                 for a tensor, a row, 1x128, 128x128
//
// In fp32, then cast to the output's format. codes (m, k) or (m, kp/2), rows strided at will; block
// scales linear, rows strided at will, or "128x4"; y (m,k).
//
// A thread makes 8 elements of kRows rows; its loads of all rows are in flight together.
#include "common/minifloat.cuh"
#include "common/tile.cuh"

namespace tigon {

enum Scaling : int { kWhole = 0, kPerRow = 1, kBlocks1x128 = 2, kBlocks128 = 3, kExponents = 4 };

struct Dequantize {
    const void* codes;
    const void* scale;          // E4M3, E8M0 or fp32
    const float* tensor_scale;  // NVFP4: (), or with per_row (m)
    void* y;
    int64 codes_stride, scale_stride;
    int m, k, scaling, per_row;
    int swizzled, vectors, lanes;  // lanes: threads of a row, a power of two
    int unused;
};

constexpr int kPiece = 8;  // elements of a row that a thread makes
constexpr int kRows = 4;

struct Nvfp4 {  // beside E4M3 and E5M2: the format of the codes
    static constexpr int kMantissa = 1;
};

template <typename Codes>
constexpr bool kIsNvfp4 = false;
template <>
constexpr bool kIsNvfp4<Nvfp4> = true;

// The codes of a piece, 4 or 8 bytes; those past the end are zeros.
template <typename Codes>
__device__ __forceinline__ uint2 load_codes(const Dequantize& a, int row, int column) {
    const uint8* from = static_cast<const uint8*>(a.codes) + row * a.codes_stride;
    if constexpr (kIsNvfp4<Codes>) {
        return make_uint2(*reinterpret_cast<const unsigned*>(from + column / 2), 0);
    } else {
        from += column;
        if (a.vectors && column + kPiece <= a.k) return *reinterpret_cast<const uint2*>(from);
        unsigned words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < kPiece; ++i)
            if (column + i < a.k) words[i / 4] |= unsigned(from[i]) << (8 * (i % 4));
        return make_uint2(words[0], words[1]);
    }
}

template <typename Codes>
__device__ __forceinline__ float load_scale(const Dequantize& a, int row, int column) {
    const uint8* bytes = static_cast<const uint8*>(a.scale);
    const float* floats = static_cast<const float*>(a.scale);
    if (kIsNvfp4<Codes> || a.scaling == kExponents) {
        constexpr int kBlock = kIsNvfp4<Codes> ? 16 : 32;
        const int block = column / kBlock, blocks = (a.k + kBlock - 1) / kBlock;
        const unsigned code = bytes[a.swizzled ? scale_place(row, block, blocks, true)
                                               : row * a.scale_stride + block];
        return kIsNvfp4<Codes> ? decode_e4m3(code) : decode_e8m0(code);
    }
    if (a.scaling == kWhole) return floats[0];
    if (a.scaling == kPerRow) return floats[row * a.scale_stride];
    return floats[(a.scaling == kBlocks128 ? row / 128 : row) * a.scale_stride + column / 128];
}

template <typename Codes>
__device__ __forceinline__ float decode(uint2 codes, int i) {
    if (kIsNvfp4<Codes>) return decode_e2m1(codes.x >> (4 * i));
    const unsigned code = (i < 4 ? codes.x : codes.y) >> (8 * (i % 4)) & 255;
    return Codes::kMantissa == 3 ? decode_e4m3(code) : decode_e5m2(code);
}

template <typename Out, typename Codes>
__global__ void __launch_bounds__(kThreads, 4) dequantize(const Dequantize a) {
    const int across = (a.k + a.lanes * kPiece - 1) / (a.lanes * kPiece), rows = kThreads / a.lanes;
    const int row_block = blockIdx.x / across;
    const int column = (blockIdx.x % across * a.lanes + threadIdx.x % a.lanes) * kPiece;
    const int first = row_block * rows * kRows + threadIdx.x / a.lanes;
    if (column >= a.k) return;
    uint2 codes[kRows];
    float scale[kRows], outer[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = first + i * rows;
        if (row >= a.m) continue;
        codes[i] = load_codes<Codes>(a, row, column);
        scale[i] = load_scale<Codes>(a, row, column);
        if (kIsNvfp4<Codes>) outer[i] = a.tensor_scale[a.per_row ? row : 0];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = first + i * rows;
        if (row >= a.m) continue;
        float v[kPiece];
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
            v[j] = __fmul_rn(decode<Codes>(codes[i], j), scale[i]);
            if (kIsNvfp4<Codes>) v[j] = __fmul_rn(v[j], outer[i]);
        }
        Out* y = static_cast<Out*>(a.y) + int64(row) * a.k + column;
        if (a.vectors && column + kPiece <= a.k) {
#pragma unroll
            for (int j = 0; j < kPiece; j += kVector<Out>) {
                float part[kVector<Out>];
#pragma unroll
                for (int e = 0; e < kVector<Out>; ++e) part[e] = v[j + e];
                store_vector(y + j, part);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kPiece; ++j)
                if (column + j < a.k) y[j] = from_float<Out>(v[j]);
        }
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Out, Codes) \
    table_row("tigon::dequantize<tigon::" #Out ", tigon::" #Codes ">", dequantize<Out, Codes>)
#define TIGON_ROWS(Out) TIGON_ROW(Out, Nvfp4), TIGON_ROW(Out, E4M3), TIGON_ROW(Out, E5M2)

KernelTable dequantize_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
