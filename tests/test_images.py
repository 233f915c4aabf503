from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from skimage import color, data

from segcli.errors import ImageError
from segcli.images import (
    MAX_PIXELS,
    SUFFIXES,
    encode_jpeg,
    encode_mask,
    encode_png,
    read_color_map,
    read_image,
    read_label_map,
    read_mask,
)
from segcli.palettes import voc_colormap

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")  # as images.py does outside of pytest

CAT = Image.fromarray(data.chelsea()).resize((61, 41))  # odd sizes, so that rows need padding
RGB = np.asarray(CAT)
GREY = np.asarray(CAT.convert("L"))


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


# ---- formats ----


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.ppm", "a.webp", "a.avif", "a.jpg", "a.gif"])
def test_every_format_opens(tmp_path: Path, name: str) -> None:
    options = {"a.webp": {"lossless": True}, "a.avif": {"quality": 95}, "a.jpg": {"quality": 95}}
    picture = read_image(save(tmp_path / name, CAT, **options.get(name, {})))
    lossy = name in ("a.avif", "a.jpg", "a.gif")
    assert picture.pixels.shape == (41, 61, 3)
    assert np.abs(picture.pixels.astype(int) - RGB).mean() <= (8 if lossy else 0)
    assert picture.notes == ()


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    save(tmp_path / "a.png", CAT).rename(tmp_path / "a.jpg")
    assert np.array_equal(read_image(tmp_path / "a.jpg").pixels, RGB)


def test_pixels_are_writable_and_contiguous_whatever_the_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (save(tmp_path / "a.png", CAT), save(tmp_path / "b.jpg", CAT, exif=exif)):
        flags = read_image(path).pixels.flags
        assert flags.writeable
        assert flags.c_contiguous


# ---- orientation ----


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_would(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", CAT, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(read_image(path).pixels, expected)


def test_orientation_6_turns_a_quarter_to_the_right(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    marked = np.zeros((2, 3, 3), np.uint8)
    marked[0, 0] = 255  # top left in the file, top right on the screen
    pixels = read_image(save(tmp_path / "a.png", Image.fromarray(marked), exif=exif)).pixels
    assert pixels[..., 0].tolist() == [[0, 255], [0, 0], [0, 0]]


def test_orientation_of_deep_grey_and_of_class_maps(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    deep = save(tmp_path / "a.png", Image.fromarray(GREY.astype(np.uint16) * 257), exif=exif)
    assert np.array_equal(read_image(deep).pixels[..., 0], np.rot90(GREY))
    assert np.array_equal(read_label_map(deep), np.rot90(GREY.astype(np.uint16) * 257))


def test_unreadable_exif_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", CAT, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert read_image(path).pixels.shape == (41, 61, 3)


# ---- modes ----


def test_grey_modes(tmp_path: Path) -> None:
    assert np.array_equal(read_image(save(tmp_path / "l.png", CAT.convert("L"))).pixels[..., 1], GREY)
    bilevel = CAT.convert("1")
    pixels = read_image(save(tmp_path / "1.png", bilevel)).pixels
    assert np.array_equal(pixels[..., 2], np.asarray(bilevel) * np.uint8(255))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 511, 32768, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), values)
    picture = read_image(tmp_path / f"a.{suffix}")
    assert picture.pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]  # the high byte
    assert picture.notes == ("16-bit scaled to 8",)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_rgb_is_scaled_like_grey(tmp_path: Path, suffix: str) -> None:
    deep = RGB.astype(np.uint16) * 256 + 200
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), deep[..., ::-1])
    picture = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(picture.pixels, RGB)
    assert picture.notes == ("16-bit scaled to 8",)


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 256, 65535))
    assert read_image(save(tmp_path / "a.tif", image)).pixels[0, :, 0].tolist() == [0, 1, 255]


