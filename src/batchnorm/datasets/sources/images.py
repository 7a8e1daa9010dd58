"""Images: decoded by Pillow, converted to one mode, as pixels (H W, channels).

torchvision's ImageFolder converts every image to RGB, and so does the default: a grey image has three equal channels
then. ``mode="L"`` has one channel. The unit of 8-bit modes is 255, of 16-bit modes 65535, of others 1.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.datasets.blocks import Column

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Modes of more than 8 bits, and the value of their full scale; a conversion from 8 bits would not scale the values.
_DEEP = {"I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "I": 1.0, "F": 1.0}


def channels_of(mode: str) -> int:
    """Number of channels of a mode of Pillow.

    Raises:
        ValueError: If Pillow knows no such mode, or its values are no intensities.
    """
    from PIL import Image

    if mode in _DEEP:
        return 1
    try:
        count = Image.getmodebands(mode)
    except KeyError:
        count = 0
    if not count or mode in {"P", "PA", "1"}:
        raise ValueError(f"expected a mode of Pillow such as RGB, L, RGBA or I;16, got {mode!r}. Choose one of them.")
    return count


def mode_of(data: bytes, name: str) -> str:
    """The mode of an encoded image.

    Raises:
        ValueError: If it cannot be decoded.
    """
    return _opened(data, name).mode


def pixels(data: bytes, name: str, mode: str) -> Column:
    """The pixels of an encoded image in a mode.

    Raises:
        ValueError: If it cannot be decoded, has more pixels than Pillow's limit, or has 16 bits where ``mode`` has 8.
    """
    image = _opened(data, name)
    if image.mode != mode:
        if image.mode in _DEEP or mode in _DEEP:
            raise ValueError(
                f"expected an image that can be converted to mode {mode} without loss, got {name} of mode "
                f"{image.mode}. Say mode={image.mode!r} (--mode) if all images have it, or leave it out."
            )
        image = _converted(image, mode)
    values = np.asarray(image)
    return Column(values.reshape(-1, channels_of(mode)), unit=_DEEP.get(mode, 255.0))


def _opened(data: bytes, name: str) -> Image.Image:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        _check_size(image)
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels, which is Pillow's limit against files that "
            f"expand without end, got more in {name}. Leave it out, or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # decoders raise errors of many types
        raise ValueError(
            f"expected an image, got {name}, which cannot be decoded: {_reason(error)}. Mend it, or leave it out."
        ) from error
    return image


def _check_size(image: Image.Image) -> None:
    """Pillow warns of images above its limit, and refuses those of twice its limit; here the limit is the limit."""
    from PIL import Image

    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise Image.DecompressionBombError


def _reason(error: Exception) -> str:
    is_unknown = type(error).__name__ == "UnidentifiedImageError"
    return "its format is unknown to Pillow" if is_unknown else str(error).rstrip(".") or type(error).__name__


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in {"P", "PA"} and "transparency" in image.info:
        image = image.convert("RGBA")  # the colours are the same; Pillow warns of the direct conversion
    return image.convert(mode)
