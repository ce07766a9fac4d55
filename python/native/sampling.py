"""Launchers of sampling: csrc/logit_stats.cu, csrc/verify_draft.cu and csrc/verify_tree.cu.

Arguments and results are those of the functions of the same names in tigon.reference.sampling. One struct serves all
kernels of a call. V is split into chunks of a fixed size whose partial results are joined in a fixed order, and a row's
random bits depend on its seed and position only: neither the batch nor the GPU changes a bit. Nothing is read back.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

from tigon.native.arguments import FORMATS, ceil_div, dtype_codes, pointer
from tigon.native.loader import MAX_BLOCKS, Launch, run
from tigon.native.quantize import allocate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# struct Sampling in csrc/common/logits.cuh: 22 pointers, 7 strides, 12 ints, 4 floats.
SAMPLING = struct.Struct("=22Q7q12i4f")
# struct TreeLinks in csrc/verify_tree.cu: 5 pointers, 2 strides, 2 ints.
TREE_LINKS = struct.Struct("=5Q2q2i")

CHUNK = 8192  # vocabulary entries a block: 4 accesses of 16 bytes a thread in bf16
BLOCK = 256
CUT_BLOCK = 512
BINS = 2048
CASE = 2560  # bytes of struct Case in csrc/verify_draft.cu
TOKEN, BLOCK_RULE, STRICT, GREEDY, MIXED = 0, 1, 2, 3, -1


@functools.lru_cache(maxsize=1024)
def plan_sampling(
    b: int, slots: int, drafts: int, V: int, io: str, rule: int, logits: bool, filters: bool, tree: bool
) -> dict[str, Launch]:  # fmt: skip
    """The launches of a call by kernel, in their order.

    slots: positions (or nodes) of a row that the target has logits for; drafts: K, 0 for trees; logits: the drafts have
    some; filters: rows may be cut to top_k or top_p.
    """
    splits = ceil_div(V, CHUNK)
    rows = b * (slots + (drafts if logits else 0))
    if rows * splits > MAX_BLOCKS:
        raise ValueError(f"sampling: {rows} rows of {V} logits are over {MAX_BLOCKS} chunks")
    plans = {}

    def add(source: str, kernel: str, blocks: int, block: int, shared: int, typed: bool = True):
        name = f"tigon::{kernel}<tigon::{io}>" if typed else f"tigon::{kernel}"
        plans[kernel] = Launch(source, name, (blocks, 1), block, shared)

    rejects = rule in (TOKEN, BLOCK_RULE, MIXED)
    if tree:
        plans["tree_links"] = plan_tree_links(b)
    if rejects or filters:
        add("logit_stats.cu", "logit_stats", rows * splits, BLOCK, 8 * 32)
    if filters:
        add("logit_stats.cu", "logit_cuts", rows, CUT_BLOCK, 12 * BINS + 1024)
    if rule in (BLOCK_RULE, MIXED) and drafts > 1:
        add("verify_draft.cu", "block_masses", b * (drafts - 1) * splits, BLOCK, CASE)
    add("verify_draft.cu", "draw_tokens", b * slots * splits, BLOCK, CASE)
    if tree:
        add("verify_tree.cu", "tree_walk", b, 32 * slots, 4 * slots, typed=False)
    else:
        add("verify_draft.cu", "emit_tokens", b, 32 * slots, 4 * slots, typed=False)
    return plans


def plan_tree_links(b: int) -> Launch:
    """The launch of ``tree_links``: a warp a tree."""
    return Launch("verify_tree.cu", "tigon::tree_links", (b, 1), 32, 16 * 32)


def _io(sizes: dict[str, int]) -> str:
    """Two bytes an element are shown as bf16, whose launch fp16 shares."""
    return "f32" if sizes["itemsize"] == 4 else "bf16"


def _explain_sample(**sizes: int) -> dict[str, Launch]:
    shape = (sizes["b"], 1, 0, sizes["V"], _io(sizes), STRICT)
    return plan_sampling(*shape, False, bool(sizes["filters"]), False)


def _explain_verify_draft(**sizes: int) -> dict[str, Launch]:
    K = sizes["K"]
    shape = (sizes["b"], K + 1, K, sizes["V"], _io(sizes), sizes["rule"])
    return plan_sampling(*shape, bool(sizes["logits"]), bool(sizes["filters"]), False)


def _explain_verify_tree(**sizes: int) -> dict[str, Launch]:
    shape = (sizes["b"], sizes["N"], 0, sizes["V"], _io(sizes), sizes["rule"])
    return plan_sampling(*shape, False, bool(sizes["filters"]), True)


PLANS = {
    "sample": _explain_sample,
    "verify_draft": _explain_verify_draft,
    "verify_tree": _explain_verify_tree,
    "tree_ancestors": lambda **sizes: {"tree_links": plan_tree_links(sizes["b"])},
}


def _workspace(device: torch.device, *sizes: int) -> list[int]:
    """Addresses of pieces of `sizes` bytes in one allocation, and the tensor that holds them, last."""
    import torch

    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + ceil_div(size, 16) * 16)
    memory = allocate((ends[-1] // 4,), torch.int32, device)
    start = memory.data_ptr()
    return [*(start + end if size else 0 for end, size in zip(ends, sizes)), memory]


def _strides(logits: Tensor | None) -> tuple[int, int]:
    """Of rows and positions; one that is never taken is 0."""
    if logits is None:
        return 0, 0
    return tuple(s if n > 1 else 0 for n, s in zip(logits.shape[:2], logits.stride()[:2]))


def _launch(
    target: Tensor,
    draft: Tensor | None,
    tokens: Tensor | None,
    counts: Tensor | None,
    rules: Tensor | None,
    settings: tuple,
    numbers: tuple,
    drafts: int,
    purpose: int,
    outputs: tuple[Tensor | None, ...],
    tree: tuple[Tensor, Tensor] | None = None,
) -> None:
    """All launches of a call. target (b,slots,V); outputs: tokens, counts, path."""
    b, slots, V = target.shape
    rule, temperature, top_k, top_p = numbers
    seeds, positions, temperatures, top_ks, top_ps = settings
    filters = top_ks is not None or top_ps is not None or top_k > 0 or top_p < 1
    shown = MIXED if rules is not None else rule
    io = dtype_codes()[target.dtype]
    case = (b, slots, drafts, V, FORMATS[io], shown, draft is not None, filters, tree is not None)
    plans = plan_sampling(*case)
    splits = ceil_div(V, CHUNK)
    rows = b * (slots + (drafts if draft is not None else 0))
    *pieces, memory = _workspace(
        target.device,
        8 * rows * splits if "logit_stats" in plans else 0,
        16 * rows if filters else 0,
        4 * b * drafts * splits if "block_masses" in plans else 0,
        8 * b * slots * splits,
        8 * b,
        4 * b * slots if tree else 0,
        4 * b * slots if tree else 0,
    )
    target_strides, draft_strides = _strides(target), _strides(draft)
    offsets = target.data_ptr() | pointer(draft)
    for stride in (*target_strides, *draft_strides):
        offsets |= stride * target.element_size()
    first, sibling = tree or (None, None)
    arguments = SAMPLING.pack(
        target.data_ptr(),
        *(pointer(t) for t in (draft, tokens, counts, rules, seeds, positions)),
        *(pointer(t) for t in (temperatures, top_ks, top_ps)),
        *pieces,
        pointer(first),
        pointer(sibling),
        *(pointer(t) for t in outputs),
        *target_strides,
        *draft_strides,
        0 if tokens is None else tokens.stride(0),
        0 if first is None else first.stride(0),
        0 if sibling is None else sibling.stride(0),
        b,
        slots,
        drafts,
        V,
        splits,
        CHUNK,
        rule,
        top_k,
        purpose,
        tree is not None,
        not offsets & 15,
        0 if outputs[2] is None else outputs[2].shape[1],
        temperature,
        top_p,
        2.0 ** min(44, 62 - V.bit_length()),
        0.0,
    )
    links = TREE_LINKS.pack(
        *(pointer(t) for t in (first, sibling, counts)), pieces[5], pieces[6],
        *(0 if t is None else t.stride(0) for t in (first, sibling)), b, slots,
    )  # fmt: skip
    for kernel, launch in plans.items():
        run(launch, target.device, links if kernel == "tree_links" else arguments)
    del memory  # kept until the launches are on their stream


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    purpose: int,
) -> Tensor:
    """(b) int32, as the reference says it. logits (b,V) fp32, bf16 or fp16, rows strided at will; the others packed.

    Raises ValueError for more chunks than a grid holds, RuntimeError where no kernel can be reached or launched.
    """
    import torch

    b = logits.shape[0]
    tokens = allocate((b, 1), torch.int32, logits.device)
    counts = allocate((b,), torch.int32, logits.device)
    if b:
        settings = (seeds, positions, temperatures, top_ks, top_ps)
        numbers = (STRICT, temperature, top_k, top_p)
        outputs = (tokens, counts, None)
        _launch(logits[:, None], None, None, None, None, settings, numbers, 0, purpose, outputs)
    return tokens[:, 0]


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    num_draft: Tensor | None,
    rules: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    rule: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """(tokens (b,K+1), num_accepted (b)) int32, as the reference says it. Logits (b,K+1,V) and (b,K,V), batch and
    positions strided at will; the others packed, draft_tokens by row. Raises as sample."""
    import torch

    b, width, _ = target_logits.shape
    tokens = allocate((b, width), torch.int32, target_logits.device)
    counts = allocate((b,), torch.int32, target_logits.device)
    if b:
        settings = (seeds, positions, temperatures, top_ks, top_ps)
        numbers = (rule, temperature, top_k, top_p)
        inputs = (
            target_logits,
            draft_logits if width > 1 else None,
            draft_tokens,
            num_draft,
            rules,
        )
        _launch(*inputs, settings, numbers, width - 1, 0, (tokens, counts, None))
    return tokens, counts


def verify_tree(
    target_logits: Tensor,
    tokens: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    num_nodes: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    rule: int,
    temperature: float,
    top_k: int,
    top_p: float,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(path (b,max_depth), tokens (b,max_depth+1), num_accepted (b)) int32, as the reference says it. Raises as
    sample."""
    import torch

    b, device = target_logits.shape[0], target_logits.device
    path = allocate((b, max_depth), torch.int32, device)
    emitted = allocate((b, max_depth + 1), torch.int32, device)
    counts = allocate((b,), torch.int32, device)
    if b:
        settings = (seeds, positions, temperatures, top_ks, top_ps)
        numbers = (rule, temperature, top_k, top_p)
        links = (first_child, next_sibling)
        _launch(
            target_logits, None, tokens, num_nodes, None, settings, numbers, 0, 0,
            (emitted, counts, path), links,
        )  # fmt: skip
    return path, emitted, counts


def tree_ancestors(first_child: Tensor, next_sibling: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, depth), both (b,N) int32, as the reference says it; rows strided at will."""
    import torch

    b, N = first_child.shape
    bits, depth = (allocate((b, N), torch.int32, first_child.device) for _ in "bd")
    if b:
        links = TREE_LINKS.pack(
            *(t.data_ptr() for t in (first_child, next_sibling)), 0, bits.data_ptr(), depth.data_ptr(),
            first_child.stride(0), next_sibling.stride(0), b, N,
        )  # fmt: skip
        run(plan_tree_links(b), first_child.device, links)
    return bits, depth
