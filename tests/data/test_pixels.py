"""Images as cameras and tools write them come out as a viewer shows them."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from fedmerge.data import load
from fedmerge.data._pixels import decode_images
from fedmerge.errors import DataError

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # grey, 8 wide and 6 high
COLOUR = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 77)], axis=-1)
ORIENTED = {  # EXIF 2.32, tag 0x0112: how to undo each orientation
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


def saved(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(*encoded: bytes) -> np.ndarray:
    """``(H, W)`` or ``(H, W, 3)`` of the first image."""
    pixels = decode_images(encoded, "here")[0]
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("orientation", [*ORIENTED, 0, 9, 1000])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_photos_are_turned_upright(kind: str, orientation: int) -> None:
    image = PIL.Image.fromarray(COLOUR)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    expected = ORIENTED.get(orientation, lambda a: a)(COLOUR)
    found = decoded(saved(image, kind, exif=exif, **options))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected, atol=40 if kind == "JPEG" else 0)


def test_an_orientation_that_cannot_be_read_says_nothing() -> None:
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(RAMP), exif=b"Exif\0\0II*\0nonsense")), RAMP)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    deep = RAMP.astype(np.uint16) * 257  # 0 .. 65535, of which each step of 257 is one of 8 bits
    encoded = saved(PIL.Image.fromarray(deep), kind)
    np.testing.assert_array_equal(decoded(encoded), RAMP)


def test_sixteen_bits_of_which_zero_is_white_are_turned_round() -> None:
    deep = RAMP.astype(np.uint16) * 257
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(deep), "TIFF", tiffinfo={262: 0})), 255 - RAMP)


def test_sixteen_bits_of_colour_are_scaled() -> None:
    deep = (COLOUR.astype(">u2") * 257).reshape(6, -1)

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = (8).to_bytes(4, "big") + (6).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])  # width, height, 16 bits, RGB
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    encoded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decoded(encoded), COLOUR)


def test_floats_from_0_to_1_are_scaled_and_others_have_no_white() -> None:
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(np.float32(RAMP / 255)), "TIFF")), RAMP)
    for wrong in (RAMP.astype(np.float32), np.full((6, 8), np.nan, np.float32), np.float32(RAMP) - 1):
        with pytest.raises(DataError, match="image 0: its values are floats from .* to .*what is white is not known"):
            decoded(saved(PIL.Image.fromarray(wrong), "TIFF"))


def test_integers_of_32_bits_have_no_white() -> None:
    with pytest.raises(
        DataError, match="image 0: its values are integers from 0 to 235, and what is white.*save it with 8 or 16"
    ):
        decoded(saved(PIL.Image.fromarray(RAMP.astype(np.int32)), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("1", "TIFF"), ("L", "BMP"), ("LA", "PNG"), ("L", "JPEG2000"), ("L", "TGA")],
)
def test_grey_images_of_every_mode_keep_one_channel(mode: str, kind: str) -> None:
    values = np.where(RAMP > 100, 255, 0).astype(np.uint8)
    image = PIL.Image.fromarray(values)
    found = decoded(
        saved(image.convert(mode, dither=PIL.Image.Dither.NONE) if mode == "1" else image.convert(mode), kind)
    )
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P"])
def test_what_is_transparent_is_white_and_what_is_half_is_half(mode: str) -> None:
    alpha = np.full_like(RAMP, 255)
    alpha[0], alpha[1] = 0, 128
    grey = PIL.Image.fromarray(RAMP)
    if mode == "P":  # one colour of the palette is transparent: 0, which is hidden under row 0
        values = np.maximum(RAMP, 1)
        values[0] = 0
        image = PIL.Image.fromarray(values)
        image = image.convert("P")
        image.putpalette([value for value in range(256) for _ in range(3)])
        found = decoded(saved(image, "PNG", transparency=0))
        expected = np.where(values == 0, 255, values)
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))
        return
    image = grey.convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(PIL.Image.fromarray(alpha))
    found = decoded(saved(image, "TIFF" if mode == "PA" else "PNG"))
    expected = np.rint(RAMP * (alpha / 255) + 255 * (1 - alpha / 255))
    np.testing.assert_allclose(found if found.ndim == 2 else found[..., 0], expected, atol=1)
    assert (found[0] == 255).all()


def test_one_transparent_colour_of_an_image_without_palette_is_white() -> None:
    found = decoded(saved(PIL.Image.fromarray(COLOUR), transparency=tuple(map(int, COLOUR[2, 3]))))
    expected = COLOUR.copy()
    expected[2, 3] = 255
    np.testing.assert_array_equal(found, expected)


def test_cmyk_of_both_polarities_is_shown_as_colours() -> None:
    solid = np.zeros((16, 16, 4), np.uint8)
    solid[..., 0] = 255  # cyan ink alone
    encoded = saved(PIL.Image.fromarray(solid, "CMYK"), "JPEG", quality=100)  # written inverted, with Adobe's marker
    assert b"Adobe" in encoded
    np.testing.assert_allclose(decoded(encoded).astype(int)[8, 8], [0, 255, 255], atol=3)
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(solid, "CMYK"), "TIFF"))[8, 8], [0, 255, 255])


def test_ycbcr_is_shown_as_colours() -> None:
    image = PIL.Image.fromarray(COLOUR).convert("YCbCr")
    np.testing.assert_allclose(decoded(saved(image, "TIFF")).astype(int), COLOUR, atol=3)


def _swapped() -> bytes:
    """An RGB profile in which red and green are exchanged: sRGB's, with the names of its two columns swapped."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = plain.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_a_profile_become_those_of_srgb(mode: str) -> None:
    image = PIL.Image.new("RGB", (8, 6), (200, 40, 90))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    np.testing.assert_allclose(decoded(saved(image, icc_profile=_swapped())).astype(int)[0, 0], [40, 200, 90], atol=2)


