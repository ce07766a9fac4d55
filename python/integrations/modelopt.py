"""Checkpoints in nvidia-modelopt's Hugging Face layout: read into frozen Tigon layers, and written from them.

    model = HybridLM.from_pretrained(folder)          finds the layout by itself
    modelopt.load(model, folder)                      any other model whose linear layers are torch's: replaced in place
    modelopt.save(model, folder)                      a model with frozen FP8Linear and NVFP4Linear layers
    modelopt.validate(folder)                         findings, without building a model (`tigon check-checkpoint`)

A quantized linear layer becomes an `FP8Linear` or `NVFP4Linear` in its frozen form, whose tensors have modelopt's
names, shapes and dtypes (see modelopt_format), so what is read is what is written, byte for byte. safetensors only;
one shard is open at a time, and all headers are compared with the model before any tensor is read. Refused by name:
algorithms outside `modelopt_format.ALGORITHMS`. Scales of a quantized KV cache (`k_scale`, `v_scale`) are left out with
a warning: Tigon's caches are not quantized.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tigon.integrations import modelopt_format as form
from tigon.integrations.modelopt_format import LayerFormat, QuantConfig
from tigon.modules.experts import Experts
from tigon.modules.fp8_linear import FP8Linear
from tigon.modules.nvfp4_linear import NVFP4Linear
from tigon.ops.quantized import FP8Tensor, MXFP8Tensor, NVFP4Tensor, QuantizedTensor

if TYPE_CHECKING:
    from tigon.integrations.checkpoint_findings import Finding

# Shape, safetensors' dtype if that is fixed, whether it may be absent.
Expected = tuple[tuple[int, ...], str | None, bool]


class Layout:
    """How a checkpoint's tensors become a model's: modelopt's names and scales. Empty config: nothing is quantized."""

    def __init__(self, config: QuantConfig):
        self.config = config
        # Layers that `install` replaced; and those with no frozen form, dequantized as they are read.
        self.formats: dict[str, LayerFormat] = {}
        self.decoded: dict[str, LayerFormat] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}

    def own_name(self, stored: str) -> str:
        """A stored tensor's name in the model, after the model's own renaming."""
        return stored

    def skips(self, own: str) -> bool:
        """Whether a tensor has no place in the model although its name is known."""
        return own.endswith(form.CACHE_SCALES)

    def convert(self, own: str, value: Tensor) -> Tensor:
        """A stored tensor as the frozen layer keeps it."""
        module, _, part = own.rpartition(".")
        layer = self.formats.get(module) or self.decoded.get(module)
        if layer is None or part not in form.LAYER_PARTS:
            return value
        if part == "weight_scale" and layer.group_size == 32 and layer.algorithm.layer == "nvfp4":
            value = value.view(torch.uint8).repeat_interleave(2, -1).view(value.dtype)
        return value

    def install(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        others: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        """Replace the linear layers that are quantized by frozen ones on the meta device.

        others: sizes of weights on disk that are not a linear layer's, such as single experts'. Embeddings are known,
        and quantized where a table names them.
        """
        self._sizes = dict(others or {})
        for name, module in list(model.named_modules()):
            layer = self.config.of(name) if isinstance(module, nn.Linear) else None
            if layer is not None:
                model.set_submodule(name, frozen(module, layer, dtype))
                self.formats[name] = layer
            if isinstance(module, nn.Embedding) and self.config.layers:
                self._sizes[name] = tuple(module.weight.shape)
        for name in self._sizes:
            if (layer := self.config.of(name)) is not None:
                self.decoded[name] = layer
        listed = [n for n in self.config.layers or {} if not n.startswith("mtp.")]
        absent = sorted(set(listed) - set(self.formats) - set(self.decoded))
        if absent:
            raise ValueError(
                f"quantized_layers names what is not a linear layer of the model: {', '.join(absent)}"
            )

    def expected(self, model: nn.Module) -> dict[str, Expected]:
        """What the files must hold, by own name."""
        found: dict[str, Expected] = {
            name: (tuple(t.shape), None, False) for name, t in model.state_dict().items()
        }
        for name, layer in self.formats.items():
            module = model.get_submodule(name)
            parts = layer.tensors(module.out_features, module.in_features)
            for part, (dtype, shape) in parts.items():
                found[f"{name}.{part}"] = (shape, dtype, part == "input_scale")
        for name, layer in self.decoded.items():
            for part, (dtype, shape) in layer.tensors(*self._sizes[name]).items():
                found[f"{name}.{part}"] = (shape, dtype, part == "input_scale")
        return found

    def decode(self, own: str, value: Tensor, dtype: torch.dtype) -> tuple[str, Tensor | None]:
        """A part of a layer in `decoded` -> its weight's name, and the weight once all parts have come."""
        module, _, part = own.rpartition(".")
        layer, size = self.decoded[module], self._sizes[module]
        if part == "input_scale":
            return own, None
        parts = self._parts.setdefault(module, {})
        parts[part] = value
        if len(parts) < len(layer.tensors(*size).keys() - {"input_scale"}):
            return own, None
        weight = quantized(layer, self._parts.pop(module), size)
        return f"{module}.weight", weight.dequantize(dtype)

    def unscaled(self, found: set[str]) -> list[str]:
        """Layers whose algorithm has a static activation scale that the files do not hold."""
        return [
            name
            for name, layer in self.formats.items()
            if layer.algorithm.input_range is not None and f"{name}.input_scale" not in found
        ]


def quantized(
    layer: LayerFormat, parts: dict[str, Tensor], size: tuple[int, int]
) -> QuantizedTensor:
    """The weight (n,k) that a layer's tensors make up."""
    codes, scale, option = parts["weight"], parts["weight_scale"], layer.algorithm.option
    if layer.algorithm.layer == "nvfp4":
        return NVFP4Tensor(codes, scale, parts["weight_scale_2"].reshape(()), size)
    if option == "mxfp8":
        return MXFP8Tensor(codes, scale, size)
    granularity = {"tensor": "tensor", "row": "row", "block": "128x128"}[option]
    return FP8Tensor(
        codes, scale.reshape(layer.tensors(*size)["weight_scale"][1]), size, granularity
    )


def frozen(linear: nn.Linear, layer: LayerFormat, dtype: torch.dtype | None = None) -> nn.Module:
    """The frozen layer in this format, of the same sizes, on the meta device."""
    kinds = {"nvfp4": (NVFP4Linear, "activation"), "fp8": (FP8Linear, "scaling")}
    cls, option = kinds[layer.algorithm.layer]
    return cls(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        frozen=True,
        device="meta",
        dtype=dtype or linear.weight.dtype,
        **{option: layer.algorithm.option},
    )


def format_of(module: nn.Module) -> LayerFormat | None:
    """What a frozen layer is called on disk; None for every other module.

    Raises:
        ValueError: a frozen layer that the layout has no name for.
    """
    if not isinstance(module, FP8Linear | NVFP4Linear) or not module.frozen:
        return None
    nvfp4 = isinstance(module, NVFP4Linear)
    option = module.activation if nvfp4 else module.scaling
    for name, algorithm in form.ALGORITHMS.items():
        if (algorithm.layer == "nvfp4") is nvfp4 and algorithm.option == option:
            return LayerFormat(name, algorithm.group)
    raise ValueError(f"{type(module).__name__} with {option!r} has no quant_algo")


def config_of(model: nn.Module) -> dict | None:
    """hf_quant_config.json of a model's frozen layers; None if it has none."""
    formats, plain = {}, []
    for name, module in model.named_modules():
        layer = format_of(module)
        if layer is not None:
            formats[name] = layer
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            plain.append(name)
        elif isinstance(module, Experts):  # linear layers on disk, one an expert
            plain.append(f"{name}*")
    return form.describe(formats, plain) if formats else None


def write_config(model: nn.Module, folder: Path) -> dict:
    """Write hf_quant_config.json if layers are frozen, else remove an old one; what config.json gets of it."""
    values = config_of(model)
    if values is None:
        (folder / form.QUANT_FILE).unlink(missing_ok=True)
        return {}
    (folder / form.QUANT_FILE).write_text(json.dumps(values, indent=4) + "\n")
    return {"quantization_config": form.mirror(values)}


def layout(folder: Path, settings: dict, rename: Callable[[str], str] = str) -> Layout:
    """The layout of a checkpoint whose config.json holds `settings`.

    Raises:
        ValueError: quantized by something that is not read here, or with an algorithm that is not supported, by name.
    """
    config = form.read(folder, rename)
    if config is not None:
        return Layout(config)
    values = settings.get("quantization_config") or {}
    method = values.get("quant_method")
    if method == "compressed-tensors":
        from tigon.integrations import compressed_tensors

        return compressed_tensors.layout(folder, values, rename)
    if values:
        raise ValueError(
            f"{folder / 'config.json'}: quant_method={method!r} is not read; "
            "known: 'modelopt', 'compressed-tensors'"
        )
    return Layout(QuantConfig())


def warn_of(found: Layout, names: set[str], skipped: int, folder: Path) -> None:
    """Say what of a checkpoint is not used as it was calibrated."""
    if found.decoded:
        warnings.warn(
            f"{folder}: {len(found.decoded)} quantized weights of experts or embeddings are dequantized, as there is "
            "no quantized form of these layers",
            stacklevel=5,
        )
    unscaled = found.unscaled(names)
    if unscaled:
        warnings.warn(
            f"{folder}: no input_scale for {len(unscaled)} layers, whose activations are then scaled by "
            f"their own amax in every call: {', '.join(unscaled[:3])}{', …' * (len(unscaled) > 3)}",
            stacklevel=5,
        )
    if skipped or found.config.kv_cache:
        warnings.warn(
            f"{folder}: made for a KV cache in {found.config.kv_cache or 'low precision'}; its {skipped} scales "
            "are not loaded, Tigon's caches are not quantized",
            stacklevel=5,
        )


def same_shape(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes differ by ones only: writers keep scales as (), (1,) or (n,1,m,1)."""
    return a == b or [s for s in a if s != 1] == [s for s in b if s != 1]


def load(
    model: nn.Module,
    folder: str | PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] = str,
) -> nn.Module:
    """Read a checkpoint into `model`, its quantized linear layers replaced by frozen ones in place.

    Args:
        model: on any device; parameters on the meta device are created on `device`.
        dtype: to convert unquantized tensors to; None keeps each tensor's own.
        rename: from names on disk to the model's.

    Raises:
        FileNotFoundError: config.json or a shard. ValueError: unknown, missing and misshapen tensors, all named.
    """
    from tigon.models.checkpoint import read_into

    path = Path(folder)
    settings = json.loads((path / "config.json").read_text())
    return read_into(
        model, path, layout(path, settings, rename), rename, device=device, dtype=dtype
    )


def save(model: nn.Module, folder: str | PathLike, max_shard_size: int | str = "5GB") -> None:
    """Write a model with frozen layers: safetensors, config.json, hf_quant_config.json.

    model: its `config` has `to_dict()`, as HybridLM's and transformers' do.
    """
    from tigon.models.checkpoint import save as save_checkpoint

    save_checkpoint(model, folder, max_shard_size=max_shard_size)


def validate(folder: str | PathLike, values: str = "scales") -> list[Finding]:
    """What is wrong with a checkpoint, tensor by tensor; see `modelopt_validate.validate`."""
    from tigon.integrations.modelopt_validate import validate as find

    return find(folder, values)
