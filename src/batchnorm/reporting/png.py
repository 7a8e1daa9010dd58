"""PNG files of pictures, for pages that load nothing."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) as a PNG file with 8 bits per colour; values are clipped to 0..1 (W3C: PNG, 3rd edition)."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, colour type 2 (red, green, blue)
    lines = b"".join(b"\0" + line.numpy().tobytes() for line in pixels)  # filter type 0 before each line
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
