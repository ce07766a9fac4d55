"""Nothing of a step comes from the host: on a GPU each such copy would wait, and no graph could be captured.

The steps run on the meta device, where every operation is seen and nothing is computed.
"""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tigon.generation.decoder import Decoder
from tigon.generation.drafter import Drafter
from tigon.generation.sampling import Sampling
from tigon.generation.tree import DraftTree
from tigon.models import HybridLM


class Watch(TorchDispatchMode):
    """Notes tensors that come from the CPU, and values that are read."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function), kwargs or {}
        copied = "_to_copy" in name and not args[0].is_meta
        if copied or any(part in name for part in ("_local_scalar", "nonzero")):
            self.seen.append((name, traceback.extract_stack()[-3]))
        return function(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize(
    "rule, tree, rollback, settings",
    [
        ("strict", None, "replay", dict(temperature=1.0, top_k=5, top_p=0.9)),
        ("token", None, "replay", dict(temperature=1.0)),
        ("block", None, "snapshot", dict(temperature=1.0)),
        ("strict", (2, 2), "replay", dict(temperature=1.0, top_k=5, top_p=0.9)),
        ("greedy", (2, 2), "replay", dict(temperature=1.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.int8], ids=str)
def test_a_step_copies_nothing_to_the_device_and_reads_nothing_back(
    single, rule, tree, rollback, settings, ssm_dtype
):
    config = single.config.replace(pattern="M*M-")  # autocast, which a mixture asks, knows no meta
    model = HybridLM(config, device="meta").eval()
    tree = None if tree is None else DraftTree(tree, "meta")
    if tree is not None:
        tree = on_meta(tree)
    cache = model.allocate_cache(
        4,
        64,
        rollback=rollback,
        tokens=tree.nodes if tree else 4,
        ssm_dtype=ssm_dtype,
        rounding="stochastic",
    )
    drafter = Drafter(model, 4, 64, 64)
    decoder = Decoder(model, cache, Sampling(rule, cache.seeds, **settings), drafter, tree=tree)
    slots = torch.arange(4, device="meta")
    ids = torch.zeros(4, 40, dtype=torch.int64, device="meta")
    with Watch() as watch:
        step = decoder.prefill(slots, ids, torch.full((4,), 9, device="meta"))
        step = decoder.step(slots, step.tokens[:, 0], tree.depth if tree else 3)
    assert step.tokens.is_meta and step.tokens.shape[0] == 4
    assert not watch.seen


def on_meta(tree: DraftTree) -> DraftTree:
    """Its tensors made on the CPU, as values are needed to make them, and then moved."""
    made = DraftTree(tree.branches)
    tree.__dict__["links"] = tuple(t.to("meta") for t in made.links)
    tree.__dict__["bits"] = made.bits.to("meta")
    tree.__dict__["drafter_bits"] = [t.to("meta") for t in made.drafter_bits]
    return tree
