"""Good pictures of every format and mode, and broken ones that are made from them with a fixed seed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms
from small_model import picture

ORIENTATION = 0x0112
SIZE = (32, 48)  # (height, width) of the good pictures


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def good_files() -> dict[str, bytes]:
    """File name -> content. Every one of them has to be segmented."""
    image = Image.fromarray(picture(*SIZE, seed=1))
    grey = image.convert("L")
    alpha = image.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = [image.rotate(angle).quantize(64) for angle in (0, 90, 180)]
    animated = {"save_all": True, "append_images": frames[1:]}
    files = {
        "baseline.jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "grey.jpg": encoded(grey, "JPEG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "icc.jpg": encoded(image, "JPEG", icc_profile=profile),
        "rgb.png": encoded(image, "PNG"),
        "icc.png": encoded(image, "PNG", icc_profile=profile),
        "grey.png": encoded(grey, "PNG"),
        "one_bit.png": encoded(image.convert("1"), "PNG"),
        "palette.png": encoded(image.quantize(32), "PNG"),
        "transparent.png": encoded(image.quantize(32), "PNG", transparency=0),
        "alpha.png": encoded(alpha, "PNG"),
        "grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "lossy.webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(alpha, "WEBP", lossless=True),
        "moving.webp": encoded(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=frames[1:]),
        "plain.tif": encoded(image, "TIFF"),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(image, "TIFF", compression="jpeg"),
        "fax.tif": encoded(image.convert("1"), "TIFF", compression="group4"),
        "deep.tif": encoded(deep, "TIFF"),
        "float.tif": encoded(Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF"),
        "cmyk.tif": encoded(image.convert("CMYK"), "TIFF"),
        "pages.tif": encoded(image, "TIFF", save_all=True, append_images=[image, image]),
        "big_endian.tif": big_endian_tiff(np.asarray(grey)),
        "rgb.bmp": encoded(image, "BMP"),
        "palette.bmp": encoded(image.quantize(16), "BMP"),
        "still.gif": encoded(frames[0], "GIF"),
        "moving.gif": encoded(frames[0], "GIF", **animated),
        "rgb.ppm": encoded(image, "PPM"),
        "grey.pgm": encoded(grey, "PPM"),
        "one_bit.pbm": encoded(image.convert("1"), "PPM"),
        "picture.avif": encoded(image, "AVIF", speed=10),
        "one.png": encoded(image.crop((0, 0, 1, 1)), "PNG"),
        "wide.jpg": encoded(image.resize((300, 10)), "JPEG"),
        "tall.webp": encoded(image.resize((10, 300)), "WEBP"),
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        files[f"turned{orientation}.jpg"] = encoded(image, "JPEG", exif=exif)
    return files


def big_endian_tiff(grey: np.ndarray) -> bytes:
    """A TIFF as old workstations wrote it; Pillow itself writes the other byte order only."""
    height, width = grey.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 0),
            (277, 3, 1), (278, 3, height), (279, 4, grey.size)]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    directory = struct.pack(">H", len(tags))
    for tag, kind, value in tags:
        value = start if tag == 273 else value
        directory += struct.pack(
            ">HHIHH" if kind == 3 else ">HHII", tag, kind, 1, value, *([0] * (kind == 3))
        )
    return b"MM\0*" + struct.pack(">I", 8) + directory + struct.pack(">I", 0) + grey.tobytes()


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def _flip(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 3, 10, 50))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _flip_header(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 2, 4))):
        changed[dice.randrange(min(64, len(changed)))] = dice.randrange(256)
    return bytes(changed)


def _wipe(data: bytes, dice: random.Random) -> bytes:
    start, length = dice.randrange(len(data)), dice.randrange(1, 200)
    return data[:start] + bytes(length) + data[start + length :]


def _insert(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    return data[:start] + dice.randbytes(dice.randrange(1, 40)) + data[start:]


def _drop(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    return data[:start] + data[start + dice.randrange(1, 100) :]


def _large_numbers(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(max(1, min(200, len(data)) - 4))
    return data[:start] + dice.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4))) + data[start + 4 :]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut, _cut, _flip, _flip_header, _wipe, _insert, _drop, _large_numbers,
)  # fmt: skip


def good_masks() -> dict[str, bytes]:
    """File name -> content of class maps, in every format that holds them."""
    ids = np.asarray(Image.fromarray(picture(*SIZE, seed=1)).convert("L").resize((48, 32))) // 13
    palette = Image.fromarray(ids)
    palette.putpalette(list(range(256)) * 3)
    array = io.BytesIO()
    np.save(array, ids.astype(np.int64))
    return {
        "palette.png": encoded(palette, "PNG"),
        "grey.png": encoded(Image.fromarray(ids), "PNG"),
        "deep.png": encoded(Image.fromarray(ids.astype(np.uint16)), "PNG"),
        "grey.tif": encoded(Image.fromarray(ids), "TIFF", compression="tiff_lzw"),
        "palette.bmp": encoded(palette, "BMP"),
        "palette.gif": encoded(palette, "GIF"),
        "grey.pgm": encoded(Image.fromarray(ids), "PPM"),
        "array.npy": array.getvalue(),
    }


def broken_files(
    count: int, seed: int = 0, good: Callable[[], dict[str, bytes]] = good_files
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of damaged files, of every format in turn; some of them can still be read."""
    dice = random.Random(seed)
    originals = sorted(good().items())
    for number in range(count):
        name, data = originals[number % len(originals)]
        damage = dice.choice(DAMAGES)
        yield f"{number:04}{damage.__name__}_{name}", damage(data, dice)


