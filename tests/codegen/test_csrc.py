"""nvcc's verdict on csrc/ for every architecture: no spills, no stack, and 16-byte access to the state."""

import ctypes
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import host_build
import pytest

from tigon import native
from tigon.native import mamba2, moe, quantize, replay, sampling, tokens

ARCHS = ["80", "90a", "100a", "120a"]
SOURCES = host_build.KERNELS
INSTANCES = {
    "amax": 3,
    "conv1d_replay": 3,
    "conv1d_update": 9,
    "dequantize": 9,
    "logit_stats": 6,
    "gather_rows": 1,
    "moe_route": 5,
    "moe_route_backward": 1,
    "moe_sort": 3,
    "moe_sums": 2,
    "quantize_fp8": 6,
    "quantize_nvfp4": 9,
    "select_tokens": 2,
    "ssd_replay": 30,
    "ssd_update": 30,
    "verify_draft": 7,
    "verify_tree": 2,
}


# Every kernel of sampling: blocks of drafts, cut to top-k, and a tree.
SAMPLING = {
    **sampling.plan_sampling(2, 3, 2, 9000, "bf16", sampling.BLOCK_RULE, True, True, False),
    **sampling.plan_sampling(2, 3, 0, 9000, "bf16", sampling.STRICT, False, True, True),
}


def cuobjdump() -> str | None:
    """The system's, or the one in Triton's wheel."""
    spec = find_spec("triton")
    wheel = spec and Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(wheel) if wheel and wheel.is_file() else None)


