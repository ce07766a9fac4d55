// Draws, and drafts against the target's logits; tigon/reference/sampling.py has the laws.
//
// A race draws a token: the largest log w(x) - log E(x), E = -log1p(-v), v uniform by seed,
// position, purpose and x. A thread passes over an entry whose v alone shows that it cannot lead (v
// <= E), so that a logarithm is computed for few; four entries share a Philox block, which is not
// computed at all where even the least E would not do.
//
// draw_tokens has a block a chunk of a slot. Under `strict` and `greedy` all positions up to the
// number of drafts are drawn. Under `token` and `block` the blocks of slot 0 first judge the row,
// each for itself, from the chunks' peaks: which draft is the first to be rejected. Then only that
// position is read again: the target's and the draft's logits of one position in K + 1. `block`
// needs the masses sum max(P p - q, 0) of all positions before, by block_masses: everything a
// second time. emit_tokens joins the chunks' winners, a warp a slot.
//
// Launches: strict, greedy: draw, emit. token: peaks, draw, emit. block: peaks, masses, draw, emit.
// One more where rows are cut to top-k or top-p. Bytes at b 32, K 5, V 131,072 in bf16: `token` 92
// MB with the drafts' logits and 50 MB without, and 8 to 17 MB again; `block` 92 + 67 to 75 MB.
#include "common/logits.cuh"

namespace tigon {

// A row's drafts and what both sides think of them, in shared memory.
struct Case {
    Softmax p[kMaxSlots], q[kMaxSlots];
    float p_draft[kMaxSlots], q_draft[kMaxSlots];  // log2 of the probabilities
    float scale[kMaxSlots];                        // P of `block` after so many drafts
    float mass[kMaxSlots];                         // of the position after them
    int drafts;
    Verdict verdict;
};
static_assert(sizeof(Case) <= 2560, "shared memory of draw_tokens; python/native/sampling.py");

// The normalizers of the row's positions and the drafts' probabilities; for all threads afterwards.
template <typename Io>
__device__ __forceinline__ void open_case(Case& c, const Sampling& a, int row) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = lane_of_warp();
    const int n = drafts_of(a, row);
    for (int i = warp; i <= n; i += warps) {
        const Softmax s = softmax_of(a, row, target_line(a, row, i));
        if (lane == 0) c.p[i] = s;
    }
    for (int i = warp; i < n; i += warps) {
        Softmax s{0.0f, 0.0f, 0.0f, 0, 0, false, false};
        if (a.draft) s = softmax_of(a, row, draft_line(a, row, i));
        if (lane == 0) c.q[i] = s;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const int d = a.tokens[row * a.tokens_row + i];
        c.p_draft[i] = c.p[i].log2_of(to_float(target_logits<Io>(a, row, i)[d]) + 0.0f, d);
        c.q_draft[i] = 0.0f;
        if (a.draft)
            c.q_draft[i] = c.q[i].log2_of(to_float(draft_logits<Io>(a, row, i)[d]) + 0.0f, d);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        c.drafts = n;
        float scale = c.scale[0] = 0.0f;
        for (int i = 0; i < n; ++i) {
            const float p = c.p_draft[i], q = c.q_draft[i];
            scale = scale > -INFINITY && p > -INFINITY ? fminf(0.0f, scale + (p - q)) : -INFINITY;
            c.scale[i + 1] = scale;
        }
        for (int i = 0; i <= n; ++i) c.scale[i] = exp2f(c.scale[i]);
    }
    __syncthreads();
}

// sum max(P p - q, 0) over a chunk, for each position with a draft before it and one at it.
template <typename Io>
__global__ void __launch_bounds__(256, 3) block_masses(const Sampling a) {
    const int split = blockIdx.x % a.splits;
    const int line = blockIdx.x / a.splits;
    const int row = line / (a.drafts - 1), at = line % (a.drafts - 1) + 1;
    if (rule_of(a, row) != kBlock || is_greedy(a, row) || at >= drafts_of(a, row)) return;
    Case& c = *reinterpret_cast<Case*>(shared_memory());
    open_case<Io>(c, a, row);
    const Softmax p = c.p[at], q = c.q[at];
    const float scale = c.scale[at];
    const int draft = a.tokens[row * a.tokens_row + at];
    const Io* other = a.draft ? draft_logits<Io>(a, row, at) : nullptr;
    const int begin = split * a.chunk, end = min(begin + a.chunk, a.V);
    float mass = 0.0f;
    each_piece<2>(target_logits<Io>(a, row, at), begin, end, a.vectors,
                  [&](int first, const float (&x)[kVector<Io>]) {
                      float y[kVector<Io>];
                      if (other) values_of<Io>(fetch_logits(other, first, end, a.vectors), y);
#pragma unroll
                      for (int i = 0; i < kVector<Io>; ++i) {
                          const float drafted =
                              other ? q.of(y[i], first + i) : (first + i == draft ? 1.0f : 0.0f);
                          mass += fmaxf(scale * p.of(x[i], first + i) - drafted, 0.0f);
                      }
                  });
    mass = sum_lanes(mass, 32);
    __syncthreads();
    if (lane_of_warp() == 0) c.mass[threadIdx.x / 32] = mass;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < blockDim.x / 32; ++w) mass += c.mass[w];
    a.masses[(int64(row) * a.drafts + at) * a.splits + split] = mass;
}

