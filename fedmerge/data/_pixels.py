"""From encoded images, as cameras and tools write them, to uint8 arrays."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
from PIL import ImageCms

from fedmerge.errors import DataError
from fedmerge.files import mistaken
from fedmerge.memory import usable_memory
from fedmerge.progress import steps

Pixels = npt.NDArray[np.uint8]
Cell = bytes | Path | npt.NDArray[Any]
"""An image: its encoded bytes, its file, or its pixels."""

_INDIRECT = ("P", "PA", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV")  # modes that no ICC profile speaks of


def decode_images(given: Sequence[Cell], where: str, name: Callable[[int], str] = "image {}".format) -> Pixels:
    """Images to uint8 ``(N, C, H, W)``: one channel where every image is grey, else three.

    Each comes out as a viewer shows it: turned upright by its EXIF orientation, colours of an embedded ICC profile
    or of CMYK as sRGB, transparency over white, 16 bits a channel scaled to 8, of an animation or of several pages
    the first.

    Args:
        given: The images.
        where: What to call them all in messages.
        name: What to call the one at a position.

    Raises:
        DataError: Names the first image that cannot be read, or differs in size.
    """
    if not given:
        raise DataError(f"{where} holds no images")
    pixels: Pixels | None = None
    with _quiet():
        for row, cell in enumerate(steps(f"decoding {where}", given)):
            try:
                image = _from_array(cell) if isinstance(cell, np.ndarray) else _from_encoded(cell)
            except Exception as error:  # decoders of broken files raise errors of many kinds
                raise DataError(f"{where}: cannot decode {name(row)}: {_reason(cell, error)}") from error
            if pixels is None:
                _check_room(len(given), image, where)
                pixels = np.empty((len(given), *image.shape), np.uint8)
            if image.shape[1:] != pixels.shape[2:]:
                first, odd = (f"{shape[-1]}x{shape[-2]}" for shape in (pixels.shape, image.shape))
                raise DataError(
                    f"{where}: {name(row)} is {odd} pixels, {name(0)} is {first}; resize all images to one size"
                )
            if len(image) > pixels.shape[1]:  # the first coloured one after grey ones
                pixels = np.repeat(pixels, 3, axis=1)
            pixels[row] = image
    assert pixels is not None
    return pixels


def _from_encoded(given: bytes | Path) -> Pixels:
    with PIL.Image.open(io.BytesIO(given) if isinstance(given, bytes) else given) as image:
        image.load()
        return _channels(_upright(image), image)


def _from_array(given: npt.NDArray[Any]) -> Pixels:
    """Pixels ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with whole values from 0 to 255."""
    shape = given.shape
    if given.dtype.kind not in "buif" or given.ndim not in (2, 3) or not given.size:
        raise ValueError(f"it holds {given.dtype} of shape {shape}; expected (H, W), (H, W, C) or (C, H, W)")
    if given.dtype.kind == "b" or not (given.min() >= 0 and given.max() <= 255 and bool((given % 1 == 0).all())):
        raise ValueError(f"its values run from {given.min()} to {given.max()}; expected whole numbers from 0 to 255")
    array = given.astype(np.uint8)
    if array.ndim == 2:
        return array[None]
    if shape[2] in (1, 3, 4):
        array = array.transpose(2, 0, 1)
    elif shape[0] not in (1, 3, 4):
        raise ValueError(f"its shape is {shape}; expected 1, 3 or 4 channels, first or last")
    return _over_white(array[:3], array[3]) if len(array) == 4 else array


def _channels(image: PIL.Image.Image, source: PIL.Image.Image) -> Pixels:
    """``(1 or 3, H, W)`` of an upright image; ``source`` is what the file said of it."""
    if image.mode.startswith(("I", "F")):
        pixels = _eight_bits(image, source)[None]
        clear = image.info.get("transparency")
        return pixels if clear is None else np.where(np.asarray(image) == clear, np.uint8(255), pixels)
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = None
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("LA" if grey else "RGBA")
        alpha = np.asarray(image.getchannel("A"))
    image = _in_srgb(image.convert("L") if grey else image.convert("RGB") if image.mode in _INDIRECT else image)
    colours = np.asarray(image.convert("L"))[None] if grey else np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return colours if alpha is None else _over_white(colours, alpha)


def _eight_bits(image: PIL.Image.Image, source: PIL.Image.Image) -> Pixels:
    """Deep grey values scaled, not clipped: 16 bits by their range, floats from [0, 1]."""
    values = np.asarray(image)
    tags: Any = getattr(source, "tag_v2", {})  # a TIFF's: 258 bits, 339 = 2 signed, 262 = 0 white is zero
    most = 1 if image.mode == "F" else 2 ** (tags.get(258, (16,))[0] - (tags.get(339, (1,))[0] == 2)) - 1
    if most > 65535 or not (values.min() >= 0 and values.max() <= most):
        known = "floats" if image.mode == "F" else "integers"
        raise ValueError(
            f"its values are {known} from {values.min():g} to {values.max():g}, and what is white is not known; save "
            "it with 8 or 16 bits a channel, or as floats from 0 to 1"
        )
    shares = values / most
    return _rounded(255 * (1 - shares if tags.get(262) == 0 else shares))


def _in_srgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Its colours moved from its ICC profile to sRGB; a profile that is broken, or of another mode, is none."""
    profile = image.info.get("icc_profile")
    try:
        if image.mode == "LAB":
            given: Any = ImageCms.createProfile("LAB")
        elif profile and not ImageCms.getProfileDescription(io.BytesIO(profile)).startswith("sRGB"):
            given = io.BytesIO(profile)
        else:
            return image
        return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return image


def _over_white(colours: Pixels, alpha: Pixels) -> Pixels:
    share = alpha.astype(np.float32) / 255
    return _rounded(colours * share + 255 * (1 - share))


def _rounded(values: npt.NDArray[Any]) -> Pixels:
    nearest: Pixels = np.rint(values).astype(np.uint8)
    return nearest


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turned and mirrored as its orientation says; one that cannot be read says nothing."""
    try:
        return PIL.ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF raises errors of many kinds, and viewers show the image all the same
        return image


def _check_room(count: int, image: Pixels, where: str) -> None:
    free = usable_memory()
    if count * image.size > free:
        sides = "x".join(map(str, image.shape[:0:-1]))
        raise DataError(
            f"{where}: {count} images of {sides} pixels need {count * image.size / 2**30:.3g} GiB, "
            f"{free / 2**30:.3g} GiB are free; make them smaller"
        )


def _reason(cell: Cell, error: Exception) -> str:
    if isinstance(cell, Path) and (wrong := mistaken(cell)):
        return wrong
    if isinstance(cell, bytes) and not cell:
        return "it is empty (0 bytes)"
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is no image of a known format; take it out, or save it as PNG or JPEG"
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        return f"it has more than {PIL.Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    return " ".join(f"{error}".split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings about oddities of a file are for its author; one about its size is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        yield
