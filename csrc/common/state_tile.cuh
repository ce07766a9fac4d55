// What a lane of a decode kernel holds of a recurrent state, and what shared memory looks like to
// it.
//
// A group of `lanes` lanes owns kRows neighbouring rows of p; a lane holds kElements elements of n
// of each in registers: 128 bytes of an fp32 state a thread in flight. Which lane adds which
// elements depends on n and the format alone, never on the batch, the number of tokens, alignment
// or strides, so a row's bits do not either.
#pragma once

#include "state_format.cuh"

namespace tigon {

constexpr int kElements = 16;  // of n, a lane
constexpr int kRows = 2;       // of p, a lane
constexpr int kThreads = 128;  // a block, at most

// Vectors of n elements lie in shared memory as fp32, padded to this; python/native counts the
// same.
__device__ __forceinline__ int padded(int n) {
    return (n + 15) / 16 * 16;
}

// Where element k of such a vector lies. A lane of a 16-bit state needs 8 neighbours, of an 8-bit
// one 16: two or four 16-byte reads. Each in a part of its own, so that 8 lanes read 128 bytes in a
// row, without conflicts.
template <int kWidth>
__device__ __forceinline__ int place(int k, int n_padded) {
    constexpr int kParts = kWidth / 4;
    return k / 4 % kParts * (n_padded / kParts) + k / kWidth * 4 + k % 4;
}

__device__ __forceinline__ void read4(const float* from, float (&to)[4]) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// kChunks runs of kWidth elements of each of kRows rows. With 16-byte accesses n is a multiple of
// kWidth, and a run is inside n whole or not at all.
template <typename State, bool kVectors>
struct Tile {
    static constexpr int kWidth = kVector<State>;
    static constexpr int kChunks = kElements / kWidth;

    float value[kRows][kChunks][kWidth];
    int column, column_step;  // the runs begin at column + chunk * column_step
    int rows, n;              // rows of this lane that are inside p; columns of the state

    __device__ Tile(int lane, int lanes, int rows, int n)
        : column(lane * kWidth), column_step(lanes * kWidth), rows(rows), n(n) {}

    // state and scale (if the format has one) point at the lane's first row.
    __device__ void load(const State* state, const float* scale) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int k = column + c * column_step;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) value[r][c][i] = 0.0f;
                if (r >= rows || k >= n) continue;
                if constexpr (kVectors) {
                    load_vector(state + r * n + k, value[r][c]);
                } else {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        if (k + i < n) value[r][c][i] = to_float(state[r * n + k + i]);
                }
            }
        }
        if constexpr (kScaled<State>) {
            float of_row[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) of_row[r] = r < rows ? scale[r] : 0.0f;
            unscale(of_row);
        }
    }

    // The values are numbers of the format: see round().
    __device__ void store(State* state) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int k = column + c * column_step;
                if (r >= rows || k >= n) continue;
                if constexpr (kVectors) {
                    store_vector(state + r * n + k, value[r][c]);
                } else {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        if (k + i < n) state[r * n + k + i] = from_float<State>(value[r][c][i]);
                }
            }
        }
    }

    // Calls body(r, value, b) for each element of each row; b: the vector's at this column.
    template <typename Body>
    __device__ __forceinline__ void each(const float* vector, int n_padded, Body body) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int k = column + c * column_step;
            if (k >= n) continue;
#pragma unroll
            for (int q = 0; q < kWidth; q += 4) {
                float b[4];
                read4(vector + place<kWidth>(k + q, n_padded), b);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (!kVectors && k + q + i >= n) continue;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) body(r, value[r][c][q + i], b[i]);
                }
            }
        }
    }

    // S = decay S + input B^T for one token, and this lane's part of S C.
    __device__ void step(const float* B, const float* C, int n_padded, float decay,
                         const float (&input)[kRows], float (&sum)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int k = column + c * column_step;
            if (k >= n) continue;
#pragma unroll
            for (int q = 0; q < kWidth; q += 4) {
                const int at = place<kWidth>(k + q, n_padded);
                float b[4], w[4];
                read4(B + at, b);
                read4(C + at, w);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (!kVectors && k + q + i >= n) continue;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        float& s = value[r][c][q + i];
                        s = decay * s + input[r] * b[i];
                        sum[r] += s * w[i];
                    }
                }
            }
        }
    }

    // S += input B^T, one rounding an element.
    __device__ void add(const float* B, int n_padded, const float (&input)[kRows]) {
        each(B, n_padded, [&](int r, float& s, float b) { s = __fmaf_rn(input[r], b, s); });
    }

    // This lane's part of S C.
    __device__ void dot(const float* C, int n_padded, float (&sum)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = 0.0f;
        each(C, n_padded, [&](int r, float& s, float c) { sum[r] = __fmaf_rn(s, c, sum[r]); });
    }

    __device__ void multiply(float factor) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < kWidth; ++i) value[r][c][i] = __fmul_rn(value[r][c][i], factor);
    }

    __device__ void unscale(const float (&scale)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int i = 0; i < kWidth; ++i)
                    value[r][c][i] = __fmul_rn(value[r][c][i], scale[r]);
    }

    // Values become numbers of the format, codes where it has a scale: unscale() gives what is
    // stored. element: of the lane's first row, column 0, in (h,p,n). All lanes of a warp take
    // part.
    __device__ void round(const Rounding& how, int64 element, int lanes, float (&scale)[kRows]) {
        if constexpr (kScaled<State>) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float most = 0.0f;
#pragma unroll
                for (int c = 0; c < kChunks; ++c)
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) most = max_nan(most, fabsf(value[r][c][i]));
                scale[r] = __fdiv_rn(max_lanes(most, lanes), kLargestCode<State>);
                const bool usable = scale[r] > 0.0f && scale[r] < INFINITY;
#pragma unroll
                for (int c = 0; c < kChunks; ++c)
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        value[r][c][i] = usable ? __fdiv_rn(value[r][c][i], scale[r]) : 0.0f;
            }
        }
        if constexpr (kRounded<State>) {
            if (!how.stochastic) {
#pragma unroll
                for (int r = 0; r < kRows; ++r)
#pragma unroll
                    for (int c = 0; c < kChunks; ++c)
#pragma unroll
                        for (int i = 0; i < kWidth; ++i)
                            value[r][c][i] = nearest<State>(value[r][c][i]);
                return;
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
#pragma unroll
                    for (int q = 0; q < kWidth; q += 8) {
                        const int k = column + c * column_step + q;
                        const Words words = how.bits(element + int64(r) * n + k, kVectors);
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            float& s = value[r][c][q + i];
                            s = stochastic<State>(s, words.w[i / 2] >> (16 * (i % 2)) & 0xffff);
                        }
                    }
                }
            }
        }
    }
};

}  // namespace tigon
