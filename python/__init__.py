"""Tigon: kernels for hybrid Mamba-2 / LatentMoE language models.

``import tigon`` is quick: it imports neither torch nor Triton. Public names are loaded from their rooms at
first use.
"""

from importlib import import_module
from pathlib import Path

from tigon._version import __version__

# In a checkout, `kernels/` and `bench/` lie beside `python/`, not inside it. They have no `__init__.py`, so
# that a checkout never shadows another project's top-level `kernels` package; this line lets an editable
# install find them as `tigon.kernels` and `tigon.bench`.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

_rooms = {
    "tigon.ops": (
        "attention_token_scores",
        "causal_conv1d",
        "causal_conv1d_update",
        "compact_tokens",
        "dequantize",
        "frame_difference_mask",
        "gated_rms_norm",
        "grouped_mm",
        "moe_experts",
        "moe_route",
        "moe_sort",
        "quantize_fp8",
        "quantize_mxfp8",
        "quantize_nvfp4",
        "replay_advance",
        "replay_commit",
        "rms_norm",
        "sample",
        "scaled_mm",
        "select_tokens",
        "ssd_scan",
        "ssd_token_scores",
        "ssd_update",
        "tree_ancestors",
        "verify_draft",
        "verify_tree",
        "video_redundancy_mask",
        "FP8Tensor",
        "MXFP8Tensor",
        "NVFP4Tensor",
        "ReplayCache",
        "ReplayCursor",
        "Routing",
        "VerifyRule",
        "Selection",
        "backend",
        "batch_invariant",
        "explain",
    ),
    "tigon.generation": ("generate",),
    "tigon.integrations": ("patch", "register_experts", "unpatch"),
    "tigon.modules.quantize": ("calibrate", "quantize"),
    "tigon.modules.recipe": ("Recipe",),
}
_homes = {name: room for room, names in _rooms.items() for name in names}
_submodules = ("integrations", "models", "modules", "ops")

__all__ = ["__version__", *_homes, *_submodules]


def __getattr__(name: str):
    if name in _homes:
        value = getattr(import_module(_homes[name]), name)
        globals()[name] = value
        return value
    if name in _submodules:
        return import_module(f"tigon.{name}")
    raise AttributeError(f"module 'tigon' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