def test_tiff_where_white_is_zero(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 65535]], np.uint16))
    path = save(tmp_path / "a.tif", image, tiffinfo={262: 0})
    with Image.open(path) as written:
        assert written.tag_v2[262] == 0
    assert read_image(path).pixels[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255], "values 0 to 1 scaled to 8 bits"),
        ([0.0, 100.4, 255.0], [0, 100, 255], None),
        ([-1.0, 0.0, 4.0], [0, 51, 255], "values -1 to 4 scaled to 8 bits"),
        ([np.nan, 300.0, 400.0], [0, 0, 255], "values 300 to 400 scaled to 8 bits"),
        ([-3e38, np.inf, 3e38], [0, 0, 255], "values -3e+38 to 3e+38 scaled to 8 bits"),
        ([700.0, 700.0, 700.0], [0, 0, 0], "values 700 to 700 scaled to 8 bits"),
    ],
)
def test_floating_point_tiff(
    tmp_path: Path, values: list[float], expected: list[int], note: str | None
) -> None:
    picture = read_image(save(tmp_path / "a.tif", Image.fromarray(np.array([values], np.float32))))
    assert picture.pixels[0, :, 0].tolist() == expected
    assert picture.notes == ((note,) if note else ())


def test_32_bit_tiff(tmp_path: Path) -> None:
    small = Image.fromarray(np.array([[0, 1, 200]], np.int32))
    assert read_image(save(tmp_path / "a.tif", small)).pixels[0, :, 0].tolist() == [0, 1, 200]
    large = Image.fromarray(np.array([[-100, 0, 155]], np.int32))
    assert read_image(save(tmp_path / "b.tif", large)).pixels[0, :, 0].tolist() == [0, 100, 255]


def test_nothing_but_nan_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.full((2, 2), np.nan, np.float32)))
    with pytest.raises(ImageError, match="finite"):
        read_image(path)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 51, 255]  # clear, a fifth, opaque
    expected = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]  # 0.2 * 200 + 0.8 * 255 = 244
    for name in ("a.png", "a.tif", "a.webp"):
        options = {"lossless": True, "exact": True} if name == "a.webp" else {}
        picture = read_image(save(tmp_path / name, Image.fromarray(rgba), **options))
        assert picture.pixels[0].tolist() == expected
        assert picture.notes == ()
    la = Image.fromarray(rgba[..., [0, 3]])
    assert read_image(save(tmp_path / "la.png", la)).pixels[0, :, 1].tolist() == [255, 244, 200]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for name in ("a.png", "a.gif"):
        pixels = read_image(save(tmp_path / name, image, transparency=1)).pixels
        assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    alphas = read_image(save(tmp_path / "b.png", image, transparency=bytes([255, 0, 255]))).pixels
    assert alphas[0, 1].tolist() == [255, 255, 255]


