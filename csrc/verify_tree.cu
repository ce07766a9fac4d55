// Trees of drafts: who is whose ancestor, and the walk along the target's own draws.
//
// tree_links: a node hangs below the lowest node that names it as first child, else beside the
// lowest one that names it as next sibling. Every lane follows its node's links upwards, twice as
// far a step, so that loops end too; what does not come to node 0 is no part of the tree.
//
// tree_walk: draw_tokens (verify_draft.cu) has drawn at every node of the tree; a warp a node joins
// the chunks' winners, then one warp walks: the child that holds the drawn token, else stop.
#include "common/logits.cuh"

namespace tigon {

struct TreeLinks {
    const int* first_child;   // (b,N)
    const int* next_sibling;  // (b,N)
    const int* counts;        // (b) nodes, may be null
    unsigned* bits;           // (b,N) node and ancestors
    int* depths;              // (b,N)
    int64 child_row, sibling_row;
    int batch, nodes;
};

// A block of one warp a tree.
__global__ void __launch_bounds__(32) tree_links(const TreeLinks a) {
    const int row = blockIdx.x, lane = lane_of_warp();
    int nodes = a.counts ? min(a.counts[row], a.nodes) : a.nodes;
    const int* children = a.first_child + row * a.child_row;
    const int* siblings = a.next_sibling + row * a.sibling_row;
    struct Step {
        unsigned above;
        int up, depth, unused;
    };
    Step* steps = reinterpret_cast<Step*>(shared_memory());
    Step mine{0, lane, 0, 0};  // a node that hangs nowhere points at itself
    if (lane > 0 && lane < nodes) {
        int parent = -1, beside = -1;
        for (int i = nodes - 1; i >= 0; --i) {
            if (children[i] == lane) parent = i;
            if (siblings[i] == lane) beside = i;
        }
        if (parent >= 0)
            mine = {1u << parent, parent, 1, 0};
        else if (beside >= 0)
            mine.up = beside;
    }
    for (int far = 1; far < 32; far *= 2) {
        steps[lane] = mine;
        __syncwarp();
        const Step next = steps[mine.up];
        mine = {mine.above | next.above, next.up, mine.depth + next.depth, 0};
        __syncwarp();
    }
    if (lane >= a.nodes) return;
    const bool reached = mine.up == 0;
    a.bits[int64(row) * a.nodes + lane] = 1u << lane | (reached ? mine.above : 0u);
    a.depths[int64(row) * a.nodes + lane] = reached ? mine.depth : 0;
}

// A block a tree, a warp a node.
__global__ void __launch_bounds__(1024) tree_walk(const Sampling a) {
    const int row = blockIdx.x, slot = threadIdx.x / 32, lane = lane_of_warp();
    const int64 first = target_line(a, row, 0);
    const int nodes = a.counts ? min(a.counts[row], a.slots) : a.slots;
    int* drawn = reinterpret_cast<int*>(shared_memory());
    const bool live = is_live(a, row, slot);
    const int won = live ? winner_of_slot(a, first + slot) : 0;
    if (lane == 0) drawn[slot] = won;
    __syncthreads();
    if (slot != 0) return;

    const unsigned bits = lane < nodes ? a.ancestors[first + lane] : 0u;
    const bool mine = bits & 1u;  // a node of the tree
    const bool bad = nodes < 1 || __any_sync(kWholeWarp, mine && drawn[lane] < 0);
    const unsigned above = bits & ~(1u << lane);
    const int token = mine ? a.tokens[row * a.tokens_row + lane] : -1;
    int node = bad ? -1 : 0, count = bad ? -1 : 0;
    for (int i = 0; i <= a.max_depth; ++i) {
        const int y = node >= 0 ? drawn[node] : -1;
        if (lane == 0) a.out[int64(row) * (a.max_depth + 1) + i] = y;
        if (i == a.max_depth) break;
        const unsigned below = node >= 0 ? a.ancestors[first + node] : 0u;
        const bool child = node >= 0 && mine && lane > 0 && above == below && token == y;
        const unsigned found = __ballot_sync(kWholeWarp, child);
        node = found ? __popc((found & -found) - 1) : -1;
        count += node >= 0;
        if (lane == 0) a.path[int64(row) * a.max_depth + i] = node;
    }
    if (lane == 0) a.accepted[row] = count;
}

#ifndef __CUDACC_RTC__
KernelTable verify_tree_kernels() {
    return {table_row("tigon::tree_links", tree_links), table_row("tigon::tree_walk", tree_walk)};
}
#endif

}  // namespace tigon