def nvcc_here() -> str:
    """The system's nvcc, or that of a wheel; else a skip."""
    folders = (*sys.path, f"{sys.prefix}/peers")  # the last is where `make env` puts a wheel of it
    wheels = (Path(folder) / "nvidia/cu13/bin/nvcc" for folder in folders)
    nvcc = shutil.which("nvcc") or next(filter(Path.is_file, wheels), None)
    if nvcc is None:
        pytest.skip("no nvcc: `make env`, or a CUDA toolkit")
    return str(nvcc)


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request):
    """source stem -> (cubin, what ptxas said), compiled as CMakeLists.txt does for this architecture."""
    nvcc, arch = nvcc_here(), request.param
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if f"sm_{arch.rstrip('a')}" not in known.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-cubin"]
    headers = [path.read_bytes() for path in sorted((host_build.ROOT / "csrc/common").glob("*"))]
    results = {}
    for source in SOURCES:
        key = host_build.digest(version, str(command).encode(), source.read_bytes(), *headers)
        cubin = host_build.BUILDS / f"{source.stem}-{arch}-{key}.cubin"
        log = cubin.with_suffix(".log")
        if not log.exists():
            host_build.BUILDS.mkdir(parents=True, exist_ok=True)
            arguments = [f"-I{host_build.ROOT / 'csrc'}", str(source), "-o", str(cubin)]
            done = subprocess.run([*command, *arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            log.write_text(done.stderr)
        results[source.stem] = cubin, log.read_text()
    return results


@pytest.mark.parametrize("stem", [source.stem for source in SOURCES])
def test_no_instance_spills_or_has_a_stack(compiled, stem):
    log = compiled[stem][1]
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    assert len(kernels) == len(frames) == INSTANCES[stem]
    assert {k: f for k, f in zip(kernels, frames) if f != ("0", "0", "0")} == {}


def test_ssd_update_keeps_five_blocks_on_a_multiprocessor(compiled):
    """At 16-byte access: 65,536 registers for 5 x 128 threads, the bytes in flight that HBM needs."""
    log = compiled["ssd_update"][1]
    used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", log))
    assert {k: int(r) for k, r in used.items() if "Lb1E" in k and int(r) > 96} == {}


def functions(cubin: Path) -> dict[str, str]:
    """SASS by the mangled name of the kernel."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: it comes with Triton's wheel and with the CUDA toolkit")
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    return dict(re.findall(r"Function : (\w+)\n((?:(?!Function :)(?:.|\n))*)", sass.stdout))


def test_ssd_update_moves_the_state_16_bytes_at_a_time(compiled):
    found = functions(compiled["ssd_update"][0])
    vector = {name: body for name, body in found.items() if "Lb1E" in name}
    assert len(vector) == 15
    for name, body in vector.items():
        # Two rows of 16 elements a lane; staging loads B and C 16 bytes at a time besides.
        assert len(re.findall(r"LDG\.E\.128", body)) >= vectors_of_state(name) + 2, name
        assert len(re.findall(r"STG\.E\.128", body)) == vectors_of_state(name), name


def vectors_of_state(kernel: str) -> int:
    """16-byte accesses to the state of a lane, by the mangled name."""
    if re.search(r"(half|bfloat16|S1_)Lb1E", kernel):
        return 4
    return 2 if re.search(r"(e4m3E|I.*a)Lb1E", kernel) else 8


def test_ssd_replay_stores_the_state_in_one_place_and_keeps_four_blocks_on_a_multiprocessor(
    compiled,
):
    """16-byte accesses, all loads of the state before the first barrier; the second fold shares the code of the
    first."""
    log = compiled["ssd_replay"][1]
    used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", log))
    assert {k: int(r) for k, r in used.items() if "Lb1E" in k and int(r) > 128} == {}
    for name, body in functions(compiled["ssd_replay"][0]).items():
        if "Lb1E" not in name:
            continue
        before, *_ = body.split("BAR.SYNC")
        assert len(re.findall(r"LDG\.E\.128", before)) >= vectors_of_state(name), name
        assert len(re.findall(r"STG\.E\.128", body)) == vectors_of_state(name), name


def test_quantizers_keep_their_blocks_on_a_multiprocessor(compiled):
    """Of 256 threads: four, or three where rounding needs more registers or fp32 tiles are in the way."""
    for stem in ("amax", "quantize_nvfp4", "quantize_fp8", "dequantize"):
        log = compiled[stem][1]
        used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", log))
        three = {k for k in used if "Li1E" in k or "Li2E" in k or "quantize_fp8If" in k}
        most = {k: 80 if k in three else 64 for k in used}
        assert {k: r for k, r in used.items() if int(r) > most[k]} == {}


@pytest.mark.parametrize("stem", ["amax", "quantize_nvfp4", "quantize_fp8"])
def test_quantizers_have_four_loads_of_16_bytes_in_flight(compiled, stem):
    """And a whole run's codes leave in one store: 8 bytes of NVFP4, 16 of FP8."""
    store = {"quantize_nvfp4": r"STG\.E\.64", "quantize_fp8": r"STG\.E\.128"}.get(stem)
    for name, body in functions(compiled[stem][0]).items():
        # Between a store into the tile and the next, in the text.
        assert max(len(re.findall(r"LDG\.E\.128", part)) for part in body.split("STS")) >= 4, name
        assert store is None or len(re.findall(store, body)) == 1, name


def test_conversions_of_the_chip_are_used(compiled):
    """E2M1 from sm_100a on, E4M3 and E5M2 from sm_90 on; the same bytes are computed where they are missing."""
    cubin = compiled["quantize_nvfp4"][0]
    arch = int(re.search(r"-(\d+)a?-", cubin.name)[1])
    for name, body in functions(cubin).items():
        stochastic = "Li1E" in name
        assert bool(re.search(r"F2FP\S*E2M1", body)) == (arch >= 100 and not stochastic), name
    for name, body in functions(compiled["quantize_fp8"][0]).items():
        assert bool(re.search(r"F2FP\S*E[45]M[32]", body)) == (arch >= 90), name


@pytest.mark.parametrize("stem", ["amax", "quantize_nvfp4", "quantize_fp8", "dequantize"])
def test_no_rounding_of_a_quantizer_is_left_to_the_compiler(stem):
    """Every fp32 product and sum names its rounding, so that none is fused; only stochastic rounding's is, where the
    product is exact."""
    command = [nvcc_here(), "-std=c++17", "-O3", "-arch=compute_80", "-ptx", "-o", "-"]
    source = host_build.ROOT / "csrc" / f"{stem}.cu"
    ptx = subprocess.run(
        [*command, f"-I{host_build.ROOT / 'csrc'}", str(source)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    entries = re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.S)
    assert len(entries) == INSTANCES[stem]
    for name, body in entries:
        assert re.findall(r"\b(?:add|sub|mul|mad)(?:\.ftz)?\.f32", body) == [], name
        fused = len(re.findall(r"\bfma\.\S*f32", body))
        assert fused == (16 if "Li1E" in name else 0), name


def test_moe_route_keeps_two_blocks_on_a_multiprocessor(compiled):
    """Of 512 threads, up to 512 experts; the loads of a token's logits are all on their way before one is needed."""
    log = compiled["moe_route"][1]
    used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", log))
    assert {k: r for k, r in used.items() if int(r) > (128 if "Li32E" in k else 64)} == {}
    for name, body in functions(compiled["moe_route"][0]).items():
        items = int(re.search(r"Li(\d+)E", name)[1])
        assert max(part.count("LDG.E ") for part in body.split("MUFU.EX2")) >= items, name


def test_sampling_reads_logits_16_bytes_at_a_time_and_keeps_its_blocks(compiled):
    """Four loads on their way in the pass over everything, two of each side where masses are summed; registers for four
    blocks of 256 threads there (three for masses, two for draws, which compute more than they read)."""
    for stem in ("logit_stats", "verify_draft"):
        cubin, log = compiled[stem]
        used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", log))
        most = {"logit_stats": 64, "logit_cuts": 64, "block_masses": 80, "draw_tokens": 128}
        for name, registers in used.items():
            kernel = next((k for k in most if k in name), None)
            assert kernel is None or int(registers) <= most[kernel], name
        for name, body in functions(cubin).items():
            loads = next((n for k, n in (("logit_stats", 4), ("block_masses", 4)) if k in name), 0)
            assert len(re.findall(r"LDG\.E\.128", body)) >= loads, name


def test_rows_are_moved_16_bytes_at_a_time(compiled):
    """Four loads on their way before the first store, where rows allow."""
    (body,) = functions(compiled["gather_rows"][0]).values()
    assert max(part.count("LDG.E.128") for part in body.split("STG")) >= 4


def test_selection_has_four_loads_in_flight(compiled):
    """A block has a sequence for itself: what it waits for is latency."""
    (body,) = (
        b for name, b in functions(compiled["select_tokens"][0]).items() if "threshold" in name
    )
    assert max(part.count("LDG.E ") for part in body.split("ATOMS")[1:]) >= 4


def nvrtc() -> ctypes.CDLL | None:
    """The library of the nvidia-cuda-nvrtc wheel (torch's CUDA builds bring it) or of a toolkit."""
    wheels = [Path(folder) / "nvidia" for folder in sys.path]
    homes = [native.cuda_headers().parent] if native.cuda_headers() else []
    for folder in (*wheels, *homes):
        for library in sorted(folder.rglob("libnvrtc.so*"), reverse=True):
            for builtins in library.parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(
                    str(builtins)
                )  # it looks for them by name, and a wheel's folder is not searched
            return ctypes.CDLL(str(library))
    return None


@pytest.mark.parametrize("arch", [arch.rstrip("a") for arch in ARCHS])
@pytest.mark.parametrize(
    "plan",
    [
        mamba2.plan_ssd_update(1, 1, 1, 64, 128, "bf16", "f32", True),
        mamba2.plan_conv1d_update(1, 64, "f16", "bf16"),
        replay.plan_ssd_replay(1, 4, 1, 64, 128, 16, False, "bf16", "e4m3", True),
        replay.plan_conv1d_replay(1, 64, "f16"),
        quantize.plan_amax(64, 64, "bf16"),
        quantize.plan_quantize_nvfp4(64, 64, "bf16", quantize.FOUR_OVER_SIX),
        quantize.plan_quantize_fp8(64, 64, "f16", True),
        quantize.plan_dequantize(64, 64, "bf16", "E4M3"),
        moe.plan_route(64, 512)[0],
        moe.plan_sort(4, 512),
        moe.plan_sums(4, 512),
        moe.plan_backward(64, 512),
        *SAMPLING.values(),
        tokens.plan_select_tokens(4096, 2)[0],
        tokens.plan_gather_rows(64, ((8192, 16),)),
    ],
    ids=lambda plan: plan.kernel,
)
def test_nvrtc_compiles_the_instance_that_is_named(plan, arch):
    """As CuPy does at run time: same text, same name; no GPU is needed for that."""
    library, headers = nvrtc(), native.cuda_headers()
    if library is None or headers is None:
        pytest.skip("no NVRTC or no CUDA headers: pip install 'tigon[dev]'")
    program, lowered = ctypes.c_void_p(), ctypes.c_char_p()
    text = (native.sources() / plan.source).read_bytes()
    library.nvrtcCreateProgram(ctypes.byref(program), text, plan.source.encode(), 0, None, None)
    library.nvrtcAddNameExpression(program, plan.kernel.encode())
    options = [f"-arch=sm_{arch}", "-std=c++17", f"-I{native.sources()}", f"-I{headers}"]
    packed = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    status = library.nvrtcCompileProgram(program, len(options), packed)
    log = ctypes.create_string_buffer(100_000)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    name = plan.kernel.encode()
    assert library.nvrtcGetLoweredName(program, name, ctypes.byref(lowered)) == 0
    assert lowered.value.startswith(b"_ZN5tigon")
