"""How far the stored statistics of several ranks or copies differ, in units of the outputs of eval mode.

With stored means m_r and variances v_r of the ranks r, and their mean variance v, for each channel

    means: (max m_r - min m_r) / sqrt(v + eps)        sds: (max sqrt(v_r) - min sqrt(v_r)) / sqrt(v + eps)

Both are 0 if all ranks store the same. Two ranks that average their own independent batches of M values with momentum a
differ in their means by about sqrt(2 a / ((2 - a) M)); 0.06 for batches of 32 with momentum 0.1.
"""

from __future__ import annotations

from torch import Tensor


def differences_in_sd(means: Tensor, variances: Tensor, eps: Tensor | float) -> tuple[Tensor, Tensor]:
    """The largest differences between two ranks, of stored means and of stored standard deviations, each (C,).

    A channel with NaN or infinity on a rank has NaN.

    Args:
        means: Stored means of the ranks, (ranks, C), in float64.
        variances: Their stored variances, (ranks, C).
        eps: The layer's eps, or those of all channels, (C,).
    """
    unit = (variances.mean(0) + eps).sqrt()
    sds = variances.sqrt()
    return tuple((x.amax(0) - x.amin(0)) / unit for x in (means, sds))  # type: ignore[return-value]
