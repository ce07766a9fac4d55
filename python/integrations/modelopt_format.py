"""nvidia-modelopt's Hugging Face layout, as data: which tensors a quantized layer stores, and how the config names it.

A linear layer (n,k) of one quant_algo stores, beside `weight`:

    NVFP4, W4A16_NVFP4         weight u8 (n,k/2)    weight_scale e4m3 (n,k/16)   weight_scale_2 fp32 () = amax/2688
    W4A8_NVFP4_FP8             the same, with weight_scale_2 = amax/448 and, as modelopt's preset has it, groups of 32
    FP8                        weight e4m3 (n,k)    weight_scale fp32 () = amax/448
    FP8_PER_CHANNEL_PER_TOKEN  weight e4m3 (n,k)    weight_scale fp32 (n)
    FP8_PB_WO                  weight e4m3 (n,k)    weight_scale fp32 (ceil(n/128), ceil(k/128))
    MXFP8                      weight e4m3 (n,k)    weight_scale u8 (n,k/32), E8M0

and, where activations are scaled statically, `input_scale` fp32 (): their amax over 2688 (NVFP4) or 448 (FP8). All
scales decode: value = code * scale. Element 2i of an NVFP4 row is the low nibble of byte i.

`hf_quant_config.json` holds {"producer", "quantization": {quant_algo, group_size, kv_cache_quant_algo,
exclude_modules | quantized_layers}}; config.json mirrors it under `quantization_config` with `ignore` for
exclude_modules. Source: github.com/NVIDIA/Model-Optimizer, modelopt/torch/export/{quant_utils,convert_hf_config}.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

QUANT_FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
E4M3_MAX, NVFP4_RANGE = 448.0, 2688.0  # 2688 = 6 * 448
LAYER_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
CACHE_SCALES = (".k_scale", ".v_scale")


@dataclass(frozen=True)
class Algorithm:
    """What one quant_algo stores: the layer that takes it, its option, and the divisors of its amaxes."""

    layer: str  # "nvfp4" or "fp8": NVFP4Linear(activation=option) or FP8Linear(scaling=option)
    option: str
    group: int | None = None  # elements of a block scale along k
    weight_range: float = E4M3_MAX  # amax = (weight_scale_2 or weight_scale) * weight_range
    input_range: float | None = None  # None: no static activation scale


ALGORITHMS = {
    "NVFP4": Algorithm("nvfp4", "nvfp4", 16, NVFP4_RANGE, NVFP4_RANGE),
    "W4A16_NVFP4": Algorithm("nvfp4", "bf16", 16, NVFP4_RANGE),
    "W4A8_NVFP4_FP8": Algorithm("nvfp4", "fp8", 16, E4M3_MAX, E4M3_MAX),
    "FP8": Algorithm("fp8", "tensor", input_range=E4M3_MAX),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm("fp8", "row"),
    "FP8_PB_WO": Algorithm("fp8", "block"),
    "MXFP8": Algorithm("fp8", "mxfp8", 32),
}
REFUSED = {
    "NVFP4_AWQ": "its layers multiply activations by a pre_quant_scale first",
    "NVFP4_SVD": "its layers add a low-rank product",
    "W4A8_MXFP4_FP8": "its weights are MXFP4",
    "W4A16_AWQ": "its weights are int4",
    "W4A8_AWQ": "its weights are int4",
    "W8A16": "its weights are int8",
    "W8A8_SQ_PER_CHANNEL": "its weights are int8",
}


@dataclass(frozen=True)
class LayerFormat:
    """The format of one layer: an algorithm's name and its group size."""

    algo: str
    group_size: int | None = None

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.algo]

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, Shape]]:
        """Part -> (dtype as safetensors writes it, shape) of a layer (n,k), input_scale included where it is static."""
        algorithm = self.algorithm
        if algorithm.layer == "nvfp4":
            group, k = self.group_size or 16, -(-k // 16) * 16
            parts = {
                "weight": ("U8", (n, k // 2)),
                "weight_scale": ("F8_E4M3", (n, -(-k // group))),
                "weight_scale_2": ("F32", ()),
            }
        else:
            scale: dict[str, tuple[str, Shape]] = {
                "tensor": ("F32", ()),
                "row": ("F32", (n,)),
                "block": ("F32", (-(-n // 128), -(-k // 128))),
                "mxfp8": ("U8", (n, -(-k // 32))),
            }
            parts = {"weight": ("F8_E4M3", (n, k)), "weight_scale": scale[algorithm.option]}
        if algorithm.input_range is not None:
            parts["input_scale"] = ("F32", ())
        return parts


def layer_format(values: dict[str, Any]) -> LayerFormat:
    """From {"quant_algo", "group_size"}; ValueError for an algorithm that Tigon does not have, by name."""
    name = values.get("quant_algo")
    algo = str(name).upper()  # modelopt writes fp8_pb_wo in lower case
    if algo not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        why = f"not supported, {REFUSED[algo]}" if algo in REFUSED else "not known"
        raise ValueError(f"quant_algo={name!r} is {why}; supported: {known}, {MIXED}")
    own = ALGORITHMS[algo].group
    sizes = (16, 32) if ALGORITHMS[algo].layer == "nvfp4" else (own,)
    group = (values.get("group_size") or own) if own else None
    if group is not None and group not in sizes:
        raise ValueError(f"{algo}: group_size={group}, expected {' or '.join(map(str, sizes))}")
    if values.get("pre_quant_scale"):
        raise ValueError(f"{algo} with pre_quant_scale is not supported, {REFUSED['NVFP4_AWQ']}")
    return LayerFormat(algo, group)


def mend_name(name: str) -> str:
    """A module name or pattern without the marker that modelopt 0.47 leaves in some.

    Its exporter appends `.<NUL>modelopt_name_sentinel`, maps names and cuts the marker off again; under transformers
    5.23 the map also changes the marker, so that it stays: `lm_head.<NUL>backbone.pt_name_sentinel`.
    """
    return re.sub(r"\.?\x00[^*]*?(\.?\*)?$", r"\1", name)


def matches(pattern: str, module: str) -> bool:
    """Whether an exclude pattern means this module: a wildcard, its name, or that of a module that holds it."""
    return fnmatchcase(module, pattern) or module == pattern or module.startswith(pattern + ".")


@dataclass(frozen=True)
class QuantConfig:
    """Which layers are quantized, and how.

    layers: format by module name; None where `every` applies to all linear layers but the excluded ones.
    damaged: names that carried modelopt's marker (see `mend_name`).
    """

    every: LayerFormat | None = None
    layers: dict[str, LayerFormat] | None = None
    exclude: tuple[str, ...] = ()
    kv_cache: str | None = None
    producer: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    def excluded_by(self, module: str) -> str | None:
        """The pattern that keeps a module unquantized."""
        return next((p for p in self.exclude if matches(p, module)), None)

    def of(self, module: str) -> LayerFormat | None:
        """The format of a linear layer, by its name on disk."""
        if self.excluded_by(module) is not None:
            return None
        return self.every if self.layers is None else self.layers.get(module)


def parse(values: dict[str, Any], rename: Callable[[str], str] = str) -> QuantConfig:
    """From what hf_quant_config.json or config.json's quantization_config holds.

    rename: applied to module names and patterns, for readers whose modules are called otherwise.

    Raises:
        ValueError: an algorithm that is not supported, by name; a field of the wrong type.
    """
    details = values.get("quantization", values)
    if not isinstance(details, dict):
        raise ValueError(f"quantization holds {type(details).__name__}, expected an object")
    exclude = details.get("exclude_modules", details.get("ignore")) or []
    listed = details.get("quantized_layers") or {}
    if not isinstance(exclude, list) or not all(isinstance(e, str) for e in exclude):
        raise ValueError("exclude_modules must be a list of names")
    if not isinstance(listed, dict) or not all(isinstance(v, dict) for v in listed.values()):
        raise ValueError("quantized_layers must map module names to objects")
    algo = details.get("quant_algo")
    every = layers = None
    if algo == MIXED:
        layers = {rename(mend_name(name)): layer_format(v) for name, v in listed.items()}
        if not layers:
            raise ValueError(f"quant_algo={MIXED!r} without quantized_layers")
    elif algo is not None:
        every = layer_format({"group_size": _group_size(details), **details})
    cache = details.get("kv_cache_quant_algo") or details.get("kv_cache_scheme")
    return QuantConfig(
        every=every,
        layers={} if algo is None else layers,
        exclude=tuple(rename(mend_name(e)) for e in exclude),
        kv_cache=cache if cache is None or isinstance(cache, str) else "FP8",
        producer=values.get("producer") or {},
        damaged=tuple(name for name in [*exclude, *listed] if "\0" in name),
    )


def _group_size(details: dict[str, Any]) -> int | None:
    """In config.json's form, which keeps it in the config group."""
    groups = details.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    return weights.get("group_size") if isinstance(weights, dict) else None


def read(folder: Path, rename: Callable[[str], str] = str) -> QuantConfig | None:
    """A folder's quantization, None if it has none of modelopt's; hf_quant_config.json comes before its mirror."""
    path = folder / QUANT_FILE
    if path.is_file():
        values = json.loads(path.read_text())
    else:
        values = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
        if values.get("quant_method") != "modelopt":
            return None
    try:
        return parse(values, rename)
    except ValueError as error:
        raise ValueError(f"{path if path.is_file() else folder / 'config.json'}: {error}") from None


def describe(formats: dict[str, LayerFormat], plain: list[str]) -> dict[str, Any]:
    """hf_quant_config.json of these quantized and these plain layers."""
    kinds = set(formats.values())
    details: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": None}
    if len(kinds) == 1:
        details |= _layer(*kinds) | {"exclude_modules": sorted(plain)}
    else:
        details |= {"quant_algo": MIXED}
        details["quantized_layers"] = {name: _layer(f) for name, f in sorted(formats.items())}
    # Readers pick their parser by this name; the version is the one whose layout is written.
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": details}


def _layer(f: LayerFormat) -> dict[str, Any]:
    group = {} if f.group_size is None else {"group_size": f.group_size}
    return {"quant_algo": f.algo, **group}


def mirror(values: dict[str, Any]) -> dict[str, Any]:
    """The same as config.json's `quantization_config`."""
    details = values["quantization"]
    out: dict[str, Any] = {}
    if details["quant_algo"] == MIXED:
        groups: dict[tuple, list[str]] = {}
        for name, layer in details["quantized_layers"].items():
            groups.setdefault(tuple(layer.items()), []).append(name)
        out["config_groups"] = {
            f"group_{i}": _config_group(**dict(layer), targets=sorted(names))
            for i, (layer, names) in enumerate(groups.items())
        }
        out["quantized_layers"] = details["quantized_layers"]
    else:
        group = _config_group(details["quant_algo"], details.get("group_size"), ["Linear"])
        out["config_groups"] = {"group_0": group}
    return out | {
        "ignore": details.get("exclude_modules", []),
        "quant_algo": details["quant_algo"],
        "producer": values["producer"],
        "quant_method": "modelopt",
    }


def _config_group(
    quant_algo: str, group_size: int | None = None, targets: list[str] | None = None
) -> dict[str, Any]:
    def numbers(bits: int, group: int | None) -> dict[str, Any]:
        grouped = {} if group is None else {"group_size": group}
        return {"dynamic": False, "num_bits": bits, "type": "float", **grouped}

    algorithm = ALGORITHMS[quant_algo]
    weights = numbers(4 if algorithm.layer == "nvfp4" else 8, group_size)
    if algorithm.option == "row":
        weights["strategy"] = "channel"
    if algorithm.option == "bf16":
        return {"weights": weights, "targets": targets}
    four = algorithm.option == "nvfp4"
    grouped = group_size if four or algorithm.option == "mxfp8" else None
    return {
        "input_activations": numbers(4 if four else 8, grouped),
        "weights": weights,
        "targets": targets,
    }
