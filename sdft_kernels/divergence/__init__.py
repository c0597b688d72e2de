"""Op 1: divergence between two LM heads, full vocabulary, from hidden states."""

from .api import linear_divergence, linear_divergence_loss
from .fields import TokenDivergence
from .token_loss import AffineTokenLoss, sdft_token_loss

__all__ = ["AffineTokenLoss", "TokenDivergence", "linear_divergence", "linear_divergence_loss", "sdft_token_loss"]
