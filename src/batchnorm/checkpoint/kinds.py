"""Which format a file has, told by its first bytes, and what it is if it is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.checkpoint.refusal import RESAVE, RefusalError

if TYPE_CHECKING:
    from typing import BinaryIO

_EXPECTED = "a file of torch.save, .safetensors or .onnx"
_TAR = 257  # where a tar file says that it is one
_OTHERS = {
    b"\x89PNG": ("a PNG image", "Give the checkpoint."),
    b"\xff\xd8\xff": ("a JPEG image", "Give the checkpoint."),
    b"%PDF": ("a PDF document", "Give the checkpoint."),
    b"\x89HDF": ("an HDF5 file, as Keras writes", "Load it in Keras and save it as .onnx."),
    b"\x93NUMPY": ("a NumPy array", RESAVE),
    b"GGUF": ("a GGUF file", RESAVE),
    b"\x1f\x8b": ("a gzip file", "Unpack it: gunzip."),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "Unpack it: zstd -d."),
    b"version https://git-lfs": ("a Git LFS pointer in the file's place", "Run: git lfs pull."),
}


def of(file: BinaryIO) -> str:
    """ "pt" (zip), "legacy", "safetensors" or "onnx"; the refusal of anything else says what it looks like."""
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "pt"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[_TAR : _TAR + 5] == b"ustar":
        raise RefusalError(_EXPECTED, "a tar file, torch's format until 0.1.10 or an archive", f"Unpack it. {RESAVE}")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "legacy"
    if head[:1] == b"\x08" and head[1:2] < b"\x80" and len(head) > 2:
        return "onnx"
    raise RefusalError(_EXPECTED, *_other(head))


def _other(head: bytes) -> tuple[str, str]:
    for magic, described in _OTHERS.items():
        if head.startswith(magic):
            return described
    if not head:
        return "an empty file", "Copy or download it again."
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page, such as a download's error", "Download the file itself."
    if b'"weight_map"' in head:
        return "the index of a checkpoint in parts", "Give each of the files that it names."
    if head.isascii() and b"\0" not in head:
        return f"text, {head[:40].decode()!a}", "Give the checkpoint."
    return f"bytes that begin with {head[:8].hex(' ')}", "Give the checkpoint."
