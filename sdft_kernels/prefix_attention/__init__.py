"""Attention over a prefix tree: the plan of one batch, and the cache of prefixes' keys and values."""

from sdft_kernels.prefix_attention.cache import CacheStatistics, PrefixCache
from sdft_kernels.prefix_attention.planner import TILES, PrefixPlan, ancestors, positions, prefix_tree, tile_table

__all__ = [
    "TILES",
    "CacheStatistics",
    "PrefixCache",
    "PrefixPlan",
    "ancestors",
    "positions",
    "prefix_tree",
    "tile_table",
]
