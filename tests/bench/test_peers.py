"""Peers of `tigon bench`: each computes what the op computes, or says why not."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tigon.bench import verify, workloads
from tigon.bench.peers import find, torch_compiled, torch_eager
from tigon.bench.peers.eager import sampling
from tigon.bench.variants import variants
from tigon.bench.workloads import SMALL
from tigon.reference.sampling import Settings
from tigon.registry import OPS, PUBLIC

PEERS = {name: import_module(f"tigon.bench.peers.{name}") for name in find.NAMES}
TREES = {"verify_tree", "tree_ancestors"}  # models keep them on the host
STEPS = {(op, v) for op in ("ssd_update", "causal_conv1d_update") for v in variants(op)[1:]}
REFUSED = {
    "torch_eager": STEPS
    | {("quantize_nvfp4", "gradient"), ("quantize_nvfp4", "four-over-six")}
    | {("verify_draft", "block")},
    "transformers": STEPS | {("moe_experts", v) for v in ("before-down", "nvfp4", "fp8")},
}
CASES = {
    name: [(op, v) for op in PEERS[name].OPS for v in variants(op) if (op, v) not in refused]
    for name, refused in REFUSED.items()
}
COMPILED = [case for case in CASES["torch_eager"] if case[0] not in torch_compiled.LOOPS]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BYTES = 6e-3  # the share of codes that another order of roundings may change


def make(op, dtype=torch.float32, variant=None, **sizes):
    return workloads.make(op, SMALL[op] | sizes, dtype, variant=variant or None)


def agree(load, run, dtype):
    """Every output that the peer gives."""
    right, _ = verify.oracle(load, False)
    got, _ = verify.results(load, False, run)
    assert got and list(got) == list(right)[: len(got)]
    for name, t in got.items():
        assert t.shape == right[name].shape, name
        bytes_differ = load.op.startswith("quantize") and t.element_size() == 1
        limit = BYTES if bytes_differ else LIMIT[dtype] if t.is_floating_point() else 0
        assert verify.difference(t, right[name]) <= limit, name


def one(name, load):
    """The function of a peer."""
    ready, missing = find.find(load, [name], "cpu")
    assert not missing
    return ready[name]


def test_the_list_holds_every_peer_and_their_ops_exist():
    folder = Path(find.__file__).parent
    files = {f.stem for f in folder.glob("*.py") if "\nOPS = " in f.read_text()}
    assert files == set(find.NAMES)
    for peer in PEERS.values():
        assert set(peer.OPS) <= set(PUBLIC) and peer.PACKAGE


def test_every_op_has_a_peer_in_plain_torch_but_draft_trees():
    assert set(torch_eager.OPS) == set(PUBLIC) - TREES


@pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op,variant", CASES["torch_eager"])
def test_plain_torch_computes_the_same(op, variant, dtype):
    load = make(op, dtype, variant)
    agree(load, one("torch_eager", load), dtype)


def test_top_k_and_top_p_keep_the_tokens_that_the_op_keeps():
    logits = torch.randn(3, 1, 200)
    kept = Settings(None, 1.0, None, 50, None, 0.9).filtered(logits) > -torch.inf
    values, index = sampling._best(logits, 50, 0.9)
    assert 3 < kept.sum() < 150
    assert torch.equal(torch.zeros_like(kept).scatter_(-1, index, values > -torch.inf), kept)


@pytest.mark.parametrize("variant", ["token", "token-greedy-drafts", "strict"])
def test_verified_tokens_are_distributed_as_the_target_s(variant):
    load = make("verify_draft", variant=variant, b=20000, K=1, V=6)
    target, draft = torch.randn(2, 6)
    inputs = {"target_logits": target.expand(20000, 2, 6)}
    if variant == "token":
        inputs["draft_logits"] = draft.expand(20000, 1, 6)
    drawn = draft.softmax(-1).multinomial(20000, True)[:, None]
    inputs["draft_tokens"] = drawn.int() if variant == "token" else torch.full_like(drawn, 2).int()
    tokens, accepted = one("torch_eager", load)(inputs)
    found = tokens[:, 0].bincount(minlength=6) / 20000
    torch.testing.assert_close(found, target.softmax(-1), atol=0.02, rtol=0)
    assert torch.equal(accepted == 1, tokens[:, 1] >= 0) and 0 < accepted.sum() < 20000


@pytest.mark.parametrize("op,variant", CASES["transformers"])
def test_transformers_computes_the_same(op, variant):
    pytest.importorskip("transformers", minversion="5.23")
    load = make(op, torch.bfloat16, variant)
    agree(load, one("transformers", load), torch.bfloat16)


@pytest.mark.parametrize(
    "name,op,variant", [(n, *case) for n, cases in REFUSED.items() for case in sorted(cases)]
)
def test_what_a_peer_does_not_compute_is_told(name, op, variant):
    ready, missing = find.find(make(op, variant=variant), [name], "cpu")
    assert not ready and "not installed" not in missing[name]


@pytest.mark.parametrize("name", ["torch_eager", "transformers"])
@pytest.mark.parametrize("op", ["ssd_scan", "causal_conv1d", "gated_rms_norm", "rms_norm"])
def test_gradients_are_those_of_the_op(op, name):
    if name == "transformers":
        pytest.importorskip("transformers", minversion="5.23")
    load = make(op)
    run = one(name, load)
    found, grads = verify.results(load, True)
    other, _ = verify.results(load, True, run, grads)
    gradients = [k for k in found if k not in load.outputs]
    if name == "transformers" and op == "causal_conv1d":  # its final state is not to be had
        gradients = ["dweight", "dbias"]
    for k in gradients:
        assert verify.relative_rms(other[k], found[k]) < 1e-4, k


@pytest.mark.parametrize("op,variant", COMPILED)
def test_what_is_compiled_is_one_graph(op, variant, monkeypatch):
    """Traced, as compiling would take minutes."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile(f, backend="aot_eager", **o))
    monkeypatch.setattr(torch_compiled, "ON_CPU", torch_compiled.OPS)
    load = make(op, torch.bfloat16, variant)
    agree(load, one("torch_compiled", load), torch.bfloat16)


