"""InputMoments: the moments of a layer's inputs, in which channels with NaN or infinity do not count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from batchnorm.moments import Moments


@final
@dataclass(frozen=True, slots=True, eq=False)
class InputMoments:
    """Moments of a layer's inputs; a channel with NaN or infinity in an input does not count for that input.

    Args:
        moments: Moments of the finite channels of each input, float64; one count for all channels if none was excluded.
        inputs: Number of inputs with a finite channel.
        spoiled: Number of inputs with an excluded channel.
        left_out: For each channel whether it was excluded from an input, (C,); False if no channel was.
        values: Number of values per channel, including excluded ones.
    """

    moments: Moments = field(default_factory=Moments.empty)
    inputs: int = 0
    spoiled: int = 0
    left_out: Tensor | bool = False
    values: int = 0

    @classmethod
    def of(cls, x: Tensor) -> InputMoments:
        """Moments of one input, (N, C, ...)."""
        all_ = Moments.of(x)
        finite = torch.isfinite(all_.mean) & torch.isfinite(all_.m2)
        is_spoiled = bool(x.numel()) and not bool(finite.all())
        values = x.numel() // max(1, x.shape[1])
        if not is_spoiled:
            return cls(all_, int(x.numel() > 0), values=values)
        # with a count of 0 a channel adds nothing in `+`
        moments = Moments(torch.where(finite, all_.count, 0.0), all_.mean, all_.m2)
        return cls(moments, int(finite.any()), 1, ~finite, values)

    def to(self, device: torch.device | str) -> InputMoments:
        """The same on another device."""
        left_out = self.left_out.to(device) if isinstance(self.left_out, Tensor) else self.left_out
        return InputMoments(self.moments.to(device), self.inputs, self.spoiled, left_out, self.values)

    def __add__(self, new: InputMoments) -> InputMoments:
        """Moments of both; the order changes the last bits."""
        return InputMoments(
            self.moments + new.moments,
            self.inputs + new.inputs,
            self.spoiled + new.spoiled,
            self.left_out | new.left_out,
            self.values + new.values,
        )
