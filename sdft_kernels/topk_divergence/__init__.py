"""Op 2: divergence between two LM heads on a top-k support, or against a cached teacher, from hidden states."""

from .api import linear_topk_divergence
from .fields import TopkDivergence

__all__ = ["TopkDivergence", "linear_topk_divergence"]
