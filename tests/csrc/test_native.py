"""python/native/: plans, packed arguments, which way to the kernels is taken, and what is said without one."""

import ctypes
import importlib.util
import itertools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from decode_cases import ssd_plain

import tigon
from tigon import native
from tigon.native import arguments, loader, mamba2, moe, quantize, replay, sampling, tokens

FORMAT = {"int64": "q", "int": "i", "float": "f"}


@pytest.mark.parametrize(
    ("source", "name", "packed"),
    [
        ("ssd_update.cu", "SsdUpdate", mamba2.SSD_UPDATE),
        ("conv1d_update.cu", "Conv1dUpdate", mamba2.CONV1D_UPDATE),
        ("amax.cu", "Amax", quantize.AMAX),
        ("quantize_nvfp4.cu", "QuantizeNvfp4", quantize.QUANTIZE_NVFP4),
        ("quantize_fp8.cu", "QuantizeFp8", quantize.QUANTIZE_FP8),
        ("dequantize.cu", "Dequantize", quantize.DEQUANTIZE),
        ("moe_route.cu", "MoeRoute", moe.MOE_ROUTE),
        ("moe_sort.cu", "MoeHistogram", moe.MOE_HISTOGRAM),
        ("moe_sort.cu", "MoeCount", moe.MOE_COUNT),
        ("moe_sort.cu", "MoeSort", moe.MOE_SORT),
        ("moe_sums.cu", "MoeSums", moe.MOE_SUMS),
        ("moe_sums.cu", "MoeJoin", moe.MOE_JOIN),
        ("moe_route_backward.cu", "MoeRouteBackward", moe.MOE_ROUTE_BACKWARD),
    ],
)
def test_packed_format_is_the_struct_of_the_source(source, name, packed):
    expanded = re.sub(r"(\d+)(\w)", lambda m: m[2] * int(m[1]), packed.format.lstrip("="))
    assert expanded == codes_of(source, name)


def codes_of(source: str, name: str) -> str:
    """The members of a struct in csrc/<source>, as the codes of Python's struct; a Source's stand in its place."""
    text = (native.sources() / source).read_text()
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)}};", text, re.S)[1])
    codes = ""
    for kind, names in re.findall(r"(?:const )?(\w+\*?) ([\w, ]+);", body):
        if kind == "Source":
            codes += codes_of("common/source.cuh", "Source")
        else:
            codes += ("Q" if kind.endswith("*") else FORMAT[kind]) * len(names.split(","))
    return codes


def test_plan_fits_every_shape_that_is_allowed():
    for n in range(1, 257):
        for p in (1, 2, 3, 17, 64, 80, 100, 255, 256):
            for m in (1, 16):
                plan = mamba2.plan_ssd_update(3, m, 5, p, n, "bf16", "f16", False)
                rows = plan.block // mamba2.lanes_of(n) * 2
                assert plan.block % 32 == 0 and m <= plan.block <= 128
                assert plan.grid[0] == 15 and (plan.grid[1] - 1) * rows < p <= plan.grid[1] * rows
                assert mamba2.lanes_of(n) * 16 >= n
                assert plan.shared_bytes <= 48 * 1024  # more would need an opt-in


