// FP8: E4M3 or E5M2 codes with fp32 scales for a tensor, a row, 1x128 or 128x128 elements, or, as
// MXFP8, with a power of two for 32 elements along the contraction.
//
//   fp32 scales   enc = max / b, code = fp8(y enc), scale = 1 / enc      b the amax of the granule
//   MXFP8         scale = e8m0(b / max), rounded up, code = fp8(y / scale)
//
// y is what common/source.cuh says; max is 448 or 57344; fp8 saturates and keeps NaNs. Every step
// is one fp32 rounding in the order of python/reference/quantize.py: the bytes are equal, but for
// the signs of NaNs. codes (m,k), "_t": of the transpose, (k,m). The amax of a tensor or row is
// given; the others are found on the way: the lanes of a line share 1x128, two lanes 32, a block
// 128x128.
#include "common/minifloat.cuh"
#include "common/tile.cuh"

namespace tigon {

// Codes of python/native/quantize.py.
enum Granularity : int { kTensor = 0, kLine = 1, kLine128 = 2, kSquare128 = 3, kMx = 4 };

struct QuantizeFp8 {
    Source source;
    void* codes;
    void* scale;  // fp32, or E8M0 bytes
    void* codes_t;
    void* scale_t;
    const float* amax;    // (), or of the lines of the row-wise copy
    const float* amax_t;  // (), or of the lines of the column-wise copy
    int make_row, make_column, granularity, power_of_two;
    int swizzled, vectors, vectors_t;  // vectors: lines of codes begin on 16 bytes
    int unused;
};

// What y is multiplied by.
template <typename F>
__device__ __forceinline__ float encode_factor(float amax, bool power_of_two) {
    float factor = __fdiv_rn(F::kMax, amax);
    if (!(amax > 0.0f && amax <= kLargestFloat)) factor = 1.0f;
    factor = fminf(factor, kLargestFloat);
    if (power_of_two) factor = __uint_as_float(__float_as_uint(factor) & 0x7f800000u);
    return factor;
}

// 16 codes at `to`, `count` of them inside the line.
template <typename F>
__device__ __forceinline__ void store_codes(const float (&v)[kRun], uint8* to, int count,
                                            bool vectors) {
    const uint4 codes = make_uint4(encode_fp8<F>(v), encode_fp8<F>(v + 4), encode_fp8<F>(v + 8),
                                   encode_fp8<F>(v + 12));
    if (vectors) {  // then runs are whole
        *reinterpret_cast<uint4*>(to) = codes;
        return;
    }
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < kRun; ++i)
        if (i < count) to[i] = uint8(words[i / 4] >> (8 * (i % 4)));
}

// One copy. All lanes of a warp take part in the maxima, so lines outside of the matrix are worked
// on and not stored.
template <typename Io, typename F>
__device__ __forceinline__ void encode(const QuantizeFp8& a, const Side& side, float factor,
                                       int filled, int last_line) {
    const int run = threadIdx.x % kRuns, first = threadIdx.x / kRuns;
    const int along = side.first + run * kRun, count = side.length - along;
    const int granule = side.first / kTile, granules = side.blocks(kTile);
    ScaleWriter exponents(side.column ? a.scale_t : a.scale, side.first_line + first, side.lines,
                          along / 32, side.blocks(32), a.swizzled);
    uint8* codes = static_cast<uint8*>(side.column ? a.codes_t : a.codes);
    float* scales = static_cast<float*>(side.column ? a.scale_t : a.scale);
    const float* amax = side.column ? a.amax_t : a.amax;
    if (run % 2 != 0 || a.granularity != kMx) exponents.end = 0;  // one of two lanes writes
#pragma unroll 1
    for (int at = first; at < last_line; at += kLines) {
        const int line = side.first_line + at;
        const bool inside = line < side.lines;
        float v[kRun] = {};
        if (at < filled) gather<Io>(side.column, at, run, v);
        if (a.granularity == kMx) {
            const float b = max_lanes(largest(v), 2);
            const unsigned exponent = encode_e8m0(__fmul_rn(b, 1.0f / F::kMax));
            factor = decode_e8m0(exponent == 255 ? 255 : exponent == 254 ? 0 : 254 - exponent);
            exponents.write(line, exponent);
        } else if (a.granularity == kLine128) {
            factor = encode_factor<F>(max_lanes(largest(v), kRuns), a.power_of_two);
            if (run == 0 && inside && count > 0)
                scales[int64(line) * granules + granule] = __frcp_rn(factor);
        } else if (a.granularity == kLine) {
            factor = encode_factor<F>(inside ? amax[line] : 0.0f, a.power_of_two);
            if (run == 0 && inside && granule == 0) scales[line] = __frcp_rn(factor);
        }
        if (!inside || count <= 0) continue;
#pragma unroll
        for (int i = 0; i < kRun; ++i) v[i] = __fmul_rn(v[i], factor);
        store_codes<F>(v, codes + int64(line) * side.length + along, count,
                       side.column ? a.vectors_t : a.vectors);
    }
}

template <typename Io>
__device__ float amax_of_tile(int filled) {
    float most = 0.0f;
#pragma unroll 1
    for (int line = threadIdx.x / kRuns; line < filled; line += kLines) {
        float v[kRun];
        gather<Io>(false, line, threadIdx.x % kRuns, v);
        most = max_nan(most, largest(v));
    }
    return largest_of_block(most);
}

template <typename Io, typename F>
__global__ void __launch_bounds__(kThreads, sizeof(Io) == 4 ? 3 : 4)
    quantize_fp8(const QuantizeFp8 a) {
    const int across = max(1, (a.source.k + kTile - 1) / kTile);
    const int first_row = blockIdx.x / across * kTile, first_column = blockIdx.x % across * kTile;
    const int filled = filled_rows(a.source, first_row, a.make_column);
    load_tile<Io>(a.source, first_row, first_column, filled, nullptr);
    __syncthreads();
    const bool square = a.granularity == kSquare128, tensor = a.granularity == kTensor;
    float amax = square ? amax_of_tile<Io>(filled) : 0.0f;
#pragma unroll 1
    for (int column = 0; column < 2; ++column) {
        if (!(column ? a.make_column : a.make_row)) continue;
        const Side side(a.source, first_row, first_column, column);
        if (tensor) amax = *(column ? a.amax_t : a.amax);
        const float factor = encode_factor<F>(amax, a.power_of_two);
        const bool real = side.first_line < side.lines && side.first < side.length;
        if (threadIdx.x == 0 && (tensor ? blockIdx.x == 0 : square && real)) {
            float* scales = static_cast<float*>(column ? a.scale_t : a.scale);
            const int64 first = int64(side.first_line / kTile) * side.blocks(kTile);
            scales[square ? first + side.first / kTile : 0] = __frcp_rn(factor);
        }
        encode<Io, F>(a, side, factor, filled, a.swizzled || column ? kTile : filled);
    }
}

#ifndef __CUDACC_RTC__
#define TIGON_ROW(Io, F) \
    table_row("tigon::quantize_fp8<tigon::" #Io ", tigon::" #F ">", quantize_fp8<Io, F>)
#define TIGON_ROWS(Io) TIGON_ROW(Io, E4M3), TIGON_ROW(Io, E5M2)

KernelTable quantize_fp8_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16)};
}

#undef TIGON_ROWS
#undef TIGON_ROW
#endif

}  // namespace tigon
