"""Read a long prompt with tokens dropped between the layers: HybridLM, then a transformers NemotronH.

    python examples/token_reduction.py [--visual 2048] [--kind stages] [--average 0.4]

A prompt of --visual tokens that may be dropped, as those of a video, and 64 of a question behind them, which stay and
ask. Prints what each layer keeps, and time and memory of the prompt beside the unreduced model. Weights are random:
this shows what reduction costs and saves, not what a trained model answers (docs/token_reduction.md). Exit code 1 if a
budget of 1, which keeps every token, changes the text.
"""

import argparse
import sys
import time

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

import tigon
from tigon.bench.timing import peak_memory
from tigon.models import HybridConfig, HybridLM
from tigon.models.reduction_schedule import KINDS, ReductionSchedule

PATTERN, TEXT, NEW = "M-M*M-M*M-M-", 64, 16
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "initializer_range": 0.1,
    "max_position_embeddings": 2**20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS_OF_LAYER = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


def timed(call, device: str) -> tuple[float, int]:
    """(seconds, the faster of two; bytes at the highest)."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds), peak_memory(call, device)


def compare(name: str, full, reduced, cache_bytes: tuple[int, int], device: str) -> None:
    """Print time and memory of two ways to read the prompt."""
    rows = [timed(call, device) for call in (full, reduced)]
    for way, (seconds, peak), held in zip(("unreduced", "reduced"), rows, cache_bytes):
        print(
            f"{name} {way:9} prompt {1e3 * seconds:7.1f} ms, peak {peak / 2**20:7.1f} MiB, "
            f"cache {held / 2**20:6.2f} MiB"
        )
    print(f"{name} reduced / unreduced: time {rows[1][0] / rows[0][0]:.2f}")


def hybrid(ids: Tensor, mask: Tensor, schedule, whole, device: str) -> bool:
    """Tigon's own model; whether a budget of 1 leaves its text as it is."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig(pattern=PATTERN, **SIZES), device=device).eval()
    length = ids.shape[1]
    counts = [n + TEXT for n in schedule.kept(schedule.plan(PATTERN).shares, length - TEXT)]
    options = {"reduction": schedule, "reducible": mask}
    _, kept = model.backbone(ids, return_plan=True, **options)
    assert [len(kept.of(layer)) for layer in range(len(PATTERN))] == counts
    for layer, (kind, n) in enumerate(zip(PATTERN, counts)):
        share = (n - TEXT) / (length - TEXT)
        print(f"layer {layer:2} {kind}  {n:6} tokens, {share:6.1%} of what may be dropped")

    def prefill(rooms=None, **reduction):
        cache = model.allocate_cache(1, length + NEW, attention_lengths=rooms)
        model.logits(model.backbone(ids, cache=cache, **reduction)[:, -1])
        return cache

    rooms = [n + NEW for n, kind in zip(counts, PATTERN) if kind == "*"]
    sizes = prefill().nbytes(), prefill(rooms, **options).nbytes()
    compare("HybridLM", prefill, lambda: prefill(rooms, **options), sizes, device)

    plain = tigon.generate(model, ids, NEW, stop_ids=())[0]
    same = tigon.generate(model, ids, NEW, stop_ids=(), reduction=whole, reducible=mask)[0]
    return torch.equal(plain, same)


def nemotron_h(ids: Tensor, mask: Tensor, schedule, whole, device: str) -> bool:
    """The same of a transformers NemotronH."""
    torch.manual_seed(0)
    layers = [KINDS_OF_LAYER[kind] for kind in PATTERN]
    model = NemotronHForCausalLM(NemotronHConfig(layers_block_type=layers, **SIZES)).to(device)
    tigon.patch(model.eval(), reduction=schedule)

    def prefill(**reducible):
        return model(ids, use_cache=True, logits_to_keep=1, **reducible).past_key_values

    def held(cache) -> int:
        layers = [vars(layer).values() for layer in cache.layers]
        return sum(t.nbytes for values in layers for t in values if isinstance(t, Tensor))

    sizes = held(prefill()), held(prefill(reducible=mask))
    compare("NemotronH", prefill, lambda: prefill(reducible=mask), sizes, device)

    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    plain = model.generate(ids, **options)
    tigon.patch(model, reduction=whole)
    return torch.equal(plain, model.generate(ids, reducible=mask, **options))


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--visual", type=int, default=2048, help="tokens to drop from (default: 2048)"
    )
    parser.add_argument(
        "--kind", choices=KINDS, default="stages", help="of schedule (default: stages)"
    )
    parser.add_argument(
        "--average",
        type=float,
        default=0.4,
        help="kept share, 0 to 1, mean over layers (default: 0.4)",
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = ReductionSchedule(args.kind, average=args.average)
    whole = ReductionSchedule(args.kind, average=1.0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SIZES["vocab_size"], (1, args.visual + TEXT), generator=draw).to(device)
    mask = (torch.arange(args.visual + TEXT, device=device) < args.visual)[None]
    print(f"{args.visual} tokens and {TEXT} of text, {args.kind}: {schedule.plan(PATTERN)}")
    same = True
    for name, run in (("HybridLM", hybrid), ("NemotronH", nemotron_h)):
        equal = run(ids, mask, schedule, whole, device)
        print(f"{name} the same text with average 1: {equal}")
        same &= equal
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