def png_of(width: int, height: int, rows: bytes, bits: int = 8, color: int = 0) -> bytes:
    """A PNG with any header, around any compressed rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that promise, or unpack to, more pixels than any picture has."""
    zeros = zlib.compress(bytes(20_000 * 2501), 9)  # 20000 rows of 1-bit pixels: 400 megapixels
    much = zlib.compress(bytes(50_000_000), 9)
    small = encoded(Image.new("L", (8, 8)), "PNG")
    jpeg = encoded(Image.new("L", (8, 8)), "JPEG")
    size = jpeg.index(b"\xff\xc0") + 5  # height and width in the header of the frame
    tiff = big_endian_tiff(np.zeros((1, 1), np.uint8))
    width, strips = struct.pack(">HHIHH", 256, 3, 1, 1, 0), struct.pack(">HHI", 273, 4, 1)

    def bitmap(bits: int, compression: int) -> bytes:
        header = struct.pack("<IHHIIiiHHI", 54, 0, 0, 54, 40, 60_000, 60_000, 1, bits, compression)
        return b"BM" + header + bytes(20)

    def with_chunk(content: bytes) -> bytes:
        """The small picture with one more chunk: its kind and what is in it."""
        chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        return small[:33] + chunk + small[33:]

    return {
        "promise.png": png_of(100_000, 100_000, zlib.compress(bytes(1000))),
        "limit.png": png_of(2**31 - 1, 2**31 - 1, b""),
        "wide.png": png_of(2**31 - 1, 1, zlib.compress(bytes(1000))),
        "tall.png": png_of(1, 2**31 - 1, zlib.compress(bytes(1000))),
        "real.png": png_of(20_000, 20_000, zeros, bits=1),
        "text.png": with_chunk(b"zTXtComment\0\0" + much),
        "international.png": with_chunk(b"iTXtComment\0\1\0\0\0" + much),
        "profile.png": with_chunk(b"iCCPprofile\0\0" + much),
        "promise.jpg": jpeg[:size] + struct.pack(">HH", 65_500, 65_500) + jpeg[size + 4 :],
        "promise.bmp": bitmap(24, 0),
        "runs.bmp": bitmap(8, 1) + bytes(1024) + b"\xff\0\0\1",
        "promise.gif": b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + encoded(Image.new("P", (9, 9)), "GIF")[10:],
        "promise.ppm": b"P6 60000 60000 255\n" + bytes(100),
        "plain.ppm": b"P3 60000 60000 255\n0 0 0",
        "deep.pgm": b"P5 40000 40000 65535\n" + bytes(100),
        "promise.pbm": b"P4 60000 60000\n" + bytes(100),
        "promise.pfm": b"Pf\n60000 60000\n-1\n" + bytes(100),
        "promise.tif": tiff.replace(width, struct.pack(">HHII", 256, 4, 1, 100_000_000)),
        "strips.tif": tiff.replace(strips, struct.pack(">HHI", 273, 4, 2**30)),
        "real.tif": encoded(Image.new("1", (20_000, 20_000)), "TIFF", compression="tiff_adobe_deflate"),
    }