def test_quantizer_plans_cover_the_matrix_within_every_chips_shared_memory():
    """99 KB is what sm_120 gives a block."""
    for m, k in [(1, 1), (128, 128), (129, 4096), (1, 2**30), (2**30, 1)]:
        tiles = -(-m // 128) * -(-k // 128)
        assert quantize.plan_amax(m, k, "bf16").grid == (tiles, 1)
        for rounding in range(3):
            for square in (False, True):
                plan = quantize.plan_quantize_nvfp4(m, k, "f32", rounding, square, True)
                assert plan.grid == (tiles, 1) and plan.shared_bytes <= 99 * 1024
        assert quantize.plan_quantize_fp8(m, k, "f32", True).grid == (tiles, 1)
        plan = quantize.plan_dequantize(m, k, "bf16", "Nvfp4")
        assert plan.grid[0] * plan.block * 32 >= m * k
    for refused in ((2**31 - 1, 1), (1, 2**31 - 1), (2**24, 2**24)):
        with pytest.raises(ValueError, match="quantize_fp8"):
            quantize.plan_quantize_fp8(*refused, "bf16", False)
    for m, k in ((2**31 - 2047, 1), (1, 2**31 - 2047)):  # a block reaches past 2^31 - 1
        with pytest.raises(ValueError, match="dequantize"):
            quantize.plan_dequantize(m, k, "bf16", "Nvfp4")


def test_plan_depends_on_neither_batch_nor_tokens():
    """A row's lanes and order of sums are set by n, p and the formats alone."""
    one = mamba2.plan_ssd_update(1, 1, 8, 64, 128, "bf16", "f32", True)
    many = mamba2.plan_ssd_update(999, 16, 8, 64, 128, "bf16", "f32", True)
    assert (one.kernel, one.block, one.grid[1]) == (many.kernel, many.block, many.grid[1])


def test_plan_refuses_more_blocks_than_a_grid_has():
    with pytest.raises(ValueError, match="ssd_update"):
        mamba2.plan_ssd_update(2**24, 1, 128, 64, 128, "bf16", "f32", True)
    with pytest.raises(ValueError, match="conv1d_update"):
        mamba2.plan_conv1d_update(2**31, 1, "bf16", "f32")


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_explain_shows_the_launch_of_both_ops(arch):
    """Without a GPU and without running anything."""
    x, dt, A = torch.empty(4, 2, 8, 64), torch.empty(4, 2, 8), torch.empty(8)
    B = torch.empty(4, 2, 2, 128)
    told = tigon.explain("ssd_update", torch.empty(5, 8, 64, 128), x, dt, A, B, B, arch=arch)
    wanted = mamba2.plan_ssd_update(4, 2, 8, 64, 128, "f32", "f32", True)
    assert told.launch == {"ssd_update": wanted}
    x, window = torch.empty(4, 2, 96), torch.empty(5, 96, 3)
    told = tigon.explain("causal_conv1d_update", x, window, torch.empty(96, 4), arch=arch)
    assert told.launch == {"conv1d_update": mamba2.plan_conv1d_update(4, 96, "f32", "f32")}


def test_explain_shows_the_launches_of_the_quantizers():
    """A pass for the amax where it is not known, then the instance that the options take."""
    x = torch.empty(300, 512, dtype=torch.bfloat16)
    told = tigon.explain("quantize_nvfp4", x, rounding="stochastic", seed=1, axis="both", arch=90)
    wanted = quantize.plan_quantize_nvfp4(300, 512, "bf16", 1, False, True)
    assert told.launch == {"amax": quantize.plan_amax(300, 512, "bf16"), "quantize_nvfp4": wanted}
    told = tigon.explain("quantize_nvfp4", x, four_over_six="mae", amax=torch.ones(()), arch=90)
    assert told.launch == {"quantize_nvfp4": quantize.plan_quantize_nvfp4(300, 512, "bf16", 2)}
    for granularity, passes in (("tensor", 2), ("row", 2), ("1x128", 1), ("128x128", 1)):
        told = tigon.explain("quantize_fp8", x, granularity=granularity, arch=90)
        assert len(told.launch) == passes
        assert told.launch["quantize_fp8"] == quantize.plan_quantize_fp8(300, 512, "bf16", False)
    e5m2 = tigon.explain("quantize_mxfp8", x, dtype=torch.float8_e5m2, arch=90)
    assert e5m2.launch == {"quantize_fp8": quantize.plan_quantize_fp8(300, 512, "bf16", True)}
    told = tigon.explain("dequantize", tigon.quantize_nvfp4(x), arch=90)
    assert told.launch == {"dequantize": quantize.plan_dequantize(300, 512, "f32", "Nvfp4")}


def test_host_library_refuses_unknown_kernels_and_sizes(host_library):
    library = native.HostLibrary(host_library)
    launch = mamba2.plan_conv1d_update(1, 3, "f32", "f32")
    with pytest.raises(RuntimeError, match="5 bytes"):
        library.launch(launch, 0, 0, b"12345")


def test_cpu_tensors_without_host_library_say_why():
    native.use_host_library(None)
    with pytest.raises(RuntimeError, match="host build"):
        native.ssd_update(**ssd_plain())


@pytest.fixture
def fresh(monkeypatch):
    """No memory of earlier searches, and a say in what can be found."""
    found = {}
    real = importlib.util.find_spec

    def find_spec(name, *rest):
        return found[name] if name in found else real(name, *rest)

    monkeypatch.setattr(loader.importlib.util, "find_spec", find_spec)
    for search in (loader.load, loader._extension):
        search.cache_clear()
    yield found
    monkeypatch.undo()
    for search in (loader.load, loader._extension):
        search.cache_clear()


def fake_extension(monkeypatch, fresh) -> list:
    """A tigon._C that records its launches."""
    launches = []
    module = SimpleNamespace(
        built_archs="80, 90a",
        nvcc_version="13.0",
        cxx_compiler="GNU 12",
        kernels=dict,
        find=lambda name: 7,
        launch=lambda *arguments: launches.append(arguments),
    )
    fresh["tigon._C"] = module
    monkeypatch.setitem(sys.modules, "tigon._C", module)
    return launches


def test_extension_comes_first(fresh, monkeypatch):
    launches = fake_extension(monkeypatch, fresh)
    fresh["cupy"] = object()
    plan = mamba2.plan_ssd_update(2, 1, 3, 64, 128, "bf16", "f32", True)
    native.load().launch(plan, 1, 99, b"arguments")
    assert launches == [(7, 6, 2, 128, plan.shared_bytes, 1, 99, b"arguments")]
    assert native.available() == (True, "the extension tigon._C, built for 80, 90a")
    assert native.status()["backend"] == "extension"


def test_cupy_compiles_the_one_instance_once_a_device(fresh, monkeypatch, tmp_path):
    """With a CuPy that records: the options it is given, and the bytes that a launch points to."""
    modules, kernels, launched = [], [], []

    def raw_module(**options):
        modules.append(options)
        kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=1234))
        kernel.max_dynamic_shared_size_bytes = 48 * 1024
        kernels.append(kernel)
        return SimpleNamespace(get_function=lambda name: kernel)

    def launch_kernel(*arguments):
        address = ctypes.cast(arguments[-2], ctypes.POINTER(ctypes.c_void_p))[0]
        launched.append((arguments[:-2], ctypes.string_at(address, 4)))

    class Device:
        def __init__(self, index):
            assert index == 1

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    driver = SimpleNamespace(launchKernel=launch_kernel)
    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=Device, driver=driver), RawModule=raw_module)
    fresh |= {"tigon._C": None, "cupy": cupy}
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(loader, "cuda_headers", lambda: tmp_path)
    plan = mamba2.plan_ssd_update(2, 1, 3, 64, 128, "bf16", "f32", True)
    for _ in range(2):
        native.load().launch(plan, 1, 99, b"\1\2\3\4")
    assert [m["name_expressions"] for m in modules] == [(plan.kernel,)]
    assert f"-I{native.sources()}" in modules[0]["options"]
    assert launched == [((1234, 6, 2, 1, 128, 1, 1, plan.shared_bytes, 99), b"\1\2\3\4")] * 2
    assert native.available()[0] and native.status()["backend"] == "cupy"
    wide = quantize.plan_quantize_nvfp4(128, 128, "f32", 0)
    native.load().launch(wide, 1, 99, b"\1\2\3\4")
    assert [k.max_dynamic_shared_size_bytes for k in kernels] == [48 * 1024, wide.shared_bytes]


