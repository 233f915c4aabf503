"""Image files to arrays and back: one way in, whatever the format, mode or orientation.

Pictures come out as a viewer shows them: uint8 (H, W, 3) RGB, EXIF orientation applied, 16-bit scaled,
transparency on white. Class maps come out as their ids. docs/formats.md tells what happens to each kind.
Files come from users: formats are an allow-list, sizes are judged from the header, and only a file that
decodes to its end counts as read.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, _imaging

from segcli.errors import ImageError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer[Any]]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")  # of Pillow; EPS and the like never
_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm .pfm .avif"
SUFFIXES = frozenset(_SUFFIXES.split())  # lower case
MAX_PIXELS = 2**28  # 268 megapixels: every camera's pictures, and 0.8 GB of RGB

# Pillow's own bound would refuse honest pictures above 179 megapixels, and warn above 89.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Pillow's remarks on odd files (corrupt EXIF, ...) would reach the terminal; here a file is read or reported.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
with contextlib.suppress(OSError, AttributeError):  # and libtiff, inside Pillow, prints by itself
    _set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    _set_handler.argtypes, _set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    _set_handler(None)

_STRIP_PIXELS = 2**19  # pictures are converted in strips: what they pass through stays in the caches
_WHITE = (255, 255, 255)
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


@dataclass(frozen=True)
class Picture:
    """An image as displayed: `pixels` uint8 (H, W, 3) RGB, and what had to be done to get it, for people."""

    pixels: Pixels
    notes: tuple[str, ...] = ()


Announce = Callable[[int], object]  # hears how many pixels there are, before they are decoded


def _nobody(pixels: int) -> None:
    pass


def read_image(path: Path, max_pixels: int = MAX_PIXELS, announce: Announce = _nobody) -> Picture:
    """Read a picture as a viewer shows it.

    Args:
        path: A file in one of `FORMATS`; its suffix does not matter.
        max_pixels: Files whose header announces more are refused before they are decoded.
        announce: Called with the number of pixels by the header, before decoding.

    Raises:
        ImageError: The file is not a picture, is damaged, cut off or too large. The message is the reason.
        MemoryError: The picture does not fit into memory.
    """
    with _decoded(path, max_pixels, announce) as (image, tile):
        orientation = _orientation(image)
        notes: list[str] = []
        if image.mode.startswith(("I", "F")):
            pixels = _rgb_of_deep_grey(image, orientation, notes)
        else:
            if ";16" in _rawmode(tile):  # Pillow has kept the high bytes
                notes.append("16-bit scaled to 8")
            pixels = _rgb(image, orientation, notes)
        with contextlib.suppress(Exception):  # the first frame is fine, whatever follows it
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                notes.append(f"first of {frames} {'pages' if image.format == 'TIFF' else 'frames'}")
    return Picture(pixels, tuple(notes))


def read_color_map(path: Path, max_pixels: int = MAX_PIXELS, announce: Announce = _nobody) -> Pixels:
    """Read a colour-coded label map, uint8 (H, W, 3) RGB. Raises ImageError, also for lossy formats."""
    with _decoded(path, max_pixels, announce) as (image, _):
        _refuse_lossy(image)
        return _rgb(image, _orientation(image), [])


def read_label_map(path: Path, max_pixels: int = MAX_PIXELS) -> Labels:
    """The class ids of a mask (H, W): `read_mask` without the palette."""
    return read_mask(path, max_pixels)[0]


def read_mask(
    path: Path, max_pixels: int = MAX_PIXELS, announce: Announce = _nobody
) -> tuple[Labels, Pixels | None]:
    """Read a class map: a palette, grey or 16-bit picture, or a two-dimensional .npy file.

    Returns:
        The ids (H, W) in uint8, uint16 or int32, never negative;
        and the file's own palette, uint8 (256, 3), when it has one.

    Raises:
        ImageError: Not a class map (a colour picture, a lossy file, fractions, negative ids), or unreadable.
    """
    if path.suffix.lower() == ".npy":
        return _read_npy(path, max_pixels), None
    with _decoded(path, max_pixels, announce) as (image, tile):
        _refuse_lossy(image)
        values: npt.NDArray[Any] = np.asarray(image)
        if image.mode == "F":
            raise ImageError("it holds fractions, but class ids are whole numbers")
        if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
            raise ImageError(
                f"a colour picture (mode {image.mode}), not a class map; "
                "segcli colorize --to-ids --palette NAME turns colours into ids"
            )
        labels = np.ascontiguousarray(_displayed(_checked_ids(_unscaled(values, tile)), _orientation(image)))
        return labels, _own_palette(image)


# ---- opening ----


@contextlib.contextmanager
def _decoded(path: Path, max_pixels: int, announce: Announce) -> Iterator[tuple[Image.Image, Any]]:
    """The first frame, fully loaded, and Pillow's note on how it was stored (the first tile, or None).

    Whatever Pillow raises here or in the block becomes an ImageError with a short reason.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError("not a regular file")  # a FIFO would block for ever
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"{image.width:,} x {image.height:,} pixels are more than the limit of {max_pixels:,}"
                )
            announce(image.width * image.height)
            tile = image.tile[0] if image.tile else None
            image.load()
            yield image, tile
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(_unidentified(path)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more pixels than the limit of {max_pixels:,}") from error
    except Exception as error:  # on damaged files Pillow raises about every built-in exception
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"cannot be read: {error.strerror}") from error
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ImageError(f"damaged or unsupported: {reason}") from error