// How many drafts are accepted; by the block, from an open case.
__device__ __forceinline__ void judge(Case& c, const Sampling& a, int row) {
    const int n = c.drafts;
    const bool block = rule_of(a, row) == kBlock;
    if (block) {
        const int lane = lane_of_warp();
        for (int i = 1 + threadIdx.x / 32; i < n; i += blockDim.x / 32) {
            float mass = 0.0f;
            for (int s = lane; s < a.splits; s += 32)
                mass += a.masses[(int64(row) * a.drafts + i) * a.splits + s];
            mass = sum_lanes(mass, 32);
            if (lane == 0) c.mass[i] = mass;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        bool bad = n < 0;
        for (int i = 0; i <= n; ++i) bad |= c.p[i].bad || (i < n && a.draft && c.q[i].bad);
        int accepted = 0;
        for (int i = 0; i < n; ++i) {
            const float u =
                uniform(sampling_words(a.seeds[row], a.positions[row] + i, kAccept, 0).w[0]);
            if (!block) {
                if (!(log2f(u) < c.p_draft[i] - c.q_draft[i])) break;
                accepted = i + 1;
                continue;
            }
            const float scale = c.scale[i + 1];
            float enough = scale;
            if (i + 1 < n && scale < 1.0f)
                enough = c.mass[i + 1] / (c.mass[i + 1] + (1.0f - scale));
            if (u <= enough) accepted = i + 1;
        }
        c.verdict = {bad ? -1 : accepted, n};
    }
    __syncthreads();
}

// The noise of four entries in a race.
struct Race {
    int64 seed, position;
    int purpose;
    bool quiet;  // no noise: the largest weight wins

    // Lets the entries `index` to index + 3 take part, of log weights w, -inf: not.
    __device__ void run(Winner& best, float& lead, const float (&w)[4], unsigned index) const {
        const float most = fmaxf(fmaxf(w[0], w[1]), fmaxf(w[2], w[3]));
        if (!(most > -INFINITY) || most + (quiet ? 0.0f : kMostNoise) < lead) return;
        Words words{{0, 0, 0, 0}};
        if (!quiet) words = sampling_words(seed, position, purpose, index);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float score = w[i];
            if (!quiet) {
                const float v = uniform(words.w[i]);
                // score > lead needs E < exp(w - lead), and v <= E.
                if (v > power((w[i] - lead) * kLog2E) * 1.0001f) continue;
                score -= logf(-log1pf(-v));
            }
            if (score > lead) {
                lead = score;
                best = {key_of(score), index + i};
            }
        }
    }
};

// This thread's best of a chunk of the target's own logits.
template <typename Io>
__device__ __forceinline__ Winner draw_own(const Sampling& a, const Race& race, int row, int slot,
                                           int begin, int end) {
    const Io* logits = target_logits<Io>(a, row, slot);
    Softmax kept{0.0f, 0.0f, 0.0f, 0, 0, is_cut(a, row), false};
    if (kept.cut) {
        const Cut cut = a.cuts[target_line(a, row, slot)];
        kept.key = cut.key;
        kept.index = cut.index;
    }
    const float factor = race.quiet ? 1.0f : 1.0f / temperature_of(a, row);
    Winner best{0, ~0u};
    float lead = -INFINITY;
    bool bad = false;
    each_piece<2>(logits, begin, end, a.vectors, [&](int first, const float (&x)[kVector<Io>]) {
#pragma unroll
        for (int h = 0; h < kVector<Io>; h += 4) {
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bad |= race.quiet ? x[h + i] != x[h + i] : !(x[h + i] < INFINITY);
                w[i] = kept.keeps(x[h + i], first + h + i) ? x[h + i] * factor : -INFINITY;
            }
            race.run(best, lead, w, first + h);
        }
    });
    return bad ? Winner{kBadKey, 0} : best;
}

