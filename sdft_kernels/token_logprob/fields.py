"""The per-token numbers of one distribution, by name and in the order every implementation uses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenLogprob(NamedTuple):
    """Per-token numbers, each ``(N,)`` in the caller's token order, or None when not asked for.

    fp32 (fp64 for fp64 inputs), in nats, at the call's temperature; all accept an upstream gradient. Masked tokens
    hold 0.

    Attributes:
        logprob: log p[target]; 0 where the target is -100.
        entropy: entropy of p.
        lse: log-sum-exp of the logits after scale, softcap and temperature.
    """

    # Typed as present, which they are unless `outputs` leaves them out: callers need no assert.
    logprob: Tensor = None  # type: ignore[assignment]
    entropy: Tensor = None  # type: ignore[assignment]
    lse: Tensor = None  # type: ignore[assignment]


FIELDS = TokenLogprob._fields
