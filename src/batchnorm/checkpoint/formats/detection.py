"""The format of a file, recognized by its bytes; for a file of another format, an error names that format."""

from __future__ import annotations

from typing import BinaryIO

from batchnorm.checkpoint.formats import other_files
from batchnorm.checkpoint.refusal import RESAVE, RefusalError

_EXPECTED = "a file of torch.save, .safetensors or .onnx"
_TAR = 257  # offset of the mark of a tar file
# the number that begins torch's format before 1.6, in pickle protocols 2 to 5, then in 0 and 1
_LEGACY = (b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"L119547037146038801333356L\n.")


def of(file: BinaryIO) -> str:
    """The format: "pt" (zip), "legacy", "pickle", "safetensors" or "onnx"; an error says what any other file is."""
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "pt"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[_TAR : _TAR + 5] == b"ustar":
        raise RefusalError(_EXPECTED, "a tar file, torch's format until 0.1.10 or an archive", f"Unpack it. {RESAVE}")
    if any(magic in head[:40] for magic in _LEGACY):
        return "legacy"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "pickle"
    if head and (other := other_files.of_content(file, head)) is not None:
        raise RefusalError(_EXPECTED, *other)
    is_like_onnx = head[:1] == b"\x08" and head[1:2] < b"\x80" and len(head) > 2
    if is_like_onnx and other_files.has_graph(file):
        return "onnx"
    if head and (other := other_files.of_name(file)) is not None:
        raise RefusalError(_EXPECTED, *other)
    if is_like_onnx:
        return "onnx"
    raise RefusalError(_EXPECTED, *other_files.of_bytes(head))
