"""The table of support, column by column, for every public op: what the registry claims is tried out."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from installs import tigon_build

import tigon
from tigon import native
from tigon.bench.workloads import SMALL, Workload, make
from tigon.kernels.launch import PLANNERS
from tigon.ops import explain
from tigon.ops.quantized import QuantizedTensor
from tigon.registry import PUBLIC

OPS = pytest.mark.parametrize("op", PUBLIC)
HERE = Path(__file__).parent

# The size whose rows stand by themselves, where inputs can be cut by it; else the test that shows it.
ROWS = {
    "ssd_scan": "b",
    "ssd_update": "b",
    "causal_conv1d": "b",
    "causal_conv1d_update": "b",
    "gated_rms_norm": "t",
    "rms_norm": "t",
    "quantize_nvfp4": "m",
    "quantize_mxfp8": "m",
    "quantize_fp8": "m",
    "dequantize": "m",
    "scaled_mm": "m",
    "moe_route": "t",
    "sample": "b",
    "verify_draft": "b",
    "verify_tree": "b",
    "tree_ancestors": "b",
}
ROWS_SHOWN_BY = {
    "grouped_mm": "test_in_batch_invariant_mode_a_row_of_grouped_mm_and_its_gradient_do_not_feel_the_others",
    "moe_experts": "test_in_batch_invariant_mode_a_token_alone_is_the_token_among_many",
    "attention_token_scores": "test_a_sequences_scores_have_the_same_bits_in_any_batch_where_that_is_asked",
    "ssd_token_scores": "test_a_sequences_scores_have_the_same_bits_in_any_batch_where_that_is_asked",
    "select_tokens": "test_a_sequences_choice_does_not_depend_on_its_batch_mates",
    "compact_tokens": "test_rows_of_every_dtype_move_and_the_rest_is_fill",
}
OTHERS = ("float32", "bfloat16", "float16", "int16", "int32", "int64", "complex128")


def workload(op: str, dtype: str | None = None, device: str = "cpu", **sizes) -> Workload:
    dtype = dtype or PUBLIC[op].dtypes[0]
    return make(op, SMALL[op] | sizes, getattr(torch, dtype), device)


def run(work: Workload, function=None) -> tuple[torch.Tensor, ...]:
    """Of copies: some ops write their inputs."""
    inputs = {k: t.detach().clone() for k, t in work.inputs.items()}
    return tuple(t.detach().clone() for t in (function or work.run)(inputs))


def equal_bits(a, b) -> bool:
    narrow = a.element_size() == 1
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if narrow else torch.equal(a, b)


@OPS
def test_compiled_op_is_one_graph_and_gives_the_same(op):
    if not PUBLIC[op].compiles:
        pytest.fail(f"show here how {op} refuses to be compiled")
    work = workload(op)
    torch._dynamo.reset()
    compiled = torch.compile(work.run, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(work, compiled), run(work), strict=True):
        assert equal_bits(got, want)


@OPS
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_captured_op_reads_nothing_from_the_device(op, device, no_host_sync):
    assert PUBLIC[op].captures
    run(workload(op, device=device))


@OPS
def test_op_with_a_backward_has_gradients_and_any_other_has_none(op):
    work = workload(op)
    floats = {
        k: t
        for k, t in work.inputs.items()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    leaves = {k: t.detach().clone().requires_grad_() for k, t in floats.items()}
    if PUBLIC[op].backward is None:
        try:
            out = work.run({**work.inputs, **leaves})
        except RuntimeError as refused:  # by name, or by autograd: a state is updated in place
            assert "this op has none" in str(refused) or work.mutated
            return
        given = {id(t) for t in leaves.values()}
        assert not any(t.requires_grad for t in out if id(t) not in given)
        return
    out = work.run({**work.inputs, **leaves})
    sum(t.double().sum() for t in out if t.requires_grad).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves.values())
    assert any(t.grad.any() for t in leaves.values())


@OPS
def test_dtypes_of_the_table_run_and_others_are_refused(op):
    def call(dtype):
        """With the first argument, or the option that says it, in `dtype`."""
        work = workload(op)
        for option in {"dtype", "out_dtype"} & set(work.options):
            return replace(work, options={**work.options, option: dtype}).run()
        name, first = next(iter(work.inputs.items()))
        return work.run({**work.inputs, name: first.to(dtype)})

    listed = PUBLIC[op].dtypes
    for dtype in listed:
        run(workload(op, dtype)) if "float" in dtype else call(getattr(torch, dtype))
    for dtype in (getattr(torch, name) for name in OTHERS if name not in listed):
        if PUBLIC[op].takes == "any other of up to 8 bytes" and dtype.itemsize <= 8:
            call(dtype)
            continue
        with pytest.raises((TypeError, ValueError), match=r"dtype|over 8 bytes"):
            call(dtype)


@OPS
def test_every_architecture_of_the_table_has_a_launch_plan(op):
    work, info = workload(op), PUBLIC[op]
    for arch in info.archs:
        plan = explain(op, **work.call(), arch=arch)
        assert plan.backend == info.kind and plan.launch
        if info.kind == "triton":
            assert op in PLANNERS
            continue
        assert str(arch) in re.findall(r"\d+", tigon_build().ARCHS)
        table = (native.sources() / "common/kernel_table.cuh").read_text()
        for launch in plan.launch.values():
            assert f" {Path(launch.source).stem}_kernels()" in table


@OPS
@torch.no_grad()
def test_row_keeps_its_bits_without_its_batch_mates(op):
    claim = PUBLIC[op].invariant
    assert claim in ("always", "in its mode", "")
    if op in ROWS_SHOWN_BY or not claim:
        named = f"def {ROWS_SHOWN_BY.get(op)}("
        assert not claim or any(named in f.read_text() for f in HERE.glob("test_*.py"))
        return
    rows, some = 11, 4
    work = workload(op, **{ROWS[op]: rows})
    if op.startswith("quantize"):
        work.inputs["x"][0, 0] = 100  # the largest, so that the scale of the tensor is the same

    def cut(named):
        cuts = {
            k: t[:some]
            for k, t in named.items()
            if isinstance(t, torch.Tensor | QuantizedTensor) and t.shape[:1] == (rows,)
        }
        return {**named, **cuts}

    few = replace(work, inputs=cut(work.inputs), options=cut(work.options))
    with tigon.batch_invariant(claim == "in its mode"):
        whole, part = run(work), run(few)
    compared = [
        (a[:some], b) for a, b in zip(whole, part, strict=True) if a.dim() and len(a) == rows
    ]
    assert compared and all(equal_bits(a, b) for a, b in compared)
