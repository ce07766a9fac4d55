"""What is wrong with a quantized checkpoint, tensor by tensor, without building its model.

    report = examine(folder)          report.findings; report.formats, .tensors, .bytes, .kv_cache say what it holds
    validate(folder)                  the findings alone

Three passes: files and headers (checkpoint_files), layers against the config (modelopt_layers) and against the model
(here), numbers in the scales (modelopt_values). modelopt's layout and compressed-tensors' NVFP4. Layers are known by
what they store and by what the config says of them; of NemotronH models, LatentMoE experts among them, all shapes are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from tigon.integrations import compressed_tensors, modelopt_values
from tigon.integrations import modelopt_format as form
from tigon.integrations.checkpoint_files import WRITE_AGAIN, Files, Finding, load_json, read_files
from tigon.integrations.modelopt import Layout
from tigon.integrations.modelopt_format import LayerFormat, QuantConfig
from tigon.integrations.modelopt_layers import EXPORT, FOREIGN, Layer, check_layers, check_siblings


@dataclass
class Report:
    """What a checkpoint holds and what is wrong with it. formats: layers by algorithm."""

    findings: list[Finding] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    kv_cache: str | None = None
    tensors: int = 0
    bytes: int = 0

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)


def validate(folder: str | PathLike, values: str = "scales") -> list[Finding]:
    """The findings of `examine`."""
    return examine(folder, values).findings


def examine(folder: str | PathLike, values: str = "scales") -> Report:
    """Look through a checkpoint.

    Args:
        values: which tensors to read: "none" (headers only), "scales", or "all" (NaN and inf anywhere).

    Raises:
        NotADirectoryError: no such folder. ValueError: `values` is none of these.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"no such folder: {folder}")
    if values not in ("none", "scales", "all"):
        raise ValueError(f"values={values!r} is not one of none, scales, all")
    files = read_files(folder)
    settings = _settings(folder, files)
    layout, config = _layout(folder, settings, files)
    layers = _layers(layout or Layout(QuantConfig()), files)
    sizes = _known_sizes(settings, layers, files)
    formats = check_layers(layers, layout, config, sizes, files)
    _check_model(layers, formats, sizes, files)
    check_siblings(layers, formats, files)
    if values != "none":
        encodes = isinstance(layout, compressed_tensors.CompressedLayout)
        _check_values(layers, formats, encodes, files, everything=values == "all")
    found = files.tensors.values()
    return Report(
        findings=files.findings,
        formats=dict(Counter(f.algo for f in formats.values())),
        kv_cache=config.kv_cache,
        tensors=len(files.tensors),
        bytes=sum(t.stop - t.start for t in found),
    )


def _own_name(name: str) -> str:
    from tigon.models.checkpoint import own_name

    return own_name(name)


def _settings(folder: Path, files: Files) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        files.error("", "is not there", "add the model's config.json", path)
        return {}
    return load_json(path, files) or {}


def _layout(folder: Path, settings: dict, files: Files) -> tuple[Layout | None, QuantConfig]:
    """The layout and its config; (None, empty) where none can be made out."""
    mirror = settings.get("quantization_config")
    path = folder / form.QUANT_FILE
    own = load_json(path, files) if path.is_file() else None
    try:
        if isinstance(mirror, dict) and mirror.get("quant_method") == "compressed-tensors":
            layout: Layout = compressed_tensors.layout(folder, mirror, _own_name)
            return layout, layout.config
        if own is None and not mirror:
            return None, QuantConfig()
        if own is None and mirror.get("quant_method") != "modelopt":
            method = mirror.get("quant_method")
            files.error("", f"quant_method={method!r} is not read", "convert it", "config.json")
            return None, QuantConfig()
        config = form.parse(own if own is not None else mirror, _own_name)
    except (ValueError, TypeError, AttributeError) as error:
        fix = "quantize with a supported algorithm"
        files.error("", str(error), fix, path if own is not None else "config.json")
        return None, QuantConfig()
    if own is not None and isinstance(mirror, dict):
        _compare_mirror(own, mirror, files)
    elif own is not None:
        fault = "has no quantization_config: readers that look only here see no quantization"
        files.warning("", fault, f"copy it from {form.QUANT_FILE}", "config.json")
    if config.damaged:
        name = config.damaged[0]
        fault = (
            f"{len(config.damaged)} module names carry a marker of modelopt's exporter: {name!r} is read as "
            f"{form.mend_name(name)!r}"
        )
        files.warning(
            "", fault, "cut the names off at the NUL: other engines match them as they are", path
        )
    return Layout(config), config


