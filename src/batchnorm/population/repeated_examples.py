"""Repeated examples: samplers that give every rank equally many examples repeat some at the end, which do not count.

``DistributedSampler`` gives rank r of n the examples r, r + n, r + 2n, ... of an order, and accelerate's
``BatchSamplerShard`` gives process r the batches r, r + n, ... Both continue from the start of the order if the data
set ends. So the examples that count are the first of each rank.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler

# modules whose functions make a batch with one row per example
_ROWS = ("torch.utils.data.", "transformers.data.")


def own_examples(loader: Any, ranks: int) -> int | None:
    """How many of the first examples of a rank's loader are no repetitions; None if all are, or it is not known.

    It is not known for samplers of other kinds or other numbers of ranks, and for loaders whose batches are items of
    the data set (``batch_size=None``) or are made by a function of the user, because then rows need not be examples.

    Args:
        loader: A ``DataLoader``, or an object with its attributes.
        ranks: Number of ranks.
    """
    collate = getattr(loader, "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # the Trainer's removes columns, and calls another
    if not str(getattr(collate, "__module__", type(collate).__module__)).startswith(_ROWS):
        return None
    shard = getattr(loader, "batch_sampler", None)
    if type(shard).__name__ == "BatchSamplerShard":
        return _of_shard(shard, ranks)
    sampler: Any = _sampler_of(loader, shard)
    if getattr(type(sampler), "__iter__", None) is not DistributedSampler.__iter__ or sampler.num_replicas != ranks:
        return None
    own = len(range(sampler.rank, len(sampler.dataset), ranks))
    return own if own < len(sampler) else None


def _sampler_of(loader: Any, batches: Any) -> Any:
    """The sampler of examples, from which torch's functions make ``batches`` of indices; None if there is none."""
    if isinstance(batches, BatchSampler) and type(batches).__iter__ is BatchSampler.__iter__:
        return batches.sampler
    return None if batches is None else getattr(loader, "sampler", None)


def _of_shard(shard: Any, ranks: int) -> int | None:
    """As ``own_examples``, for accelerate's ``BatchSamplerShard``."""
    size, batches = shard.batch_size, shard.batch_sampler
    if shard.num_processes != ranks or shard.split_batches or size is None or not hasattr(batches, "sampler"):
        return None
    whole, rest = divmod(len(batches.sampler), size)
    index = shard.process_index
    own = size * len(range(index, whole, ranks)) + (rest if whole % ranks == index else 0)
    return own if own < size * len(shard) else None