@pytest.mark.parametrize("profile", [b"nonsense", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_a_profile_that_is_broken_or_srgb_already_changes_nothing(profile: bytes) -> None:
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(COLOUR), icc_profile=profile)), COLOUR)
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(RAMP), icc_profile=profile)), RAMP)


def test_a_profile_of_colours_in_a_grey_image_is_none() -> None:
    np.testing.assert_array_equal(decoded(saved(PIL.Image.fromarray(RAMP), icc_profile=_swapped())), RAMP)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_or_of_pages_the_first_is_taken(kind: str) -> None:
    first, *others = (PIL.Image.fromarray(frame) for frame in (COLOUR, 255 - COLOUR, COLOUR // 2))
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = saved(first, kind, save_all=True, append_images=others, **options)
    with PIL.Image.open(io.BytesIO(encoded)) as opened:
        assert opened.n_frames == 3
    np.testing.assert_allclose(decoded(encoded).astype(int), COLOUR, atol=40 if kind == "GIF" else 0)


def test_grey_images_before_coloured_ones_become_coloured() -> None:
    pixels = decode_images([saved(PIL.Image.fromarray(a)) for a in (RAMP, RAMP // 2, COLOUR, RAMP)], "here")
    expected = [np.repeat(RAMP[None], 3, 0), np.repeat(RAMP[None] // 2, 3, 0), COLOUR.transpose(2, 0, 1)]
    np.testing.assert_array_equal(pixels[:3], expected)
    np.testing.assert_array_equal(pixels[3], expected[0])


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (1, 6, 8)])
def test_arrays_of_grey_pixels_are_images(shape: tuple[int, ...]) -> None:
    for kind in (np.uint8, np.int64, np.float64):
        np.testing.assert_array_equal(decode_images([RAMP.reshape(shape).astype(kind)], "here"), RAMP[None, None])


def test_arrays_of_colours_have_their_channels_first_or_last_and_may_be_transparent() -> None:
    expected = COLOUR.transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(decode_images([COLOUR], "here"), expected)
    np.testing.assert_array_equal(decode_images([expected[0]], "here"), expected)
    clear = np.concatenate([COLOUR, np.zeros_like(RAMP)[..., None]], axis=2)
    assert (decode_images([clear], "here") == 255).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"x.png: it is empty \(0 bytes\)"),
        (b"not an image", "x.png: it is no image of a known format; take it out, or save it as PNG or JPEG"),
        (saved(PIL.Image.fromarray(COLOUR))[:60], "x.png: .*(truncated|broken|incomplete)"),
        (saved(PIL.Image.fromarray(COLOUR), "JPEG")[:-20], "x.png: .*truncated"),
        (saved(PIL.Image.fromarray(COLOUR), "GIF")[:30], "x.png: "),
        (saved(PIL.Image.fromarray(COLOUR), "TIFF")[:200], "x.png: "),
        (saved(PIL.Image.fromarray(COLOUR), "WEBP")[:50], "x.png: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "x.png: .*run `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "x.png: it is a web page"),
    ],
)
def test_files_that_cannot_be_decoded_are_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(saved(PIL.Image.fromarray(COLOUR)))
    (tmp_path / "cat" / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"\(train\): cannot decode cat/{reason}") as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("most", [3, 30])  # PIL refuses at twice its limit, and warns at once it
def test_an_image_that_would_fill_the_memory_is_refused(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(DataError, match=rf"cannot decode image 0: it has more than {most} pixels; make it smaller"):
        decoded(saved(PIL.Image.fromarray(COLOUR)))


def test_images_that_do_not_fit_into_memory_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.data._pixels.usable_memory", lambda: 100)
    with pytest.raises(DataError, match="here: 3 images of 8x6 pixels need .* GiB, .* are free; make them smaller"):
        decode_images([saved(PIL.Image.fromarray(RAMP))] * 3, "here")
