"""Fine-tune a transformers NemotronH on Tigon's ops, beside the same model without them.

    python examples/finetune_nemotron_h.py [--model DIR] [--steps 30] [--recipe nvfp4] [--save DIR]

Without --model a small model with random weights learns the help texts that come with Python, byte by byte; --model
names a local folder of a checkpoint, --text a file to learn. `tigon.patch(model)` is all that changes: loss curves with
and without it agree to rounding. --recipe makes the patched model's layers train on quantized operands: "nvfp4" is
Nemotron 3 Super's recipe for all layers; "nemotron-3-super-train" and "fp8-block" are others that train. What is saved
are the high-precision weights, which transformers reads without Tigon.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, NemotronHConfig, NemotronHForCausalLM

import tigon
from tigon.cli.demo_text import split_text

SMALL = {
    "vocab_size": 256,
    "hidden_size": 128,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 1,
    "chunk_size": 64,
    "n_routed_experts": 8,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "initializer_range": 0.05,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOLERANCE = 0.01  # nats between the curves; rounding grows with the steps
NVFP4 = tigon.Recipe.preset("nemotron-3-super-train").replace(keep_last=0)


def load(folder: str | None) -> NemotronHForCausalLM:
    if folder is None:
        return NemotronHForCausalLM(NemotronHConfig(**SMALL))
    return NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def tokens(folder: str | None, path: str | None) -> Tensor:
    """The text's ids: by the checkpoint's tokenizer, or its bytes."""
    text = Path(path).read_bytes() if path else split_text()[0]
    if folder and any(Path(folder).glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return torch.tensor(tokenizer(text.decode(errors="replace")).input_ids)
    return torch.tensor(list(text))


def train(model: nn.Module, ids: Tensor, args: argparse.Namespace) -> list[float]:
    """Losses by step; the batches depend on --seed alone, the device is the model's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    draw = torch.Generator().manual_seed(args.seed)
    losses = []
    for _ in range(args.steps):
        start = torch.randint(0, ids.numel() - args.length, (args.batch, 1), generator=draw)
        batch = ids[start + torch.arange(args.length)].to(model.device)
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="local folder of a NemotronH checkpoint")
    parser.add_argument("--text", help="file to learn (default: Python's help texts)")
    parser.add_argument(
        "--recipe", help="nvfp4, nemotron-3-super-train or fp8-block (default: none)"
    )
    parser.add_argument("--save", help="folder to write the fine-tuned model to")
    parser.add_argument("--alone", action="store_true", help="do not train the unpatched twin")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    parser.add_argument("--batch", type=int, default=2, help="rows a step (default: 2)")
    parser.add_argument("--length", type=int, default=128, help="tokens a row (default: 128)")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = load(args.model).to(device).train(), tokens(args.model, args.text)
    plain = None if args.alone else copy.deepcopy(model)

    print(f"patched: {tigon.patch(model)}")
    if args.recipe:
        print(tigon.quantize(model, NVFP4 if args.recipe == "nvfp4" else args.recipe))
    curves = {}
    for name, each in (("tigon", model), ("transformers", plain)):
        if each is None:
            continue
        start = time.perf_counter()
        curves[name] = train(each, ids, args)
        seconds = time.perf_counter() - start
        first, last = curves[name][0], curves[name][-1]
        print(f"{name:12} loss {first:.4f} -> {last:.4f} in {args.steps} steps, {seconds:.1f} s")
    if plain is not None:
        gap = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
        expected = "quantized, so it is not rounding" if args.recipe else f"at most {TOLERANCE}"
        print(f"largest difference of the curves: {gap:.2e} nats ({expected})")
        if not args.recipe and gap > TOLERANCE:
            raise SystemExit("the curves differ by more than rounding")
    if args.save:
        tigon.unpatch(model)
        model.save_pretrained(args.save)
        again = NemotronHForCausalLM.from_pretrained(args.save, local_files_only=True).to(device)
        batch = ids[None, : args.length].to(device)
        with torch.no_grad():
            loss, reloaded = (m.eval()(batch, labels=batch).loss.item() for m in (model, again))
        print(f"saved to {args.save}: loss {loss:.4f}, read again {reloaded:.4f}")


if __name__ == "__main__":
    main()
