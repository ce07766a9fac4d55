"""NVFP4 checkpoints of compressed-tensors (llm-compressor, vLLM), read into the same frozen layers as modelopt's.

    weight_packed u8 (n,k/2)      the codes, as modelopt's `weight`
    weight_scale e4m3 (n,k/16)    the same in both
    weight_global_scale fp32 (1)  2688/amax: it ENCODES, modelopt's weight_scale_2 is its reciprocal
    input_global_scale fp32 (1)   2688/amax of the activations

A layer of zeros (an expert that was never chosen) has an infinite global scale, or 0 where someone mended that; its
decode scale is 0 then, and the layer adds nothing. An input_global_scale of 0 or inf, of activations never seen,
becomes an input_scale of 0, with which activations are quantized by their block scales alone.

Only `nvfp4-pack-quantized` with groups of 16 is read; other formats are refused by name. A model that was read so is
written in modelopt's layout. Source: github.com/vllm-project/compressed-tensors, compressors/nvfp4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tigon.integrations.modelopt import Layout
from tigon.integrations.modelopt_format import LayerFormat, QuantConfig, matches

FORMAT = "nvfp4-pack-quantized"
NAMES = {
    ".weight_packed": ".weight",
    ".weight_global_scale": ".weight_scale_2",
    ".input_global_scale": ".input_scale",
}


@dataclass(frozen=True)
class GroupConfig(QuantConfig):
    """groups: (target, format) pairs; a target is "Linear", a name, or `re:` and a pattern. `exclude` likewise."""

    groups: tuple[tuple[str, LayerFormat], ...] = ()

    def excluded_by(self, module: str) -> str | None:
        return next((p for p in self.exclude if _matches(p, module)), None)

    def of(self, module: str) -> LayerFormat | None:
        if self.excluded_by(module) is not None:
            return None
        found = (f for target, f in self.groups if target == "Linear" or _matches(target, module))
        return next(found, None)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return matches(target, module)


class CompressedLayout(Layout):
    """Layout of such a checkpoint: other names, and global scales that encode."""

    def own_name(self, stored: str) -> str:
        for theirs, ours in NAMES.items():
            if stored.endswith(theirs):
                return stored.removesuffix(theirs) + ours
        return stored

    def convert(self, own: str, value: Tensor) -> Tensor:
        return decode_scale(value) if own.endswith((".weight_scale_2", ".input_scale")) else value


def decode_scale(encode: Tensor) -> Tensor:
    """1 / encode (1) -> (); 0 where that is 0 or infinite."""
    dead = (encode == 0) | encode.isinf()
    return torch.where(dead, torch.zeros_like(encode), encode.reciprocal()).reshape(())


def layout(folder: Path, values: dict[str, Any], rename: Callable[[str], str] = str) -> Layout:
    """From config.json's `quantization_config`.

    Raises:
        ValueError: a format other than NVFP4, by name.
    """
    return CompressedLayout(parse(values, rename, str(folder / "config.json")))


def parse(
    values: dict[str, Any], rename: Callable[[str], str] = str, where: str = "config.json"
) -> GroupConfig:
    """The groups of a `quantization_config`; ValueError for what is not read here."""
    groups = []
    for group in (values.get("config_groups") or {}).values():
        stated = group.get("format") or values.get("format")
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        kind = tuple(weights.get(key) for key in ("num_bits", "type", "group_size"))
        if stated != FORMAT or kind != (4, "float", 16):
            raise ValueError(
                f"{where}: compressed-tensors format {stated!r} with weights {kind} is not read; "
                f"only {FORMAT!r} with weights (4, 'float', 16) is"
            )
        if inputs is not None and inputs.get("num_bits") != 4:
            raise ValueError(
                f"{where}: {FORMAT} with activations of {inputs.get('num_bits')} bits is not read"
            )
        form = LayerFormat("W4A16_NVFP4" if inputs is None else "NVFP4", 16)
        groups += [(_renamed(target, rename), form) for target in group.get("targets") or []]
    if not groups:
        raise ValueError(f"{where}: compressed-tensors without config_groups")
    cache = values.get("kv_cache_scheme")
    return GroupConfig(
        exclude=tuple(_renamed(name, rename) for name in values.get("ignore") or []),
        kv_cache="FP8" if cache else None,
        producer={"name": "compressed-tensors", "version": values.get("version")},
        groups=tuple(groups),
    )


def _renamed(target: str, rename: Callable[[str], str]) -> str:
    return target if target.startswith("re:") else rename(target)
