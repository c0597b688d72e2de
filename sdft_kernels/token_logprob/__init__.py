"""Op 3: log-probability of given tokens, entropy and log-sum-exp of an LM head, from hidden states."""

from .api import linear_token_logprob
from .fields import TokenLogprob

__all__ = ["TokenLogprob", "linear_token_logprob"]
