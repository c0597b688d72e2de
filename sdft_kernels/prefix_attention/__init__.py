"""Op 4: attention over a prefix tree, and the plan of one batch, made on the host."""

from .api import shared_prefix_attention
from .planner import TILES, PrefixPlan, ancestors, positions, prefix_tree, tile_table
from .tree import PrefixTree

__all__ = [
    "TILES",
    "PrefixPlan",
    "PrefixTree",
    "ancestors",
    "positions",
    "prefix_tree",
    "shared_prefix_attention",
    "tile_table",
]