def test_without_extension_and_cupy_the_reason_and_the_fix_are_given(fresh):
    fresh |= {"tigon._C": None, "cupy": None}
    usable, reason = native.available()
    assert not usable and "not built" in reason and "pip install" in reason
    with pytest.raises(RuntimeError, match="pip install"):
        native.load()
    assert native.status()["fix"] and native.status()["why"]


def test_broken_extension_is_told_from_a_missing_one(fresh, monkeypatch):
    fresh |= {"tigon._C": object(), "cupy": None}
    monkeypatch.setitem(sys.modules, "tigon._C", None)  # importing it raises ImportError
    assert "cannot be loaded" in native.available()[1]


def test_status_needs_neither_torch_nor_cupy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['cupy'] = None\n"
        "from tigon import native; native.status(); native.available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_extension_of_this_build_has_every_kernel_that_is_planned():
    """All formats by all formats; and the argument sizes of the binary are those that are packed."""
    module, why = loader._extension()
    if module is None:
        pytest.skip(why)
    sizes = module.kernels()
    for io in arguments.FORMATS:
        for state in arguments.FORMATS:
            conv = mamba2.plan_conv1d_update(1, 8, io, state).kernel
            assert sizes.pop(conv) == mamba2.CONV1D_UPDATE.size
        for state, vectors in itertools.product((*arguments.FORMATS, "i8", "e4m3"), (True, False)):
            ssd = mamba2.plan_ssd_update(1, 1, 1, 8, 8, io, state, vectors).kernel
            assert sizes.pop(ssd) == mamba2.SSD_UPDATE.size
            ssd = replay.plan_ssd_replay(1, 1, 1, 8, 8, 16, False, io, state, vectors).kernel
            assert sizes.pop(ssd) == replay.SSD_REPLAY.size
        assert sizes.pop(replay.plan_conv1d_replay(1, 8, io).kernel) == replay.CONV1D_REPLAY.size
        assert sizes.pop(quantize.plan_amax(1, 1, io).kernel) == quantize.AMAX.size
        for rounding in range(3):
            nvfp4 = quantize.plan_quantize_nvfp4(1, 1, io, rounding).kernel
            assert sizes.pop(nvfp4) == quantize.QUANTIZE_NVFP4.size
        for e5m2 in (False, True):
            fp8 = quantize.plan_quantize_fp8(1, 1, io, e5m2).kernel
            assert sizes.pop(fp8) == quantize.QUANTIZE_FP8.size
        for codes in ("Nvfp4", *quantize.FP8):
            values = quantize.plan_dequantize(1, 1, io, codes).kernel
            assert sizes.pop(values) == quantize.DEQUANTIZE.size
    for items in (0, *moe.ITEMS):
        assert sizes.pop(moe.plan_route(1, 32 * items or 4096)[0].kernel) == moe.MOE_ROUTE.size
    for plan, packed in (
        (moe.plan_histogram(1, 1), moe.MOE_HISTOGRAM),
        (moe.plan_count(1), moe.MOE_COUNT),
        (moe.plan_sort(1, 1), moe.MOE_SORT),
        (moe.plan_sums(1, 1), moe.MOE_SUMS),
        (moe.plan_join(1, 1), moe.MOE_JOIN),
        (moe.plan_backward(1, 1), moe.MOE_ROUTE_BACKWARD),
    ):
        assert sizes.pop(plan.kernel) == packed.size
    threshold, place = tokens.plan_select_tokens(1, 1)
    assert sizes.pop(threshold.kernel) == tokens.SELECT_THRESHOLD.size
    assert sizes.pop(place.kernel) == tokens.PLACE_TOKENS.size
    assert sizes.pop(tokens.plan_gather_rows(1, ((16, 1),)).kernel) == tokens.GATHER_ROWS.size
    assert sizes.pop(sampling.plan_tree_links(1).kernel) == sampling.TREE_LINKS.size
    plans = {}
    for io in arguments.FORMATS:
        blocks = (2, 3, 2, 9000, io, sampling.BLOCK_RULE, True, True, False)
        trees = (2, 3, 0, 9000, io, sampling.STRICT, False, True, True)
        for options in (blocks, trees):
            plans |= {p.kernel: 0 for p in sampling.plan_sampling(*options).values()}
    assert {name: sampling.SAMPLING.size for name in plans if "tree_links" not in name} == sizes


def test_extension_without_a_gpu_raises_what_cuda_says():
    module, why = loader._extension()
    if module is None or torch.cuda.is_available():
        pytest.skip(why or "there is a GPU")
    launch = mamba2.plan_conv1d_update(1, 3, "f32", "f32")
    with pytest.raises(RuntimeError, match="CUDA"):
        native.Extension(module).launch(launch, 0, 0, bytes(mamba2.CONV1D_UPDATE.size))