def test_a_transparent_colour_is_white(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert read_image(save(tmp_path / "l.png", grey, transparency=7)).pixels[0, :, 0].tolist() == [255, 8]
    deep = Image.fromarray(np.array([[7, 800]], np.uint16))
    assert read_image(save(tmp_path / "i.png", deep, transparency=800)).pixels[0, :, 0].tolist() == [0, 255]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    pixels = read_image(save(tmp_path / "rgb.png", rgb, transparency=(4, 5, 6))).pixels
    assert pixels[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    picture = read_image(save(tmp_path / "a.jpg", CAT.convert("CMYK"), quality=95))
    assert np.abs(picture.pixels.astype(int) - RGB).mean() < 4
    assert picture.notes == ("CMYK without a colour profile",)


def test_cmyk_with_a_broken_profile_falls_back(tmp_path: Path) -> None:
    cmyk = CAT.convert("CMYK")
    plain = read_image(save(tmp_path / "a.tif", cmyk))
    odd = read_image(save(tmp_path / "b.tif", cmyk, icc_profile=b"this is not a profile"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of the wrong colour space
    wrong = read_image(save(tmp_path / "c.tif", cmyk, icc_profile=srgb))
    assert np.array_equal(odd.pixels, plain.pixels)
    assert np.array_equal(wrong.pixels, plain.pixels)
    assert odd.notes == wrong.notes == ("CMYK without a colour profile",)


def test_cmyk_by_its_profile(tmp_path: Path) -> None:
    # The profile maps ink to Lab through a 2x2x2x2 table where only K matters: L* = 100 (1 - K), a = b = 0.
    picture = read_image(
        save(
            tmp_path / "a.tif",
            Image.fromarray(
                np.array([[[255, 255, 255, 0], [0, 0, 0, 128], [0, 0, 0, 255]]], np.uint8), "CMYK"
            ),
            icc_profile=_key_only_profile(),
        )
    )
    white, middle, black = picture.pixels[0].astype(int).tolist()
    assert picture.notes == ("CMYK by its colour profile",)
    assert min(white) >= 253  # full C, M and Y would be black without the profile
    assert max(black) <= 3
    assert np.allclose(middle, 119, atol=4)  # L* = 50 is 119 in sRGB


def _key_only_profile() -> bytes:
    """A CMYK output profile (ICC v2) with the table `lut8`: 4 inputs, 2 grid points, 3 outputs."""
    identity = bytes(range(256))
    grid = b"".join(bytes([255 * (1 - k), 128, 128]) for _ in range(8) for k in (0, 1))  # K varies fastest
    unit = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + identity * 4 + grid + identity * 3
    text = b"key only\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),  # D50
        b"A2B0": lut,
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    illuminant = struct.pack(">3i", 63190, 65536, 54061)
    header = struct.pack(
        ">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02100000, b"prtr", b"CMYK", b"Lab "
    )
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + illuminant
    return header.ljust(128, b"\0") + table + body


def test_lab_and_ycbcr_tiff(tmp_path: Path) -> None:
    lab = color.rgb2lab(RGB)  # L 0..100, a and b signed
    stored = (
        np.dstack([lab[..., 0] * 255 / 100, lab[..., 1], lab[..., 2]])
        .round()
        .astype(np.int16)
        .astype(np.uint8)
    )
    picture = read_image(save(tmp_path / "lab.tif", Image.fromarray(stored, "LAB")))
    assert (
        np.abs(picture.pixels.astype(int) - RGB).mean() < 4
    )  # stored white is D50 for one, D65 for the other
    ycbcr = read_image(save(tmp_path / "y.tif", CAT.convert("YCbCr")))
    assert np.abs(ycbcr.pixels.astype(int) - RGB).mean() < 2


def test_the_first_frame_is_taken_and_said(tmp_path: Path) -> None:
    other = ImageOps.invert(CAT)
    for name, word in (("a.gif", "frames"), ("a.png", "frames"), ("a.webp", "frames"), ("a.tif", "pages")):
        options = {"lossless": True} if name == "a.webp" else {}
        path = save(tmp_path / name, CAT, save_all=True, append_images=[other, other.rotate(90)], **options)
        picture = read_image(path)
        assert picture.notes == (f"first of 3 {word}",)
        assert np.abs(picture.pixels.astype(int) - RGB).mean() < 8


@pytest.mark.parametrize(
    "twin",
    [
        lambda im: (Image.fromarray(np.asarray(im)), "png"),
        lambda im: (im.convert("RGBA"), "png"),
        lambda im: (im.convert("CMYK"), "tif"),
        lambda im: (im.convert("YCbCr"), "tif"),
    ],
)
def test_twins_look_the_same(tmp_path: Path, twin: Callable[[Image.Image], tuple[Image.Image, str]]) -> None:
    image, suffix = twin(CAT)
    pixels = read_image(save(tmp_path / f"a.{suffix}", image)).pixels
    assert (np.abs(pixels.astype(int) - RGB).max(axis=2) <= 4).mean() > 0.98


def _examples() -> dict[str, tuple[Image.Image, str, dict[str, Any]]]:
    """A file for every row of the table in docs/formats.md: picture, suffix, options of saving."""
    floats = np.array([[0.0, 0.5, 1.0]], np.float32)
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": [CAT.rotate(90), CAT.rotate(180)]}
    return {
        "8-bit RGB": (CAT, "png", {}),
        "8-bit grey": (CAT.convert("L"), "png", {}),
        "1-bit": (CAT.convert("1"), "png", {}),
        "palette": (CAT.quantize(16), "png", {}),
        "transparent": (CAT.convert("RGBA"), "png", {}),
        "16-bit grey": (deep, "png", {}),
        "TIFF where white is zero": (CAT.convert("L"), "tif", {"tiffinfo": {262: 0}}),
        "floating point, 0 to 1": (Image.fromarray(floats), "tif", {}),
        "floating point or 32-bit, 0 to 255": (Image.fromarray(floats * 200), "tif", {}),
        "floating point or 32-bit, other values": (Image.fromarray(floats * 5 - 1), "tif", {}),
        "CMYK and YCCK with a colour profile": (
            CAT.convert("CMYK"),
            "tif",
            {"icc_profile": _key_only_profile()},
        ),
        "CMYK and YCCK without one": (CAT.convert("CMYK"), "jpg", {}),
        "YCbCr and Lab TIFF": (CAT.convert("YCbCr"), "tif", {}),
        "EXIF orientation 2 to 8": (CAT, "jpg", {"exif": exif}),
        "animation": (CAT, "png", several),
        "several pages": (CAT, "tif", several),
    }


def test_the_table_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    assert set(re.findall(r"`(\.\w+)`", text.split("|")[0])) == SUFFIXES
    assert f"{MAX_PIXELS:,} pixels" in text
    table = text.split("|---|---|---|\n")[1].split("\n\n")[0]
    rows = {
        kind.strip(): note.strip(" `")
        for _, kind, _, note, _ in (line.split("|") for line in table.splitlines())
    }
    elsewhere = {"16-bit RGB", "12-bit grey TIFF"}  # Pillow cannot write them; they have tests of their own
    examples = _examples()
    assert {kind.split(":")[0] for kind in rows} - elsewhere == examples.keys()
    for kind, note in rows.items():
        if kind.split(":")[0] in examples:
            image, suffix, options = examples[kind.split(":")[0]]
            assert read_image(save(tmp_path / f"a.{suffix}", image, **options)).notes == (
                (note,) if note else ()
            )


def test_12_bit_tiff(tmp_path: Path) -> None:
    # Two pixels of 12 bits: 0x000 and 0xfff, in three bytes.
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = struct.pack("<2sHI", b"II", 42, 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries
    (tmp_path / "a.tif").write_bytes(content + bytes(4))
    picture = read_image(tmp_path / "a.tif")
    assert picture.pixels[0, :, 0].tolist() == [0, 255]
    assert picture.notes == ("12-bit scaled to 8",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_pictures_are_converted_in_strips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    rgba = np.dstack([RGB, GREY])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(rgba), exif=exif)
    whole = read_image(path).pixels
    monkeypatch.setattr("segcli.images._STRIP_PIXELS", 61 * 4)  # 41 rows: ten strips of 4 and one of 1
    assert np.array_equal(read_image(path).pixels, whole)


# ---- what is no picture ----


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello world", "not an image (it starts with 'hello world')"),
        (b"\x01\x02\xff\xfe and so on", "not an image (it starts with 01 02 ff fe 20 61 6e 64)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript and PDF are not supported"),
        (b"MM\0+\0\x08\0\0", "big-endian BigTIFF is not supported"),
        (b"II+\0\x08\0\0\0", "its header is damaged"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported"),
        (b"\x89PNG\r\n\x1a\n and no header", "damaged"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / "a.jpg")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    for path, reason in (
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo.jpg", "not a regular file"),
        (tmp_path / "missing.jpg", "No such file"),
        (tmp_path / "missing.npy", "No such file"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_label_map(path)


def _variants() -> dict[str, bytes]:
    def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    return {
        "jpeg": encoded(CAT, "JPEG"),
        "progressive": encoded(CAT, "JPEG", progressive=True),
        "cmyk": encoded(CAT.convert("CMYK"), "JPEG"),
        "png": encoded(CAT, "PNG"),
        "palette": encoded(CAT.quantize(32), "PNG"),
        "deep png": encoded(deep, "PNG"),
        "webp": encoded(CAT, "WEBP"),
        "tiff": encoded(CAT, "TIFF"),
        "lzw": encoded(CAT, "TIFF", compression="tiff_lzw"),
        "jpeg in tiff": encoded(CAT, "TIFF", compression="jpeg"),
        "fax": encoded(CAT.convert("1"), "TIFF", compression="group4"),
        "float": encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "bmp": encoded(CAT, "BMP"),
        "gif": encoded(CAT, "GIF", save_all=True, append_images=[CAT.rotate(90)]),
        "ppm": encoded(CAT, "PPM"),
        "avif": encoded(CAT, "AVIF"),
    }


VARIANTS = _variants()


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_cut_file_is_an_error_or_complete(tmp_path: Path, kind: str) -> None:
    content = VARIANTS[kind]
    path = tmp_path / "a"
    path.write_bytes(content)
    whole = read_image(path).pixels
    failures = 0
    for length in {
        *np.linspace(0, len(content) - 1, 25).astype(int).tolist(),
        *range(len(content) - 16, len(content)),
    }:
        path.write_bytes(content[:length])
        try:
            pixels = read_image(path).pixels
        except ImageError:
            failures += 1
        else:
            assert np.array_equal(pixels, whole), f"{kind} cut at {length} of {len(content)}"
    assert failures >= 12  # at most the end, or later frames, may be missing


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_damaged_file_is_read_or_reported(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    path = tmp_path / "a"
    for _ in range(20):
        content = bytearray(VARIANTS[kind])
        start = int(rng.integers(len(content) if rng.random() < 0.6 else 64))
        size = int(rng.integers(1, 40))
        content[start : start + size] = rng.bytes(size if rng.random() < 0.6 else int(rng.integers(0, 80)))
        path.write_bytes(content)
        for read in (read_image, read_mask):
            with contextlib.suppress(ImageError):  # any other exception fails the test
                read(path)


def test_nothing_is_printed_about_damaged_files(tmp_path: Path) -> None:
    names = []
    for kind in ("jpeg in tiff", "fax", "png", "gif"):
        names.append(str(tmp_path / kind))
        content = VARIANTS[kind]
        Path(names[-1]).write_bytes(content[: len(content) - 60])
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\x06\0\0\0"  # more values than there are
    )
    names.append(str(save(tmp_path / "exif.jpg", CAT, exif=exif)))
    three, many = (struct.pack("<HHIHH", 277, 3, 1, samples, 0) for samples in (3, 65535))
    samples = save(tmp_path / "samples.tif", CAT)
    assert three in samples.read_bytes()
    samples.write_bytes(samples.read_bytes().replace(three, many))  # what Pillow logs about it is not shown
    names.append(str(samples))
    code = """
import sys, pathlib
from segcli.images import read_image
from segcli.errors import ImageError
for name in sys.argv[1:]:
    try:
        read_image(pathlib.Path(name))
    except ImageError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_size_is_judged_before_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", CAT)
    with pytest.raises(ImageError, match=r"61 x 41 pixels are more than the limit of 2,500"):
        read_image(path, max_pixels=2500)
    assert read_image(path, max_pixels=2501).pixels.shape == (41, 61, 3)
    bomb = bytearray(path.read_bytes())
    bomb[16:24] = struct.pack(">II", 100_000, 90_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    path.write_bytes(bomb)
    with pytest.raises(ImageError, match="more"):
        read_image(path)


# ---- class maps ----

IDS = np.array([[0, 1, 2], [3, 20, 255]], np.uint8)


def test_palette_masks_give_ids_and_their_palette(tmp_path: Path) -> None:
    image = Image.fromarray(IDS)
    image.putpalette(voc_colormap().tobytes())
    labels, palette = read_mask(save(tmp_path / "a.png", image))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, IDS)
    assert palette is not None
    assert np.array_equal(palette, voc_colormap())


def test_a_short_palette_is_filled_with_black(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([1, 2, 3, 4, 5, 6])
    _, palette = read_mask(save(tmp_path / "a.png", image))
    assert palette is not None
    assert palette.shape == (256, 3)
    assert palette[:3].tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0]]


def test_grey_masks_have_no_palette(tmp_path: Path) -> None:
    labels, palette = read_mask(save(tmp_path / "a.png", Image.fromarray(IDS)))
    assert palette is None
    assert np.array_equal(labels, IDS)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_masks(tmp_path: Path, suffix: str) -> None:
    ids = np.array([[0, 300, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), ids)
    labels = read_label_map(tmp_path / f"a.{suffix}")
    assert labels.tolist() == ids.tolist()
    assert labels.dtype in (np.uint16, np.int32)


def test_two_and_four_bit_grey_keep_their_ids(tmp_path: Path) -> None:
    # Pillow spreads few bits over 0..255: id 3 of 2 bits reads as 255, id 3 of 4 bits as 51.
    for bits in (2, 4):
        row = 0b00011011 if bits == 2 else 0x03
        header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes([0, row]))), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
        (tmp_path / "a.png").write_bytes(content)
        assert read_label_map(tmp_path / "a.png").tolist() == [[0, 1, 2, 3] if bits == 2 else [0, 3]]


def test_pgm_with_a_small_maximum_keeps_its_ids(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 20\n" + bytes([0, 7, 20]))
    assert read_label_map(tmp_path / "a.pgm").tolist() == [[0, 7, 20]]
    (tmp_path / "b.pgm").write_bytes(b"P2 3 1 1000\n0 7 1000\n")
    assert read_label_map(tmp_path / "b.pgm").tolist() == [[0, 7, 1000]]
    (tmp_path / "c.pgm").write_bytes(b"P2 3 1 255\n0 7 255\n")
    assert read_label_map(tmp_path / "c.pgm").tolist() == [[0, 7, 255]]


def test_one_bit_masks_are_0_and_1(tmp_path: Path) -> None:
    assert read_label_map(save(tmp_path / "a.png", Image.fromarray(IDS > 2))).tolist() == [
        [0, 0, 0],
        [1, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16, ">i4", np.bool_])
def test_npy_masks(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "a.npy", (IDS % 2).astype(dtype))
    labels = read_label_map(tmp_path / "a.npy")
    assert labels.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert labels.dtype in (np.uint8, np.uint16, np.int32)
    assert labels.flags.writeable


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((2, 2), np.float32), "whole numbers"),
        (np.zeros((2, 2, 3), np.uint8), r"shape \(2, 2, 3\)"),
        (np.zeros((0, 2), np.uint8), "shape"),
        (np.array([[0, -1]]), "negative id -1"),
        (np.array([[2**31]]), "too large"),
        (np.array([[None]]), "not a NumPy array of numbers"),
    ],
)
def test_npy_files_that_are_no_class_maps(tmp_path: Path, values: Any, reason: str) -> None:
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(ImageError, match=reason):
        read_label_map(tmp_path / "a.npy")


def test_a_cut_or_lying_npy_allocates_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 8), np.uint8))
    content = (tmp_path / "a.npy").read_bytes()
    lying = content.replace(b"(8, 8), ", b"(99999999999, 8), ".ljust(8))
    unclosed = content.replace(b"(8, 8), }", b"(8, 8(, }")
    assert unclosed != content
    for wrong in (content[:-1], content[:60], b"", lying, unclosed):
        (tmp_path / "a.npy").write_bytes(wrong)
        with pytest.raises(ImageError):
            read_label_map(tmp_path / "a.npy")


def test_pictures_are_refused_as_class_maps_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="--to-ids"):
        read_label_map(save(tmp_path / "a.png", CAT))
    with pytest.raises(ImageError, match="JPEG changes the values"):
        read_label_map(save(tmp_path / "a.jpg", CAT.convert("L")))
    with pytest.raises(ImageError, match="JPEG changes the values"):
        read_color_map(save(tmp_path / "b.tif", CAT, compression="jpeg"))
    with pytest.raises(ImageError, match="fractions"):
        read_label_map(save(tmp_path / "c.tif", Image.fromarray(np.zeros((2, 2), np.float32))))


# ---- encoding ----


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_a_mask_is_a_palette_png_of_ids() -> None:
    image = _open(encode_mask(IDS, voc_colormap()))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), IDS)
    assert image.getpalette("RGB") == voc_colormap().ravel().tolist()  # all 256 entries
    assert np.array_equal(np.asarray(image.convert("RGB")), voc_colormap()[IDS])


def test_ids_above_255_need_16_bits() -> None:
    ids = np.array([[0, 256, 65535]], np.int32)
    image = _open(encode_mask(ids, voc_colormap()))
    assert image.mode == "I;16"
    assert np.asarray(image).tolist() == ids.tolist()
    assert _open(encode_mask(IDS, voc_colormap(65536))).mode == "I;16"  # the set has more than 256 classes
    assert _open(encode_mask(IDS.astype(np.int32), voc_colormap())).mode == "P"
    with pytest.raises(ImageError, match="id 70000 does not fit"):
        encode_mask(np.array([[70000]]), voc_colormap())


def test_masks_survive_the_round_trip(tmp_path: Path) -> None:
    for ids in (IDS, np.array([[0, 999]], np.uint16)):
        (tmp_path / "a.png").write_bytes(encode_mask(ids, voc_colormap()))
        labels = read_label_map(tmp_path / "a.png")
        assert labels.dtype == ids.dtype
        assert np.array_equal(labels, ids)


def test_png_is_exact_and_rgb() -> None:
    assert np.array_equal(np.asarray(_open(encode_png(np.ascontiguousarray(RGB)))), RGB)
    assert np.array_equal(np.asarray(_open(encode_png(GREY))), GREY)


def test_jpeg_keeps_red_red() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, 8:] = (255, 0, 0)
    image = _open(encode_jpeg(red, 95))
    assert np.abs(np.asarray(image).astype(int) - red).max() <= 4  # also at the edge: no colour subsampling
    with pytest.raises(ImageError, match="do not fit into a JPEG"):
        encode_jpeg(np.zeros((1, 70000, 3), np.uint8))
