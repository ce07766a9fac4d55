"""The sampling kernels on host threads under AddressSanitizer + UBSan and ThreadSanitizer, in two warps a block."""

import pytest
import torch
from sampling_cases import check, make, tree
from sanitized import Sanitized, pointer_places

from tigon import native
from tigon.native import sampling

PLACES = {p.size: pointer_places(p) for p in (sampling.SAMPLING, sampling.TREE_LINKS)}
CASES = {
    "mixed rules, cuts by row": ("verify_draft", lambda: make(
        b=4, K=2, V=301, rule="mixed", ragged=True, layout="sliced", drafts="bad", top_k="rows", top_p="rows",
        temperature="rows")),
    "block, fp32, two chunks": ("verify_draft", lambda: make(
        b=2, K=2, V=600, rule="block", dtype=torch.float32)),
    "token, greedy drafts, fp16, one entry": ("verify_draft", lambda: make(
        b=2, K=1, V=1, logits=False, dtype=torch.float16)),
    "equal logits at the cut": ("sample", lambda: dict(
        logits=torch.randint(3, (2, 600)).to(torch.bfloat16), seeds=torch.arange(2), positions=torch.arange(2),
        temperatures=None, top_ks=None, top_ps=None, temperature=0.7, top_k=290, top_p=0.9, purpose=3)),
    "links that make no tree": ("verify_tree", lambda: tree(
        b=3, N=6, V=9, sound=False, nodes=True, max_depth=3, top_p=0.9)),
    "a tree": ("verify_tree", lambda: tree(b=2, N=5, V=3)),
    "ancestors": ("tree_ancestors", lambda: dict(
        first_child=torch.randint(-9, 40, (3, 32), dtype=torch.int32),
        next_sibling=torch.randint(-9, 40, (3, 32), dtype=torch.int32))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sampling_is_clean(sanitizer, case, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 64)
    monkeypatch.setattr(sampling, "CUT_BLOCK", 64)
    monkeypatch.setattr(sampling, "CHUNK", 512)
    sampling.plan_sampling.cache_clear()
    name, arguments = CASES[case][0], CASES[case][1]()
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    loader = Sanitized(sanitizer, tensors, 0, PLACES, tmp_path)
    native.use_host_library(loader)
    try:
        check(name, arguments, loader.know)
    finally:
        native.use_host_library(None)
        sampling.plan_sampling.cache_clear()
