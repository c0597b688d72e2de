"""What every op over an LM head shares: the way from raw logits to z, and the mark of an absent target."""

from __future__ import annotations

from dataclasses import dataclass

ABSENT_TARGET = -100  # torch's ignore_index: no target at this token


@dataclass(frozen=True)
class Transform:
    """From raw logits a = h W^T + bias to z: u = scale * a; c = cap * tanh(u / cap) or u; z = c / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """dz/da where no softcap bends it."""
        return self.scale / self.temperature


IDENTITY = Transform()
