"""The layers of a checkpoint against its config: what each stores, what the config says that it is.

Findings go to the `Files` they came from. A `Layer` is what is stored of one module, by parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tigon.integrations import modelopt_format as form
from tigon.integrations import modelopt_values
from tigon.integrations.checkpoint_files import Files
from tigon.integrations.modelopt import Layout, same_shape
from tigon.integrations.modelopt_format import LayerFormat, QuantConfig
from tigon.integrations.safetensors_header import Stored

EXPORT = "export the checkpoint again"
FOREIGN = {
    "weight_packed": "compressed-tensors' name in modelopt's layout, where the codes are `weight`",
    "weight_global_scale": "compressed-tensors' encode scale in modelopt's layout, whose weight_scale_2 is 1/it",
    "input_global_scale": "compressed-tensors' encode scale in modelopt's layout, whose input_scale is 1/it",
    "pre_quant_scale": "a scale of activations (AWQ) that Tigon's layers do not apply",
    "weight_zero_point": "a zero point, which no supported format has",
}
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass
class Layer:
    """What is stored of one module: part -> (name on disk, place)."""

    name: str
    parts: dict[str, tuple[str, Stored]]

    def dtype(self, part: str) -> str | None:
        return self.parts[part][1].dtype if part in self.parts else None

    @property
    def quantized(self) -> bool:
        scaled = any(p.startswith("weight_scale") for p in self.parts)
        return scaled or self.dtype("weight") in ("U8", "F8_E4M3", "F8_E5M2")

    @property
    def size(self) -> tuple[int, int] | None:
        """(n,k) by the weight."""
        stored = self.parts["weight"][1] if "weight" in self.parts else None
        if stored is None or len(stored.shape) != 2:
            return None
        n, k = stored.shape
        return (n, 2 * k) if stored.dtype == "U8" else (n, k)


def check_layers(
    layers: dict[str, Layer],
    layout: Layout | None,
    config: QuantConfig,
    sizes: dict[str, tuple[int, ...]],
    files: Files,
) -> dict[str, LayerFormat]:
    """Each quantized layer against its format; returns the formats."""
    formats = {}
    for name, layer in layers.items():
        listed = config.of(name)
        if layer.quantized:
            found = listed or _guess(layer)
            known = f"{name}.weight" in sizes or not name.startswith("mtp.")
            if listed is None and known:
                _unlisted(layer, layout, config, files)
            if found is not None:
                formats[name] = found
                _check_parts(layer, found, sizes.get(f"{name}.weight"), files)
        elif listed is not None and _is_linear(name, config, sizes):
            stored = layer.parts.get("weight")
            if stored is not None:
                fault = f"{listed.algo} by the config, stored as plain {stored[1].dtype}"
                fix = "add the module to exclude_modules, or quantize it"
                files.error(stored[0], fault, fix, stored[1].file)
        for part in layer.parts.keys() & FOREIGN.keys():
            stored_name, stored = layer.parts[part]
            files.error(stored_name, f"is {FOREIGN[part]}", EXPORT, stored.file)
    for name in (config.layers or {}).keys() - layers.keys():
        if not name.startswith("mtp."):
            fault = "is in quantized_layers, but no tensor of it is stored"
            files.error(name, fault, "remove it from the list, or add the shard", form.QUANT_FILE)
    _check_inputs(layers, formats, files)
    return formats


def _is_linear(name: str, config: QuantConfig, sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a config that speaks of all linear layers means this module, as far as that can be known."""
    if config.layers is not None:
        return True
    matrix = len(sizes.get(f"{name}.weight", ())) == 2
    return matrix and not name.endswith(("embeddings", "gate"))


def _guess(layer: Layer) -> LayerFormat | None:
    """The format by what is stored, where the config does not say."""
    codes, scale = layer.dtype("weight"), layer.dtype("weight_scale")
    if codes == "U8":
        return LayerFormat("NVFP4" if "input_scale" in layer.parts else "W4A16_NVFP4", 16)
    if codes != "F8_E4M3":
        return None
    if scale == "U8":
        return LayerFormat("MXFP8", 32)
    shape = layer.parts["weight_scale"][1].shape if scale else ()
    n = layer.size[0] if layer.size else 0
    if same_shape(shape, ()):
        return LayerFormat("FP8")
    return LayerFormat("FP8_PER_CHANNEL_PER_TOKEN" if same_shape(shape, (n,)) else "FP8_PB_WO")


