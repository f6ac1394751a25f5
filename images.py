"""Image files as uint8 arrays: which files are images, how their values become 8 bits, and the decoding of many.

Pillow and torchvision decode; only the rules are here, which docs/data.md states for users. The part of an error before its brackets may
leave a party's machine (see flower/), so a file's name, which may be a patient's, stands in the brackets.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from runtime.cli import RANK, InputError, bars_are_hidden, first_line, locked, os_errors, write_atomic


def note(text: str) -> None:
    """Say something about the user's images, on one line of stderr; of several processes only the first says it."""
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- files

IMAGES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx"),
    *(".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
DICOM = (".dcm", ".dicom", ".ima")
# images that nothing here decodes: they are refused as broken ones are, not passed over
UNDECODED = {
    *(".arw", ".cr2", ".cr3", ".czi", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jxl", ".mha", ".mhd", ".mrxs", ".ndpi", ".nef"),
    *(".nii", ".nii.gz", ".nrrd", ".psd", ".scn", ".svg", ".svs"),
}
BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM")  # of an image whose name does not end as one
# what a system, a notebook, an editor, a browser or a file server leaves in a folder, in small letters
LEFTOVERS = (
    *(".*", "~$*", "*~", "*.tmp", "*.part", "*.partial", "*.crdownload", "thumbs.db", "ehthumbs*.db", "desktop.ini", "icon\r"),
    *("__macosx", "__pycache__", "@eadir", "@__thumb", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found"),
    *("system volume information", "network trash folder", "temporary items"),
)


class Found(NamedTuple):
    """The image files under a folder in the order of their paths, and how many files of which kind were passed over."""

    paths: list[Path]
    passed_over: Counter[str]


def find_images(folder: Path) -> Found:
    """All image files under a folder, each once, however many links lead to it; links are followed.

    Leftovers of systems and files that are no images are counted. Raises InputError if the folder or one inside cannot be listed.
    """
    paths, passed_over, known, links = [], Counter(), set(), []

    def visit(place: Path) -> None:
        for name in listing(place):
            entry = place / name
            if is_leftover(name):
                passed_over["leftovers of a system"] += 1
            elif not entry.is_dir() and not is_image(entry):
                passed_over[f"{entry.suffix.lower() or 'other'} files"] += 1
            elif entry.is_symlink():
                links.append(entry)
            else:
                take(entry)

    def take(entry: Path) -> None:
        if entry.resolve() in known:
            passed_over["links to what is read already"] += 1
            return
        known.add(entry.resolve())
        visit(entry) if entry.is_dir() else paths.append(entry)

    take(folder)
    while links:  # after what lies here, and those near the top first: a link may lead to what has another place of its own
        links.sort(key=lambda link: (len(link.parts), link.is_dir(), link), reverse=True)
        take(links.pop())
    return Found(sorted(paths), passed_over)


def listing(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises InputError where it cannot be read, since its images would else be left out."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"a folder of images cannot be listed ({folder}: {error.strerror})") from None


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was left by a system and is no part of a data set."""
    return any(fnmatch(name.lower(), pattern) for pattern in LEFTOVERS)


def is_image(path: Path) -> bool:
    """Whether a file is meant as an image: by the end of its name, else by its first bytes."""
    name = path.name.lower()
    if path.suffix.lower() in (*IMAGES, *DICOM) or any(map(name.endswith, UNDECODED)):
        return True
    try:
        with path.open("rb") as file:
            head = file.read(132)
        return head.startswith(BEGINNINGS) or is_dicom(path, head)
    except OSError:
        return False


def is_dicom(path: Path, head: bytes) -> bool:
    """Whether a file is meant as DICOM. head: its first 132 bytes."""
    return path.suffix.lower() in DICOM or head[128:] == b"DICM"


class Embedded(bytes):
    """An encoded image inside a larger file, under the name by which it is called."""

    name: str

    def __str__(self) -> str:
        return self.name


# ------------------------------------------------------------------------------------------------------------ pixels

PixelRange = tuple[float, float]  # the values that become 0 and 255, of images above 8 bits
SIXTEEN_BITS: PixelRange = (0.0, 65535.0)


class Decoded(NamedTuple):
    """An image as it is in its file, upright: a Pillow image of 8 bits a channel, or more as values `[H, W]`.

    reduced: whether these 8 bits are the upper ones of more. frames: whether the file holds further images. window: the values that
    the file itself says to become 0 and 255. inverted: whether its lowest value is white.
    """

    image: Image.Image | None
    values: np.ndarray | None = None
    reduced: bool = False
    frames: bool = False
    window: PixelRange | None = None
    inverted: bool = False


def read_file(path: Path | Embedded) -> Decoded:
    """Decode one file; whatever is wrong with it, Pillow's errors of many types included, is raised."""
    if any(map(path.name.lower().endswith, UNDECODED)):
        raise ValueError(f"nothing here decodes {Path(path.name).suffix}; convert it to PNG")
    with io.BytesIO(path) if isinstance(path, Embedded) else path.open("rb") as opened:
        head = opened.read(1 << 16)
        opened.seek(0)
        if isinstance(path, Path) and is_dicom(path, head[:132]):
            return read_dicom(path)
        with Image.open(opened) as file:
            deep, frames = has_deep_channels(file, head), getattr(file, "is_animated", False)
            file.load()
            image = upright(file)
            if not image.mode.startswith(("I", "F")):
                return Decoded(on_white(image), None, deep, frames)
            values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return Decoded(None, values, frames=frames)


def read_dicom(path: Path) -> Decoded:
    """Decode a DICOM file: rescaled as its slope and intercept say, with its first window. Raises InputError where pydicom is missing."""
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut
    except ImportError:
        raise InputError(f"DICOM needs the package pydicom: `pip install -r requirements-optional.txt` ({path})") from None
    content = dcmread(path)
    frames, pixels = int(content.get("NumberOfFrames") or 1) > 1, content.pixel_array
    pixels = pixels[0] if frames else pixels
    if pixels.ndim == 3 and pixels.dtype == np.uint8:
        return Decoded(Image.fromarray(pixels), None, False, frames)
    if pixels.ndim != 2 or content.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"nothing here decodes {content.PhotometricInterpretation} of {pixels.dtype}; convert it to PNG")
    centre, width = (np.atleast_1d(content.get(name) or 0).astype(float)[0] for name in ("WindowCenter", "WindowWidth"))
    window = (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2) if width > 1 else None
    return Decoded(None, apply_modality_lut(pixels, content), False, frames, window, content.PhotometricInterpretation == "MONOCHROME1")


def has_deep_channels(file: Image.Image, head: bytes) -> bool:
    """Whether an opened file has more than 8 bits a channel, which Pillow may be about to reduce without a word. head: its beginning."""
    if file.format in ("AVIF", "JPEG2000"):  # whose plugins do not say it: the formats' own headers do
        box, sizes = head.find(b"av1C"), head.find(b"\xff\x4f\xff\x51")
        return head[box + 6] & 0x40 > 0 if file.format == "AVIF" else head[sizes + 42] & 0x7F > 7
    codecs = [(tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)) for tile in file.tile]
    return any(
        "16" in name or any(";16" in str(a) for a in arguments) or (name.startswith("ppm") and arguments[1] > 255)
        for name, arguments in codecs
    )


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; a damaged EXIF block says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader of EXIF raises errors of many types
        return image


def on_white(image: Image.Image) -> Image.Image:
    """An 8-bit image of any mode as RGB; what is transparent is put on white."""
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    if "transparency" in image.info or image.mode[-1] in "Aa":
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def eight_bits(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Values `[H, W]` as a grey image: low becomes 0, high 255."""
    return Image.fromarray(((values.astype(np.float64) - low) * (255 / (high - low or 1))).clip(0, 255).round().astype(np.uint8))


def choose_range(low: float, high: float, whole: bool) -> PixelRange:
    """The range of values that becomes 0..255, for a set whose values lie in low..high. whole: they are whole numbers.

    That of 16 bits if they are whole numbers that use its upper half, else low..high: scanners and cameras often leave upper bits empty.
    """
    return SIXTEEN_BITS if whole and low >= 0 and SIXTEEN_BITS[1] / 2 < high <= SIXTEEN_BITS[1] else (low, high)


# ------------------------------------------------------------------------------------------------------- many images


DECODER = ("1", PIL.__version__)  # to be changed with the rules of this file, so that no image that was decoded by others is used


class Report(NamedTuple):
    """What decoding a set found: the indices of images that were left out, and lines to say."""

    broken: list[int]
    notes: list[str]


@cache
def square(size: int) -> Callable[[Image.Image], Image.Image]:
    """A transform that resizes an image's shorter side to `size` pixels and cuts out the centre."""
    from torchvision.transforms import CenterCrop, Compose, Resize

    return Compose([Resize(size), CenterCrop(size)])


def decode(
    folder: Path, paths: Sequence[Path | Embedded], size: int, pixel_range: PixelRange | None = None, skip_broken: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Report]:  # fmt: skip
    """Decode image files in parallel into `out`, or a new array, uint8 `[N, 3, S, S]`. Images that are left out have no row in it.

    Images above 8 bits are scaled by `pixel_range`, by default by that of `choose_range` over all of them. folder: their place, for errors.
    Raises InputError for images that cannot be read, unless `skip_broken`, and for a range that needs bits which Pillow has dropped.
    """
    out = np.empty((len(paths), 3, size, size), np.uint8) if out is None else out
    transform = square(size)
    deep: dict[int, tuple[float, float, bool]] = {}  # the lowest and highest value of an image above 8 bits; whether they are whole
    broken: dict[int, Exception] = {}
    reduced, several, waiting, windowed = set(), [], [], []

    def work(index: int) -> None:
        try:
            image, values, is_reduced, frames, window, inverted = read_file(paths[index])
            if is_reduced:
                values = np.asarray(image).astype(np.uint16) * 257
                reduced.add(index)
            if values is not None:
                limits = pixel_range or window
                if limits is not None and limits == window:
                    windowed.append(index)
                else:
                    deep[index] = values.min().item(), values.max().item(), values.dtype.kind in "iu"
                if image is None and limits is None:
                    return waiting.append(index)
                image = image or eight_bits(values, *limits)
                image = ImageOps.invert(image) if inverted else image
            out[index] = np.asarray(transform(image.convert("RGB"))).transpose(2, 0, 1)
            several.extend([index] * frames)
        except InputError:
            raise
        except Exception as error:  # Pillow raises errors of many types
            broken[index] = error

    in_parallel(work, range(len(paths)), f"reading {folder}")
    notes = []
    if deep:
        lows, highs, whole = zip(*deep.values())
        pixel_range = pixel_range or choose_range(min(lows), max(highs), all(whole))
        given = "values {:g} to {:g} become 0 to 255, --pixel-range=LOW,HIGH chooses others".format(*pixel_range)
        notes.append(f"{folder}: {len(deep)} images have more than 8 bits: {given}")
        if reduced and pixel_range != SIXTEEN_BITS:
            raise InputError(
                f"{folder} holds {len(reduced)} images of more than 8 bits of which Pillow gives only the upper 8 "
                f"({paths[min(reduced)]}), and their values need the others: convert them to 8 bits"
            )
        in_parallel(work, sorted(waiting), f"scaling {folder}")
    if windowed:
        given = "the values that they say become 0 to 255, --pixel-range=LOW,HIGH overrides them"
        notes.append(f"{folder}: of {len(windowed)} images {given}")
    if several:
        notes.append(f"{folder}: {len(several)} files hold several frames, of which the first is read")
    if broken and not skip_broken:
        first = min(broken)
        others = f", and {len(broken) - 1} others" * (len(broken) > 1)
        reason = f"{paths[first]}: {first_line(broken[first])}{others}"
        raise InputError(f"{folder} holds an image that cannot be read ({reason}); --skip-broken leaves it out")
    if broken:
        notes.append(f"{folder}: {len(broken)} images cannot be read and are left out")
        kept = [index for index in range(len(paths)) if index not in broken]
        for row, index in enumerate(kept):
            out[row] = out[index]
    return out[: len(paths) - len(broken)], Report(sorted(broken), notes)


def in_parallel(work: Callable[[int], object], indices: Sequence[int], title: str) -> None:
    """Call `work` with each index, in as many threads as there are processors, for Pillow and numpy leave the interpreter to others."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for _ in tqdm(pool.map(work, indices), total=len(indices), desc=title, unit="image", leave=False, disable=bars_are_hidden()):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def decode_once(
    cache: Path, folder: Path, paths: Sequence[Path | Embedded], size: int, pixel_range: PixelRange | None, skip_broken: bool
) -> tuple[np.ndarray, Report]:  # fmt: skip
    """`decode` into a file under `cache`, which later calls for the same files map into memory.

    A folder of images has one such file for each size, and a new one takes its place if a path, size or time of an image changes. One of
    several processes decodes, the others wait. A process that is killed leaves a fragment, which the next one removes.
    """
    stats = [stamp(path) for path in paths]
    key = hashlib.sha256(repr((DECODER, stats, pixel_range, skip_broken)).encode()).hexdigest()[:32]
    place = cache / "decoded" / hashlib.sha256(repr((str(folder.resolve()), size)).encode()).hexdigest()[:16]
    pixels, report, fragment = place / f"{key}.bin", place / f"{key}.json", place / "fragment"
    with os_errors(f"decoded images cannot be kept in {place}, --data-root chooses another place and --no-cache none"):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            if not report.exists():
                for former in place.iterdir():
                    former.unlink()
                shape = len(paths), 3, size, size
                try:
                    with fragment.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, math.prod(shape))  # else a full disk would end the process later
                    out = np.memmap(fragment, np.uint8, "r+", shape=shape)
                    found = decode(folder, paths, size, pixel_range, skip_broken, out)[1]
                    out.flush()
                    os.replace(fragment, pixels)
                finally:
                    fragment.unlink(missing_ok=True)
                write_atomic(report, lambda file: file.write(json.dumps(found).encode()))
            found = Report(*json.loads(report.read_bytes()))
    return np.memmap(pixels, np.uint8, "r", shape=(len(paths) - len(found.broken), 3, size, size)), found


def stamp(path: Path | Embedded) -> tuple[str | int, ...]:
    """What changes if an image does: its name, size and time, or a checksum."""
    if isinstance(path, Embedded):
        return path.name, len(path), zlib.crc32(path)
    try:
        stat = path.stat()
    except OSError:  # a link into nothing
        return (str(path),)
    return str(path), stat.st_size, stat.st_mtime_ns