_STARTS = (
    (
        rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|II[*+]\0|MM\0\*|BM|GIF8|P[1-7Ff]\s|....ftypavi",
        "its header is damaged, or of a kind that is not supported",
    ),
    (rb"MM\0\+", "big-endian BigTIFF is not supported; convert it to TIFF or PNG"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "HEIC is not supported; convert it to JPEG or PNG"),
    (rb"\0\0\0\x0cjP|\xff\x4f\xff\x51", "JPEG 2000 is not supported; convert it to TIFF or PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6|%PDF", "PostScript and PDF are not supported; convert it to PNG"),
    (rb"version https://git-lfs", "only a Git LFS pointer; fetch the picture with: git lfs pull"),
)


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(24)
    if not start:
        return "the file is empty"
    for pattern, reason in _STARTS:
        if re.match(pattern, start, re.DOTALL):
            return reason
    shown = repr(start.decode()) if start.isascii() else start[:8].hex(" ")
    return f"not an image (it starts with {shown})"


def _refuse_lossy(image: Image.Image) -> None:
    if image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression", "")):
        raise ImageError("JPEG changes the values of pixels, so it cannot hold classes; use the original PNG")


def _rawmode(tile: Any) -> str:
    """Pillow's name for the stored layout, such as "L;4" or "RGB;16B"."""
    args = tile.args if tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


# ---- orientation ----


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Call it after load(): TIFF files are turned by Pillow while loading."""
    with contextlib.suppress(Exception):  # unreadable EXIF does not make the picture unreadable
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(1, 9):
            return int(orientation)
    return 1


def _displayed(stored: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """A view (H, W, ...) of stored pixels in the order in which they are shown."""
    match orientation:
        case 2:
            return stored[:, ::-1]
        case 3:
            return stored[::-1, ::-1]
        case 4:
            return stored[::-1]
        case 5:
            return stored.swapaxes(0, 1)
        case 6:
            return np.rot90(stored, -1)  # a quarter turn to the right
        case 7:
            return stored[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return np.rot90(stored)
    return stored


def _turned(stored: Pixels, orientation: int) -> Pixels:
    """`_displayed` for (h, w, 3), several times as fast where it is copied anyway."""
    if orientation == 2:
        return cv2.flip(stored, 1).astype(np.uint8, copy=False)
    turn = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}.get(orientation)
    if turn is not None:
        return cv2.rotate(stored, turn).astype(np.uint8, copy=False)
    if orientation in (5, 7):
        return _turned(cv2.transpose(stored).astype(np.uint8, copy=False), 3 if orientation == 7 else 1)
    return _displayed(stored, orientation)


def _stored(displayed: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """The inverse view: shown pixels in the order in which the file stores them."""
    return _displayed(displayed, {6: 8, 8: 6}.get(orientation, orientation))


# ---- to 8-bit RGB ----


def _rgb(image: Image.Image, orientation: int, notes: list[str]) -> Pixels:
    """Pixels (H, W, 3) of every mode but deep grey. The only copy of the full size is the result."""
    convert = _converter(image, notes)
    height, width = image.height, image.width
    pixels = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    stored = _stored(pixels, orientation)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        block = _displayed(stored[top : top + rows], orientation)
        block[...] = _turned(np.asarray(convert(strip)), orientation)
    return pixels


def _converter(image: Image.Image, notes: list[str]) -> Callable[[Image.Image], Image.Image]:
    if image.has_transparency_data:
        return _on_white
    if image.mode == "CMYK":
        transform = _cmyk_transform(image)
        notes.append("CMYK by its colour profile" if transform else "CMYK without a colour profile")
        if transform:
            return transform.apply
    return lambda strip: strip if strip.mode == "RGB" else strip.convert("RGB")


def _on_white(strip: Image.Image) -> Image.Image:
    if strip.mode == "La":
        strip = strip.convert("LA")  # Pillow has no direct way from premultiplied grey
    color = strip.info.get("transparency")
    if isinstance(color, tuple) and max(color) > 255:
        strip.info["transparency"] = tuple(value >> 8 for value in color)  # of a 16-bit file
    rgba = strip.convert("RGBA")
    paper = Image.new("RGB", rgba.size, _WHITE)
    paper.paste(rgba, mask=rgba)
    return paper


def _cmyk_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """From the file's CMYK profile to sRGB; None without a usable profile."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info.get("icc_profile", b"")))
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
    return None


