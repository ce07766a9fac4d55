"""`tigon.models`: a hybrid language model assembled from `tigon.modules`, and the published sizes."""

from tigon.models.config import HybridConfig
from tigon.models.hybrid import HybridLM
from tigon.models.presets import PRESETS, preset

__all__ = ["PRESETS", "HybridConfig", "HybridLM", "preset"]