def _compare_mirror(own: dict, mirror: dict, files: Files) -> None:
    try:
        a, b = form.parse(own, _own_name), form.parse(mirror, _own_name)
    except ValueError as error:
        files.error("", f"quantization_config: {error}", EXPORT, "config.json")
        return
    pairs = {  # of the mirror, group sizes are often left out
        "quant_algo": (a.every and a.every.algo, b.every and b.every.algo),
        "quantized_layers": (a.layers, b.layers),
        "ignore": (a.exclude, b.exclude),
    }
    for name, (first, second) in pairs.items():
        if first != second:
            fault = f"quantization_config's {name} is not what {form.QUANT_FILE} says"
            files.error("", fault, "make the two equal; engines read either", "config.json")


def _layers(layout: Layout, files: Files) -> dict[str, Layer]:
    """The stored tensors by module."""
    layers: dict[str, Layer] = {}
    for name, stored in files.tensors.items():
        module, _, part = layout.own_name(_own_name(name)).rpartition(".")
        parts = layers.setdefault(module, Layer(module, {})).parts
        if part in parts:
            fault = f"is the same tensor of the model as {parts[part][0]}"
            files.error(name, fault, "keep one of the two", stored.file)
        parts[part] = (name, stored)
    return layers


def _known_sizes(
    settings: dict, layers: dict[str, Layer], files: Files
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a NemotronH model before quantization, by own name; {} of other models. A block of
    multi-token prediction of which nothing is stored is left out, as readers do."""
    if settings.get("model_type") != "nemotron_h":
        return {}
    from tigon.models.shapes import tensor_shapes

    try:
        if settings.get("num_nextn_predict_layers") and not any(
            n.startswith("mtp.") for n in layers
        ):
            fault = "num_nextn_predict_layers names multi-token prediction, but no mtp.* tensors are stored"
            files.warning("", fault, "set it to 0, or add the tensors", "config.json")
            settings = settings | {"num_nextn_predict_layers": 0}
        return tensor_shapes(settings)
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ) as error:
        files.warning("", f"shapes are not checked: {error}", "mend the sizes", "config.json")
        return {}


def _check_model(
    layers: dict[str, Layer],
    formats: dict[str, LayerFormat],
    sizes: dict[str, tuple[int, ...]],
    files: Files,
) -> None:
    """Plain tensors of a model whose shapes are known; quantized ones were checked part by part."""
    if not sizes:
        return
    broken = {f.tensor for f in files.findings}
    drafter = any(name.startswith("mtp.") for name in sizes)
    for name, shape in sizes.items():
        module, _, part = name.rpartition(".")
        layer = layers.get(module)
        if layer is None or part not in layer.parts:
            if name not in broken and not (module in formats and part == "weight"):
                files.error(name, f"is missing: the model has it with shape {shape}", WRITE_AGAIN)
            continue
        stored_name, stored = layer.parts[part]
        if module in formats and part == "weight":
            continue
        if stored.shape != shape:
            fault = f"has shape {stored.shape}, the model needs {shape}"
            files.error(stored_name, fault, EXPORT, stored.file)
    for module, layer in layers.items():
        for part, (stored_name, stored) in layer.parts.items():
            own = f"{module}.{part}"
            known = own in sizes or (part in form.LAYER_PARTS and module in formats)
            if known or part in FOREIGN or own.endswith(form.CACHE_SCALES):
                continue
            optional = module.startswith("mtp.") and not drafter
            if not optional and own != "lm_head.weight":  # a tied one may be stored
                fault = "belongs to no layer of the model in config.json"
                files.error(stored_name, fault, "check hybrid_override_pattern", stored.file)


def _check_values(
    layers: dict[str, Layer],
    formats: dict[str, LayerFormat],
    encodes: bool,
    files: Files,
    everything: bool,
) -> None:
    broken = {f.tensor for f in files.findings if f.severity == "error"}
    for module, layer in layers.items():
        found = formats.get(module)
        for part, (name, stored) in layer.parts.items():
            if stored.start == stored.stop or name in broken:
                continue
            scale = found is not None and part in form.LAYER_PARTS and part != "weight"
            if scale and stored.dtype in ("F8_E4M3", "U8"):
                modelopt_values.check_block_scales(name, stored, files)
            elif scale and stored.dtype in modelopt_values.DTYPES:
                algorithm = found.algorithm
                activation = part == "input_scale"
                reach = algorithm.input_range if activation else algorithm.weight_range
                modelopt_values.check_scale(
                    *(name, stored, reach or form.E4M3_MAX, files),
                    encodes=encodes,
                    activation=activation,
                )
            elif everything:
                modelopt_values.check_numbers(name, stored, files)
