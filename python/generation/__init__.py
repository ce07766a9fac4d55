"""`tigon.generation`: caches and the decode loop."""

from tigon.generation.cache import HybridCache
from tigon.generation.loop import generate

__all__ = ["HybridCache", "generate"]
