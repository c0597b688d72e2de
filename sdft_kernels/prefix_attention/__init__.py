"""Attention over a prefix tree: the plan of one batch, made on the host."""

from sdft_kernels.prefix_attention.planner import TILES, PrefixPlan, ancestors, positions, prefix_tree, tile_table

__all__ = ["TILES", "PrefixPlan", "ancestors", "positions", "prefix_tree", "tile_table"]