def test_what_is_compiled_computes_the_same():
    load = make("gated_rms_norm")
    run = one("torch_compiled", load)
    try:
        run(load.inputs)
    except Exception as error:
        assert "compiler" in str(error).lower()
        pytest.skip("no C++ compiler that inductor can use")
    agree(load, run, torch.float32)


def test_compiling_is_for_fusion_on_a_cpu():
    _, missing = find.find(make("sample"), ["torch_compiled"], "cpu")
    assert "not compiled on a CPU" in missing["torch_compiled"]
    _, missing = find.find(make("moe_experts"), ["torch_compiled"], "cpu")
    assert "counts on the host" in missing["torch_compiled"]


@pytest.mark.parametrize("op", ["ssd_update", "causal_conv1d_update"])
@pytest.mark.parametrize("name", ["torch_eager", "transformers"])
def test_states_of_the_inputs_that_came_are_changed(op, name):
    """Copies of the inputs take turns; each goes on from where it was."""
    if name == "transformers":
        pytest.importorskip("transformers", minversion="5.23")
    load = make(op)
    run = one(name, load)
    copies = [{k: t.clone() for k, t in load.inputs.items()} for _ in range(3)]
    for inputs in (copies[0], copies[1], copies[0]):
        run(inputs)
    load.run(copies[2])
    state = load.mutated
    torch.testing.assert_close(copies[1][state], copies[2][state])
    load.run(copies[2])
    torch.testing.assert_close(copies[0][state], copies[2][state])


def test_what_is_prepared_once_is_kept_for_each_inputs():
    asked = []
    prepared = find.once(lambda inputs: asked.append(inputs) or inputs["x"] + 1)
    first, second = {"x": 1}, {"x": 10}
    assert [prepared(i) for i in (first, second, first, second, dict(first))] == [2, 11, 2, 11, 2]
    assert len(asked) == 3


def test_what_transformers_would_take_is_out_of_sight_again(tmp_path, monkeypatch):
    for name in ("mamba_ssm", "torch_like"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "part.py").write_text("")
        for module in (name, f"{name}.part"):
            monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(find, "FOLDER", tmp_path)
    monkeypatch.setattr(find, "_hidden", {})
    with find.in_sight():
        first = import_module("mamba_ssm.part")
        import_module("torch_like.part")
    assert "mamba_ssm" not in sys.modules and "mamba_ssm.part" not in sys.modules
    assert find_spec("mamba_ssm") is None and "torch_like.part" in sys.modules
    with find.in_sight():
        assert import_module("mamba_ssm.part") is first
    for name in ("torch_like", "torch_like.part"):
        del sys.modules[name]


def test_half_an_import_leaves_nothing_in_sight(tmp_path, monkeypatch):
    folder = tmp_path / "causal_conv1d"
    folder.mkdir()
    (folder / "__init__.py").write_text("import causal_conv1d.part, no_cuda_part")
    (folder / "part.py").write_text("")
    monkeypatch.setattr(find, "FOLDER", tmp_path)
    monkeypatch.setattr(find, "_hidden", {})
    with pytest.raises(ImportError, match="no_cuda_part"), find.in_sight():
        import_module("causal_conv1d")
    assert not [name for name in sys.modules if name.startswith("causal_conv1d")]


@pytest.mark.parametrize("name", [n for n, p in PEERS.items() if hasattr(p, "DEVICES")])
def test_what_is_not_installed_is_told(name, monkeypatch):
    package = {"flash_linear_attention": "fla"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    load = make(PEERS[name].OPS[0])
    ready, missing = find.find(load, [name], "cuda")
    assert not ready and missing[name].startswith("not installed (")
    assert find.find(load, [name], "cpu")[1] == {name: "does not run on cpu"}


def test_an_op_without_plain_torch_is_told():
    assert set(OPS) > TREES
    _, missing = find.find(make("tree_ancestors"), ["torch_eager"], "cpu")
    assert missing == {"torch_eager": "has no tree_ancestors"}
