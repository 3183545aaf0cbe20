"""The transform that some models apply to the logits of their output head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """The transform of the output head's logits that some models apply: cap · tanh(scale · logits / cap)."""

    scale: float = 1.0
    """Factor of the logits (Cohere, Granite, Falcon-H1)."""
    cap: float | None = None
    """Largest absolute value of a logit, which is approached smoothly (Gemma); None sets no limit."""

    def apply_(self, logits: Tensor) -> Tensor:
        """Transforms fp32 logits in place."""
        if self.cap is None:
            return logits if self.scale == 1 else logits.mul_(self.scale)
        return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def slope(self, transformed_logits: Tensor) -> Tensor | float:
        """The derivative of the transform with respect to the head's logits, computed from the transformed logits."""
        if self.cap is None:
            return self.scale
        return (transformed_logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


LINEAR = LogitTransform()
"""No transform: the logits are the head's."""