def _unlisted(layer: Layer, layout: Layout | None, config: QuantConfig, files: Files) -> None:
    if layout is None and any(f.file in (form.QUANT_FILE, "config.json") for f in files.findings):
        return  # the config itself was the fault
    if layout is None:
        fault, fix = "is quantized, but no config says how", f"add {form.QUANT_FILE}"
    elif (pattern := config.excluded_by(layer.name)) is not None:
        fault = f"is quantized, but {pattern!r} in exclude_modules says that it is not"
        fix = "remove the pattern, or store the weight unquantized"
    else:
        fault, fix = "is quantized, but quantized_layers does not name it", "add it to the list"
    name, stored = next(iter(layer.parts.values()))
    files.error(layer.parts.get("weight", (name,))[0], fault, fix, stored.file)


def _check_parts(
    layer: Layer, found: LayerFormat, known: tuple[int, ...] | None, files: Files
) -> None:
    """Presence, dtype and shape of each tensor of a quantized layer."""
    size = known if known is not None and len(known) == 2 else layer.size
    if size is None:
        if "weight" in layer.parts:
            name, stored = layer.parts["weight"]
            fault = f"has shape {stored.shape}, expected a matrix"
            files.error(name, fault, "store experts one by one, by their index", stored.file)
        else:
            name, stored = next(iter(layer.parts.values()))
            files.error(name, "is the scale of a weight that is not there", EXPORT, stored.file)
        return
    for part, (dtype, shape) in found.tensors(*size).items():
        if part not in layer.parts:
            if part != "input_scale":
                where = next(iter(layer.parts.values()))[1].file
                fault = f"is missing: a {found.algo} layer has {part} {dtype} {shape}"
                files.error(f"{layer.name}.{part}", fault, EXPORT, where)
            continue
        name, stored = layer.parts[part]
        if stored.dtype != dtype:
            fault = f"is {stored.dtype}, {found.algo} stores {dtype}"
            files.error(name, fault, EXPORT, stored.file)
        elif not same_shape(stored.shape, shape):
            files.error(name, *_shape_fault(part, stored.shape, shape, found), stored.file)


def _shape_fault(part: str, got: tuple, expected: tuple, found: LayerFormat) -> tuple[str, str]:
    half = len(got) == len(expected) == 2 and got[0] == expected[0] and 2 * got[1] == expected[1]
    if half and part == "weight_scale":
        fault = f"has shape {got}, half of {expected}: computed from packed codes, two an entry"
        return fault, "compute the scales from the unpacked weight, then export again"
    if half and part == "weight" and found.algorithm.layer == "fp8":
        return f"has shape {got}, half of {expected}: NVFP4 codes in an {found.algo} layer", EXPORT
    return f"has shape {got}, expected {expected}", EXPORT


def _check_inputs(layers: dict[str, Layer], formats: dict[str, LayerFormat], files: Files) -> None:
    """Static activation scales: none at all is dynamic scaling, some missing is a fault."""
    static = {n: f for n, f in formats.items() if f.algorithm.input_range is not None}
    missing = [name for name in static if "input_scale" not in layers[name].parts]
    if not missing:
        return
    if len(missing) == len(static):
        fault = "no layer has an input_scale: activations are scaled by their own amax in each call"
        files.warning("", fault, "calibrate, if the engine needs static scales")
        return
    for name in missing:
        where = next(iter(layers[name].parts.values()))[1].file
        routed = ": an expert that was never chosen in calibration" * (".experts." in name)
        fix = "calibrate on more data; engines that take 0 for it divide by zero"
        files.error(f"{name}.input_scale", f"is missing{routed}", fix, where)


def check_siblings(layers: dict[str, Layer], formats: dict[str, LayerFormat], files: Files) -> None:
    """Layers that engines fuse must share their tensor scales."""
    for name, found in formats.items():
        parent, _, leaf = name.rpartition(".")
        group = next((g for g in SIBLINGS if g[0] == leaf), ())
        for other in (f"{parent}.{leaf}" for leaf in group[1:]):
            if formats.get(other) != found:
                continue
            if found.algorithm.layer == "nvfp4":  # FP8 codes are scaled again when layers are fused
                _compare_scales(layers[name], layers[other], "weight_scale_2", files)


def _compare_scales(first: Layer, second: Layer, part: str, files: Files) -> None:
    if part not in first.parts or part not in second.parts:
        return
    (a_name, a), (b_name, b) = first.parts[part], second.parts[part]
    if a.dtype != "F32" or b.dtype != "F32" or a.stop - a.start != 4 or b.stop - b.start != 4:
        return
    x, y = modelopt_values.read_floats(a), modelopt_values.read_floats(b)
    if x.numel() and y.numel() and x.item() != y.item():
        fault = (
            f"is {y.item():g}, {a_name} is {x.item():g}: engines that fuse the two use one scale"
        )
        files.warning(b_name, fault, "quantize them with a common amax", b.file)
