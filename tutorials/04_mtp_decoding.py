# %% [markdown]
# # Decoding with multi-token prediction
#
# A model that guesses tokens ahead can check several guesses in one pass, which on a GPU costs little more than a pass
# over one token. Here: a tiny model with such a head is trained, its drafts are counted, and the rule that makes
# drafts harmless is worked out by hand.
#
# `python tutorials/04_mtp_decoding.py [--plot DIR]`. Sources: "Better & Faster Large Language Models via Multi-token
# Prediction" (arXiv 2404.19737), DeepSeek-V3 (2412.19437), "Fast Inference from Transformers via Speculative Decoding"
# (2211.17192).

# %%
import argparse
from pathlib import Path

import torch

import tigon
from tigon.cli.demo_text import split_text
from tigon.models import HybridLM

parser = argparse.ArgumentParser()
parser.add_argument("--plot", type=Path, help="folder to write a plot to")
args, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
torch.manual_seed(0)

# %% [markdown]
# ## Train
#
# `tiny` has 0.6 million parameters, four layers and an MTP head: one more block that from the backbone's hidden state
# at token i and the embedding of token i+1 predicts token i+2, and applied to its own output, token i+3, and so on. Its
# loss is added to the model's. The text is the help pages that come with Python, byte by byte.

# %%
training, held_out = (torch.tensor(list(part)) for part in split_text())
model = HybridLM("tiny")
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)
steps, length = 100, 128
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
for step in range(steps):
    start = torch.randint(0, training.numel() - length, (2, 1))
    ids = training[start + torch.arange(length + 1)]
    losses = model.losses(ids[:, :-1], ids[:, 1:])
    optimizer.zero_grad()
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step == 0 or step % 25 == 24:
        ahead = ", ".join(f"{nats:.2f}" for nats in losses.mtp.tolist())
        print(f"step {step + 1:3}: next byte {losses.cross_entropy:.2f} nats, further ones {ahead}")
model.eval()

# %% [markdown]
# ## How often are drafts right?
#
# Given the true text: the share of positions where the head's likeliest byte at depth d, and those at all depths before
# it, are right. A draft behind a wrong one is worth nothing.

# %%
window = held_out[None, :2049]
with torch.no_grad():
    hidden = model.backbone(window[:, :-1])
    accepted = model.mtp_losses(hidden, window[:, :-1], window[:, 1:], depths=3).accepted.tolist()
print(
    "right, with all before:", ", ".join(f"depth {d + 1}: {a:.0%}" for d, a in enumerate(accepted))
)
assert accepted == sorted(accepted, reverse=True)

# %% [markdown]
# ## Generate with K drafts
#
# Each pass reads the last token and K drafts, keeps the drafts up to the first that is not what the model would have
# said, and adds the model's own next token: 1 to K + 1 tokens a pass. Recurrent states cannot be cut like a key cache;
# Tigon keeps the tokens' inputs in a ring and counts only those that stay (`docs/specdec.md`).
#
# Greedy text is the same for every K: exactly so in batch-invariant mode, else up to rounding, as a pass over four
# tokens sums in another order than a pass over one. (A model this young repeats itself, which is easy to guess.)

# %%
prompts = [held_out[i : i + 64] for i in (0, 4000, 8000, 12000)]
texts, per_pass, kept = [], [], []
with tigon.batch_invariant():
    for K in range(4):
        options = {"draft_tokens": K, "stop_ids": (), "return_report": True}
        text, report = tigon.generate(model, prompts, 48, **options)
        texts.append(text), per_pass.append(report.acceptance_length)
        kept = report.acceptance
        shares = " ".join(f"{share:.0%}" for share in kept) or "-"
        print(f"K = {K}: {per_pass[K]:.2f} tokens a pass in {report.steps} passes; kept: {shares}")
same = all(torch.equal(a, b) for text in texts[1:] for a, b in zip(texts[0], text))
print(f"the same text for every K: {same}")
print(
    repr(bytes(prompts[0].tolist())[-30:].decode()),
    "->",
    repr(bytes(texts[0][0].tolist()).decode()),
)
assert same and per_pass[0] == 1 and per_pass[3] > 1.2

# %% [markdown]
# ## Drawn text: the rejection rule
#
# The draft is drawn from q, the token should follow p. Accept draft d with probability min(1, p(d) / q(d)); if it is
# rejected, draw from the residual max(p - q, 0), normalized. Then token y comes with probability
#
#     q(y) min(1, p(y) / q(y)) + P(rejected) max(p(y) - q(y), 0) / sum(max(p - q, 0)) = min(p, q) + max(p - q, 0) = p(y)
#
# because P(rejected) = 1 - sum(min(p, q)) = sum(max(p - q, 0)). A draft is kept with probability sum(min(p, q)),
# however bad q is; bad drafts cost time, never the distribution.

# %%
p = torch.tensor([0.50, 0.30, 0.15, 0.05], dtype=torch.float64)
q = torch.tensor([0.25, 0.25, 0.40, 0.10], dtype=torch.float64)
accept = (p / q).clamp(max=1)
residual = (p - q).clamp(min=0)
residual /= residual.sum()
law = q * accept + (1 - (q * accept).sum()) * residual
for name, value in (("accept", accept), ("residual", residual), ("law", law), ("p", p)):
    print(f"{name:9}", *(f"{v:.4f}" for v in value))
assert torch.allclose(law, p, rtol=0, atol=1e-15)

rows = 200_000
logits = torch.stack([p, p]).log().float().expand(rows, 2, 4)  # of the draft's place, and the next
draft_logits = q.log().float().expand(rows, 1, 4)
seeds, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
drafts = tigon.sample(draft_logits[:, 0], seeds=seeds, positions=positions)[:, None]
tokens, accepted_drafts = tigon.verify_draft(
    logits, drafts, draft_logits, rule="token", seeds=seeds, positions=positions
)
counts = tokens[:, 0].bincount(minlength=4)
chi2 = ((counts - rows * p) ** 2 / (rows * p)).sum().item()
overlap = torch.minimum(p, q).sum().item()
share = accepted_drafts.double().mean().item()
print(f"tigon.verify_draft, {rows:,} rows: {counts.tolist()}, chi2 {chi2:.1f} (3 degrees)")
print(f"  kept {share:.4f} of the drafts; sum(min(p, q)) = {overlap:.4f}")
assert chi2 < 16.3 and abs(share - overlap) < 0.005  # 16.3: one in a thousand

if args.plot:
    import matplotlib.pyplot as plt

    (
        plt.plot(range(1, 4), accepted, "o-", label="true text"),
        plt.plot(range(1, 4), kept, "o-", label="own text"),
    )
    plt.xlabel("depth"), plt.ylabel("drafts kept"), plt.legend()
    plt.savefig(args.plot / "mtp_drafts.png")
