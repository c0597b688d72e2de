"""Op 4: attention over a prefix tree, the plan of one batch, made on the host, and the cache of prefixes."""

from .api import shared_prefix_attention
from .cache import CacheOwner, CacheStatistics, KeyValue, Layers, PrefixCache
from .planner import TILES, PrefixPlan, ancestors, positions, prefix_tree, tile_table
from .tree import PrefixTree

__all__ = [
    "TILES",
    "CacheOwner",
    "CacheStatistics",
    "KeyValue",
    "Layers",
    "PrefixCache",
    "PrefixPlan",
    "PrefixTree",
    "ancestors",
    "positions",
    "prefix_tree",
    "shared_prefix_attention",
    "tile_table",
]
