# %% [markdown]
# # Quick start
#
# A Mamba-2 layer, packed sequences, a transformers model on Tigon's ops, which kernel a call takes, and generation.
# Everything here runs on a CPU in seconds; on a GPU the same calls take the kernels.
#
# `python tutorials/01_quickstart.py`, or open it as a notebook (VS Code, or Jupyter with jupytext).

# %%
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

import tigon
from tigon.models import HybridLM
from tigon.modules import Mamba2

torch.manual_seed(0)

# %% [markdown]
# ## A layer
#
# `tigon.modules.Mamba2` has the arguments, parameter names and shapes of `mamba_ssm.Mamba2`, so a `state_dict` of one
# fits the other. Input and output are (batch, length, d_model).

# %%
layer = Mamba2(d_model=128, headdim=32, d_state=64, ngroups=2)
u = torch.randn(1, 300, 128)
y = layer(u)
y.square().mean().backward()
print(f"layer: {tuple(u.shape)} -> {tuple(y.shape)}")
print(f"  its parameters: {', '.join(name for name, _ in layer.named_parameters())}")
assert all(p.grad is not None for p in layer.parameters())

# %% [markdown]
# ## Packed sequences
#
# Sequences of different lengths lie one after the other in one row, without padding. `cu_seqlens` holds where they
# begin and where the last one ends. No state, convolution window or gradient crosses a bound: each sequence gets what
# it gets alone.

# %%
cu_seqlens = torch.tensor([0, 90, 100, 300])
with torch.no_grad():
    packed = layer(u, cu_seqlens=cu_seqlens)
    alone = torch.cat([layer(part) for part in u.split(cu_seqlens.diff().tolist(), 1)], 1)
    whole = layer(u)
difference = (packed - alone).abs().max().item()
print(f"packed: {cu_seqlens.numel() - 1} sequences, at most {difference:.1e} from each alone")
print(f"  without cu_seqlens they would differ by {(whole - alone).abs().max():.1e}")
assert difference < 1e-5 and (whole - alone).abs().max() > 1e-2

# %% [markdown]
# ## A transformers model
#
# `tigon.patch` gives the modules of a NemotronH or Mamba2 model other forwards; parameters, caches, checkpoints and
# `generate` stay. `tigon.unpatch` takes them back. The weights here are random: `from_pretrained` is yours.

# %%
config = NemotronHConfig(
    vocab_size=256,
    hidden_size=64,
    layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    ssm_state_size=32,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    n_routed_experts=4,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
)
model = NemotronHForCausalLM(config).eval()
ids = torch.randint(0, 256, (2, 100))
with torch.no_grad():
    before = model(ids).logits
    report = tigon.patch(model)
    after = model(ids).logits
    texts = model.generate(ids[:, :20], max_new_tokens=8, do_sample=False, pad_token_id=0)
    tigon.unpatch(model)
    plain = model.generate(ids[:, :20], max_new_tokens=8, do_sample=False, pad_token_id=0)
print(f"patch: {report}")
print(f"  logits differ by at most {(after - before).abs().max():.1e}")
print(f"  its own generate gives the same tokens: {torch.equal(texts, plain)}")
assert (after - before).abs().max() < 1e-4 and torch.equal(texts, plain)

# %% [markdown]
# ## Which kernel, and why
#
# `tigon.explain(op, *arguments)` says which backend and which launch config a call would take, without running it.
# `arch` asks for a GPU that this machine need not have, and tensors on the meta device cost nothing, so a published
# shape can be asked about anywhere. `with tigon.backend(...)` (or `TIGON_BACKEND`) overrides the choice.

# %%
meta = {"device": "meta", "dtype": torch.bfloat16}
scan = (
    torch.empty(1, 8192, 128, 64, **meta),  # x (b,l,h,p)
    torch.empty(1, 8192, 128, **meta),  # dt (b,l,h)
    torch.empty(128, device="meta"),  # A (h)
    torch.empty(1, 8192, 8, 128, **meta),  # B (b,l,g,n)
    torch.empty(1, 8192, 8, 128, **meta),  # C
)
explanation = tigon.explain("ssd_scan", *scan, arch=90)
print(explanation)
assert explanation.backend == "triton" and explanation.launch

small = torch.randn(4, 64), torch.ones(64)
print(tigon.explain("rms_norm", *small))
with tigon.backend("reference"):
    print(tigon.explain("rms_norm", *small))

# %% [markdown]
# ## Generation
#
# `HybridLM` is Tigon's own model: presets by name, NemotronH checkpoints by `from_pretrained`. `tigon.generate` takes
# prompts of any lengths. With an MTP head (`tiny` has one) it drafts tokens and checks them in one pass; that changes
# the time, not the text. (Tutorial 4 trains such a head; this one is random, so few of its drafts are kept.)

# %%
lm = HybridLM("tiny").eval()
prompts = [torch.randint(0, lm.config.vocab_size, (n,)) for n in (5, 12, 30)]
with tigon.batch_invariant():  # not even rounding depends on how many tokens a pass has
    drafted, report = tigon.generate(
        lm, prompts, 16, draft_tokens=3, stop_ids=(), return_report=True
    )
    undrafted = tigon.generate(lm, prompts, 16, draft_tokens=0, stop_ids=())
print(f"generate: {report}")
print(f"  the same tokens without drafts: {all(map(torch.equal, drafted, undrafted))}")
assert all(map(torch.equal, drafted, undrafted))
assert [t.numel() for t in drafted] == [16, 16, 16]