// Of max(scale p - q, 0). Where p and q are equal up to rounding nobody takes part: then one of the
// likeliest tokens wins, by a key below that of all scores, which are over -110.
template <typename Io>
__device__ __forceinline__ Winner draw_replacement(const Case& c, const Sampling& a,
                                                   const Race& race, int row, int at, int begin,
                                                   int end) {
    const Softmax p = c.p[at], q = c.q[at];
    const float scale = rule_of(a, row) == kBlock ? c.scale[at] : 1.0f;
    const int draft = a.tokens[row * a.tokens_row + at];
    const Io* other = a.draft ? draft_logits<Io>(a, row, at) : nullptr;
    Winner best{0, ~0u}, spare{0, ~0u};
    float lead = -INFINITY;
    const auto visit = [&](int first, const float (&x)[kVector<Io>]) {
        float y[kVector<Io>];
        if (other) values_of<Io>(fetch_logits(other, first, end, a.vectors), y);
#pragma unroll
        for (int h = 0; h < kVector<Io>; h += 4) {
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int index = first + h + i;
                const float chance = p.of(x[h + i], index);
                const float drafted =
                    other ? q.of(y[h + i], index) : (index == draft ? 1.0f : 0.0f);
                const float rest = scale * chance - drafted;
                w[i] = rest > 0.0f ? logf(rest) : -INFINITY;
                if (best.key == 0 && chance > 0.0f) spare.meet(key_of(x[h + i]) >> 3, index);
            }
            race.run(best, lead, w, first + h);
        }
    };
    each_piece<2>(target_logits<Io>(a, row, at), begin, end, a.vectors, visit);
    return best.key ? best : spare;
}

template <typename Io>
__global__ void __launch_bounds__(256, 2) draw_tokens(const Sampling a) {
    const int split = blockIdx.x % a.splits, place = blockIdx.x / a.splits;
    const int row = place / a.slots, slot = place % a.slots;
    const int begin = split * a.chunk, end = min(begin + a.chunk, a.V);
    Case& c = *reinterpret_cast<Case*>(shared_memory());
    Race race{a.seeds[row], 0, a.purpose, is_greedy(a, row)};
    int at = slot;
    bool replace = false;
    if (!a.tree && rejects(a, row)) {
        if (slot != 0) return;
        open_case<Io>(c, a, row);
        judge(c, a, row);
        if (split == 0 && threadIdx.x == 0) a.verdicts[row] = c.verdict;
        at = c.verdict.accepted;
        if (at < 0) return;
        replace = at < c.verdict.drafts;
        race.purpose = replace ? kResidual : kBonus;
    } else if (!is_live(a, row, slot)) {
        return;
    }
    race.position = position_of(a, row, at);
    Winner best = replace ? draw_replacement<Io>(c, a, race, row, at, begin, end)
                          : draw_own<Io>(a, race, row, at, begin, end);
    best = winner_of_warp(best);
    __syncthreads();  // the case is read
    Winner* warps = reinterpret_cast<Winner*>(shared_memory());
    if (lane_of_warp() == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < blockDim.x / 32; ++w) best.meet(warps[w].key, warps[w].index);
    a.winners[int64(place) * a.splits + split] = best.packed();
}

// A block a row, a warp a slot.
__global__ void __launch_bounds__(1024) emit_tokens(const Sampling a) {
    const int row = blockIdx.x, slot = threadIdx.x / 32;
    int* drawn = reinterpret_cast<int*>(shared_memory());
    const bool reject = rejects(a, row);
    const int n = drafts_of(a, row);
    const int* tokens = a.tokens + row * a.tokens_row;
    Verdict verdict{-1, n};
    if (reject && n >= 0) verdict = a.verdicts[row];
    const bool drawn_here = reject ? slot == 0 && verdict.accepted >= 0 : slot <= n;
    if (drawn_here) {
        const int token = winner_of_slot(a, target_line(a, row, slot));
        if (lane_of_warp() == 0) drawn[slot] = token;
    }
    __syncthreads();
    int accepted = verdict.accepted, last = -1;
    if (reject) {
        if (accepted >= 0) last = drawn[0];
    } else if (n >= 0) {
        accepted = 0;
        while (accepted < n && drawn[accepted] == tokens[accepted]) ++accepted;
        last = drawn[accepted];
        for (int i = 0; i <= n; ++i)
            if (drawn[i] < 0) accepted = -1;
    }
    if (last < 0) accepted = -1;
    for (int i = threadIdx.x; i < a.slots; i += blockDim.x)
        a.out[int64(row) * a.slots + i] = i < accepted ? tokens[i] : (i == accepted ? last : -1);
    if (threadIdx.x == 0) a.accepted[row] = accepted;
}

#ifndef __CUDACC_RTC__
#define TIGON_ROWS(Io)                                                  \
    table_row("tigon::block_masses<tigon::" #Io ">", block_masses<Io>), \
        table_row("tigon::draw_tokens<tigon::" #Io ">", draw_tokens<Io>)

KernelTable verify_draft_kernels() {
    return {TIGON_ROWS(f32), TIGON_ROWS(bf16), TIGON_ROWS(f16),
            table_row("tigon::emit_tokens", emit_tokens)};
}

#undef TIGON_ROWS
#endif

}  // namespace tigon
