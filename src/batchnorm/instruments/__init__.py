"""Instruments: what batch norm does in a user's own model, measured while it trains or at one look.

``watch`` measures a training at a cost that lets one leave it on, ``probe`` looks once. Both have two cheap tiers: what
the running averages say (``snapshots``, ``noise``, ``census``) and what a fixed batch shows (``probing``,
``propagation``, ``drift``). Dearer measurements are asked for one by one. None changes the model.
"""

from batchnorm.instruments.probing import probe
from batchnorm.instruments.watching import Sink, Watch, watch

__all__ = ["Sink", "Watch", "probe", "watch"]