def _rgb_of_deep_grey(image: Image.Image, orientation: int, notes: list[str]) -> Pixels:
    """Pixels (H, W, 3) of 16-bit, 32-bit and floating-point grey."""
    values: npt.NDArray[Any] = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # TIFF
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):
        bits = 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
        grey = (values >> (bits - 8)).astype(np.uint8)  # the high byte, as for 16-bit RGB
        notes.append(f"{bits}-bit scaled to 8")
    else:
        grey = _stretched(values, notes)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = ~grey  # white is zero
    if image.mode == "I;16" and "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    shown = _displayed(grey, orientation)
    return np.repeat(shown[..., None], 3, axis=2)


def _stretched(values: npt.NDArray[Any], notes: list[str]) -> Pixels:
    """Grey without a natural white: as it is within 0..255, times 255 within 0..1, else by its own range."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ImageError("no pixel has a finite value")
    known = values if finite.all() else values[finite]
    low, high = float(known.min()), float(known.max())
    if low >= 0 and high <= 255 and (high > 1 or values.dtype.kind == "i"):
        scaled = values
    elif low >= 0 and high <= 1:
        notes.append("values 0 to 1 scaled to 8 bits")
        scaled = values * 255
    else:
        notes.append(f"values {low:g} to {high:g} scaled to 8 bits")
        scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1))
    return np.where(finite, np.rint(scaled), 0).astype(np.uint8)


# ---- to class ids ----


def _unscaled(values: npt.NDArray[Any], tile: Any) -> npt.NDArray[Any]:
    """Undo what Pillow does to spread few bits, or a small PPM maximum, over the full range."""
    step = {"L;2": 85, "L;4": 17}.get(_rawmode(tile))
    if step:
        return values // step
    if tile and tile.codec_name.startswith("ppm") and len(tile.args) > 1:
        full = 255 if values.dtype == np.uint8 else 65535
        stored: npt.NDArray[Any] = np.rint(values * (tile.args[1] / full)).astype(values.dtype)
        return stored
    return values


def _checked_ids(values: npt.NDArray[Any]) -> Labels:
    """Whole, non-negative numbers below 2^31 as uint8, uint16 or int32."""
    if values.dtype.kind not in "biu":
        raise ImageError(f"it holds {values.dtype} values, but class ids are whole numbers")
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.size and values.min() < 0:
        raise ImageError(f"it holds the negative id {values.min()}; use 255 for pixels to ignore")
    if values.size and values.max() >= 2**31:
        raise ImageError(f"it holds the id {values.max()}, which is too large")
    return values.astype(np.int32)


def _own_palette(image: Image.Image) -> Pixels | None:
    if image.mode != "P":
        return None
    own = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(own)] = own
    return palette


def _read_npy(path: Path, max_pixels: int) -> Labels:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a lying header allocates nothing
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged header makes NumPy's parser raise about every built-in exception
        raise ImageError("not a NumPy array of numbers, or cut off") from error
    if values.ndim != 2 or not values.size:
        raise ImageError(f"an array of shape {values.shape}; a class map has the shape (height, width)")
    if values.size > max_pixels:
        raise ImageError(f"{values.size:,} pixels are more than the limit of {max_pixels:,}")
    return np.array(_checked_ids(values))


# ---- writing: bytes for files.write_atomic ----


def encode_mask(labels: Labels, palette: Pixels) -> bytes:
    """A class map as PNG whose pixel values are the ids.

    Args:
        labels: Ids (H, W), 0..65535.
        palette: uint8 (256, 3); a longer one, like an id above 255, gives 16-bit grey without colours.

    Raises:
        ImageError: An id does not fit into 16 bits.
    """
    largest = int(labels.max(initial=0))
    if largest > 65535:
        raise ImageError(f"id {largest} does not fit into a 16-bit mask")
    if largest > 255 or len(palette) > 256:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        image = Image.fromarray(labels.astype(np.uint8, copy=False))
        image.putpalette(palette.tobytes())
    file = io.BytesIO()
    # Runs of equal ids say it all: no slower than any level, and smaller than all but the slowest.
    image.save(file, "PNG", compress_type=zlib.Z_RLE)
    return file.getvalue()


def encode_png(pixels: Pixels) -> bytes:
    """A lossless picture: uint8 (H, W, 3) RGB, or (H, W) grey."""
    strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    row_filter = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]  # best for flat colours
    return _encode(".png", pixels, strategy + row_filter)


def encode_jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """A JPEG of uint8 (H, W, 3) RGB or (H, W) grey, with full colour resolution, so that edges stay crisp.

    Raises:
        ImageError: A side is longer than JPEG allows.
    """
    if max(pixels.shape[:2]) > 65500:
        raise ImageError(f"{pixels.shape[1]:,} x {pixels.shape[0]:,} pixels do not fit into a JPEG")
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])


def _encode(suffix: str, pixels: Pixels, options: list[int]) -> bytes:
    swapped = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    _, data = cv2.imencode(suffix, swapped, options)
    return data.tobytes()
