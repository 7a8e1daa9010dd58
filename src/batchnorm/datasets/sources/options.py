"""Options: how files are read and cut into pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How files are read.

    Args:
        format: Name of the format of all files, such as "csv"; "" if suffixes and first bytes of files decide.
        delimiter: What separates the cells of CSV files; "" for a tab in .tsv and .tab files, and a comma in others.
        header: Whether the first line of CSV files has the names of columns. Without it they are f0, f1, ...
        channel_axis: The axis, or axes, of the features of arrays (.npy, .npz, Zarr, .npy in tar shards), as in
            ``InputNorm``: all other axes are examples and positions. 1 gives one feature for each column of (N, F)
            and each channel of (N, C, H, W); (1, 2, 3) one for each pixel; None one for all values.
        mode: The mode of Pillow to which images are converted: "RGB" as torchvision's ImageFolder does, "L" for one
            channel, "RGBA", ...; "" for the mode of each file, which must then be the same in all files.
        piece_bytes: Bytes of a piece of a large CSV or array file, about.
        piece_images: Images of a piece of an image folder.
    """

    format: str = ""
    delimiter: str = ""
    header: bool = True
    channel_axis: int | tuple[int, ...] | None = 1
    mode: str = "RGB"
    piece_bytes: int = 64 << 20
    piece_images: int = 256
