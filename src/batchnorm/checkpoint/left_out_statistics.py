"""Batch norm layers of a file whose statistics are not in it: files of parameters alone, and adapters (PEFT, LoRA).

A file shows such a layer only by its name: batch norm without statistics has the tensors of other normalizations, a
weight and a bias of one axis. So a module counts as batch norm if its last word says so, such as ``bn1``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from batchnorm.checkpoint.averaged_copies import STATISTICS, Entry, Keys, Words, snake
from batchnorm.checkpoint.file_tensors import Tensor

_BATCH_NORM = re.compile(r"(.*_)?(bn|bnorm|batch_?norm)(\d*[a-z]?)?(_.*)?", re.IGNORECASE)
# PEFT puts a trained copy of a module under these two words: bn1.modules_to_save.default
_COPIES = "modules_to_save"
# words in the names of tensors that PEFT, kohya and LyCORIS save for adapters
_ADAPTER = re.compile(
    r"(.*[._])?(lora_[ab]|lora_(up|down|mid|embedding_[ab]|magnitude_vector)|hada_w\d_[ab]|lokr_w\d(_[ab])?"
    r"|oft_[rs]|boft_[rs]|ia3_l|vera_lambda_[bd]|vera_[ab]|dora_scale)([._].*)?",
    re.IGNORECASE,
)
_PEFT = "base_model.model."


def without_statistics(tensors: Iterable[Entry]) -> dict[str, int]:
    """The layers whose names say batch norm and that have gamma and beta, but no statistics; number of channels."""
    modules: dict[tuple[Keys, Words], dict[str, Tensor | int]] = defaultdict(dict)
    for entry in tensors:
        modules[entry.path, entry.words][entry.leaf] = entry.tensor
    return {
        ".".join(words): sizes.pop()
        for (_, words), own in modules.items()
        if is_named(words) and len(sizes := _sizes(own)) == 1 and not own.keys() & set(STATISTICS)
    }


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors with these names belong to an adapter of another model."""
    return any(name.startswith(_PEFT) or _ADAPTER.fullmatch(name) for name in names)


def is_named(words: Words) -> bool:
    """Whether the last word of a module's path says batch norm."""
    last = module_of(words)[-1:]
    return bool(last) and _BATCH_NORM.fullmatch(snake(last[0])) is not None


def module_of(words: Words) -> Words:
    """The path of a module in the model, without the words of PEFT's copy of it."""
    return words[:-2] if words[-2:-1] == (_COPIES,) else words


def _sizes(tensors: dict[str, Tensor | int]) -> set[int]:
    """The numbers of elements of weight and bias; {} unless both have one axis."""
    pair = [tensors.get("weight"), tensors.get("bias")]
    vectors = [tensor.numel for tensor in pair if isinstance(tensor, Tensor) and len(tensor.size) == 1]
    return set(vectors) if len(vectors) == len(pair) else set()
