"""Speculative generation with an MTP head: K by K, a tree, and K chosen by itself.

    python examples/speculative_generation.py [--model DIR] [--tokens N] [--dtype float16]

Without --model, `tiny` is trained for a few seconds on Python's own help texts, so that its drafts are worth
something. --model names a NemotronH checkpoint with `mtp.*` tensors, as `HybridLM.from_pretrained` reads it; its
prompts are random ids, since a tokenizer is not part of Tigon.
"""

import argparse

import torch

import tigon
from tigon.cli.demo_text import split_text
from tigon.cli.demo_train import train
from tigon.models import HybridLM


def trained_tiny(seconds: float) -> tuple[HybridLM, list[torch.Tensor]]:
    training, held_out = (torch.tensor(list(text)) for text in split_text())
    torch.manual_seed(0)
    model = HybridLM("tiny")
    train(model, training, seconds=seconds)
    return model, [held_out[i : i + 80] for i in (0, 4000, 8000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a NemotronH checkpoint with an MTP head")
    parser.add_argument("--seconds", type=float, default=20, help="to train tiny (default: 20)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a row (default: 64)")
    parser.add_argument("--dtype", default=None, help="of recurrent states (default: the model's)")
    args = parser.parse_args()
    if args.model:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = HybridLM.from_pretrained(args.model, device=device, mtp=True).eval()
        prompts = [torch.randint(0, model.config.vocab_size, (64,)) for _ in range(3)]
    else:
        model, prompts = trained_tiny(args.seconds)

    options = {
        "rule": "strict",
        "temperature": 0.8,
        "seed": 0,
        "stop_ids": (),
        "return_report": True,
    }
    if args.dtype:
        options |= {"ssm_dtype": getattr(torch, args.dtype), "rounding": "stochastic"}
    ways = {f"K = {k}": {"draft_tokens": k} for k in (0, 1, 2, 3, 5)}
    ways |= {"tree (3, 2, 1)": {"tree": (3, 2, 1)}, "auto": {"draft_tokens": "auto"}}
    texts = {}
    for name, way in ways.items():
        texts[name], report = tigon.generate(model, prompts, args.tokens, **way, **options)
        print(f"{name:15} {report}")
    if not args.model:
        print(bytes(texts["K = 3"][0].tolist()).decode(errors="replace"))
    same = [all(map(torch.equal, texts["K = 0"], text)) for text in texts.values()]
    print(
        f"{sum(same)} of {len(same)} ways gave the same text, as rule 'strict' says up to rounding"
    )


if __name__ == "__main__":
    main()
