"""Mixed statistics: new and stored statistics combined, and the layers that may get them.

New statistics (mean m_t, variance v_t, of n examples) are mixed with stored ones (m_s, v_s) as if the stored ones were
N more examples. With w = N / (N + n),

    m = w m_s + (1 - w) m_t,      v = w v_s + (1 - w) v_t + w (1 - w) (m_s - m_t)^2.

The last term is the spread between the two means. Schneider et al. 2020, "Improving robustness against common
corruptions by covariate shift adaptation", section 3, leave it out, so their variance is too small if the means differ,
which is when adaptation is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.layers import batch_norms
from batchnorm.moments import Moments
from batchnorm.other_libraries import layers_of_others, unreached
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.freezing import statistics_of
from batchnorm.population.stored_statistics import open_layers
from batchnorm.population.tensor_memory import require

if TYPE_CHECKING:
    from batchnorm.population.stored_statistics import Layers


def adaptable(model: nn.Module, name: str) -> Layers:
    """The layers whose statistics may be replaced, by path.

    Frozen layers, and layers in eval mode inside a model in train mode, keep their statistics by the user's choice.
    Layers of other libraries that never measure a batch are returned, because no user froze them. Layers without stored
    statistics are left out.

    Raises:
        ValueError: If there is no such layer, or its statistics cannot be read here; ``name`` names the caller in it.
        TypeError: If such a layer is complex.
    """
    require_real(model, name)
    layers = open_layers(model, {**batch_norms(model), **layers_of_others(model)}, name)
    if not layers:
        raise ValueError(
            f"{name} needs batch norm layers that store statistics and are not frozen, got {type(model).__name__} "
            f"without such a layer. Unfreeze its layers, or use the model before they are folded.{unreached(model)}"
        )
    require(statistics_of(layers), name)
    return layers


def mixed(layer: tuple[Tensor, Tensor], weight: float, new: Moments, new_weight: Tensor | float) -> Moments:
    """Statistics of ``weight`` stored and ``new_weight`` new examples, including the spread between their means.

    A layer should store ``mean`` and ``var`` of the result: the variance of ``new`` counts as unbiased, because stored
    variances are. A single value has no spread: it counts with variance 0.
    """
    mean, var = (buffer.detach().double() for buffer in layer)
    spread = torch.where(new.count > 1, new.unbiased_var, 0.0)
    return Moments.from_var(weight, mean, var) + Moments.from_var(new_weight, new.mean, spread)
