// Philox4x32-10: random bits as a pure function of key and counter, the same as
// python/reference/philox.py gives. Source: Salmon, Moraes, Dror, Shaw 2011.
#pragma once

#include "platform.cuh"

namespace tigon {

struct Words {
    unsigned w[4];
};

__device__ __forceinline__ Words philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3,
                                        uint64 key) {
    unsigned k0 = unsigned(key), k1 = unsigned(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64 even = uint64(0xD2511F53u) * c0, odd = uint64(0xCD9E8D57u) * c2;
        c0 = unsigned(odd >> 32) ^ c1 ^ k0;
        c1 = unsigned(odd);
        c2 = unsigned(even >> 32) ^ c3 ^ k1;
        c3 = unsigned(even);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Rounding a tensor: the bytes of the 16 elements from `element` on, low byte first. Element e
// takes byte e % 16 of counter (e / 16, stream); a run that begins between two counters needs both.
__device__ __forceinline__ Words rounding_bytes(uint64 seed, uint64 element, unsigned stream) {
    const uint64 at = element / 16;
    Words a = philox(unsigned(at), unsigned(at >> 32), stream, 0, seed);
    const int skip = element % 16;
    if (skip == 0) return a;
    const uint64 next = at + 1;
    const Words b = philox(unsigned(next), unsigned(next >> 32), stream, 0, seed);
    unsigned w[8] = {a.w[0], a.w[1], a.w[2], a.w[3], b.w[0], b.w[1], b.w[2], b.w[3]};
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = skip & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = skip & 4 ? w[i + 1] : w[i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a.w[i] = unsigned((uint64(w[i + 1]) << 32 | w[i]) >> (8 * (skip & 3)));
    return a;
}

}  // namespace tigon
