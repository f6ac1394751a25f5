"""Files made here are read as the values that they hold, whatever their format, or are refused by name."""

import itertools
import json
import multiprocessing
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import images
from images import choose_range, eight_bits, find_images
from runtime.cli import InputError, command_line


@pytest.fixture(autouse=True)
def typed():
    """The sentences of errors name options as they are typed."""
    with command_line():
        yield


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(256, 0)  # black to white, left to right
LEVELS = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)


def png16(path: Path, x: np.ndarray) -> None:
    """A PNG of 16 bits a channel, which Pillow only writes in grey. x: `[H, W, C]`; 2: grey and alpha, 3: RGB, 4: RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, {2: 4, 3: 2, 4: 6}[x.shape[2]], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff(path: Path, x: np.ndarray) -> None:
    """An RGB TIFF of 16 bits a channel."""
    entries = [(256, 3, 1, x.shape[1]), (257, 3, 1, x.shape[0]), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128)]
    entries += [(277, 3, 1, 3), (278, 3, 1, x.shape[0]), (279, 4, 1, x.nbytes)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<3H", 16, 16, 16) + x.astype("<u2").tobytes())


def write(path: Path, x: np.ndarray, kind: str) -> None:
    colours = np.stack([x] * 3, -1)
    alpha = np.full_like(x, 65535)[..., None]
    if kind in ("I.tif", "F.tif"):
        Image.fromarray(x.astype({"I": np.int32, "F": np.float32}[kind[0]])).save(path / kind)
    elif kind == "rgb.tif":
        tiff(path / kind, colours)
    elif kind == "rgb.ppm":
        (path / kind).write_bytes(b"P6\n%d %d\n65535\n" % x.shape[::-1] + colours.astype(">u2").tobytes())
    elif kind in ("rgb.png", "la.png", "rgba.png"):
        png16(
            path / kind,
            {"rgb": colours, "la": np.concatenate([x[..., None], alpha], 2)}.get(kind[:-4], np.concatenate([colours, alpha], 2)),
        )
    else:
        Image.fromarray(x).save(path / kind)


DEEP = ["grey.png", "grey.tif", "grey.pgm", "grey.jp2", "I.tif", "F.tif"]
REDUCED = ["rgb.tif", "rgb.ppm", "rgb.png", "la.png", "rgba.png"]  # of which Pillow gives the upper 8 bits


@pytest.mark.parametrize("kind", DEEP + REDUCED)
def test_a_ramp_of_16_bits_keeps_its_256_levels_in_their_order(kind, tmp_path, capsys):
    write(tmp_path, RAMP, kind)
    assert torch.equal(data.load_images(str(tmp_path), image_size=256).x_train[0], LEVELS)
    assert "1 images have more than 8 bits: values 0 to 65535 become 0 to 255" in capsys.readouterr().err


@pytest.mark.parametrize("kind", DEEP)
def test_values_of_12_bits_in_16_take_the_sets_own_range(kind, tmp_path, capsys):
    write(tmp_path, RAMP // 16 // 2 + 100, kind)  # 100..2147: the whole set's range, which its other image has not
    Image.fromarray(np.full((256, 256), 100 + 4080, np.uint16)).save(tmp_path / "white.png")
    first, white = data.load_images(str(tmp_path), image_size=256).x_train.sort(0).values
    assert "2 images have more than 8 bits: values 100 to 4180 become 0 to 255" in capsys.readouterr().err
    assert torch.equal(first[0, 0], torch.from_numpy((np.arange(256) * 257 // 32 / 16).round().astype(np.uint8))) and white.eq(255).all()


@pytest.mark.parametrize("kind", DEEP)
def test_a_given_range_of_values(kind, tmp_path):
    write(tmp_path, RAMP // 16, kind)
    x = data.load_images(str(tmp_path), image_size=256, pixel_range="1000,3000").x_train[0, 0, 0].int()
    expected = ((RAMP[0] // 16 - 1000.0) * 255 / 2000).clip(0, 255).round()
    assert x.tolist() == expected.astype(int).tolist() and x.min() == 0 and x.max() == 255


@pytest.mark.parametrize("kind", REDUCED)
def test_colours_whose_lower_bits_pillow_drops_are_refused_where_they_matter(kind, tmp_path):
    write(tmp_path, RAMP // 16, kind)
    for pixel_range in (None, "0,4095"):
        with pytest.raises(InputError, match="convert them to 8 bits"):
            data.load_images(str(tmp_path), image_size=256, pixel_range=pixel_range)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=20, unique=True))
def test_scaling_keeps_the_order_and_uses_all_of_0_to_255(values):
    values = np.array(sorted(values))[None]
    low, high = choose_range(values.min(), values.max(), whole=True)
    scaled = np.asarray(eight_bits(values, low, high))[0].astype(int)
    assert (np.diff(scaled) >= 0).all() and scaled[0] <= 127 and scaled[-1] >= 127
    if (low, high) != (0, 65535):
        assert scaled[0] == 0 and scaled[-1] == 255


def test_values_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(InputError, match=r"cannot be read \(.*nan.tif: ValueError: it holds values that are not finite"):
        data.load_images(str(tmp_path), image_size=8)


def modes():
    rgba = Image.new("RGBA", (8, 8), (200, 0, 0, 51))  # a fifth of red on white
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    clear = Image.new("RGB", (8, 8), (1, 2, 3))
    return {
        "1.png": (Image.new("1", (8, 8), 1), {}, (255, 255, 255)),
        "L.png": (Image.new("L", (8, 8), 77), {}, (77, 77, 77)),
        "P.png": (palette, {}, (10, 20, 30)),
        "P-clear.png": (palette, {"transparency": 1}, (255, 255, 255)),
        "P.gif": (palette, {}, (10, 20, 30)),
        "LA.png": (Image.new("LA", (8, 8), (0, 51)), {}, (204, 204, 204)),
        "RGBA.png": (rgba, {}, (244, 204, 204)),
        "RGBA.webp": (rgba, {"lossless": True}, (244, 204, 204)),
        "RGBA.tif": (rgba, {}, (244, 204, 204)),
        "RGB-clear.png": (clear, {"transparency": (1, 2, 3)}, (255, 255, 255)),
        "CMYK.tif": (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), {}, (0, 255, 255)),
        "YCbCr.jpg": (Image.new("YCbCr", (8, 8), (100, 128, 128)), {}, (100, 100, 100)),
        "LAB.tif": (Image.new("LAB", (8, 8), (255, 128, 128)), {}, (255, 255, 255)),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_of_8_bits_has_its_colour_and_lies_on_white(name, tmp_path):
    image, how, colour = modes()[name]
    image.save(tmp_path / name, **how)
    pixel = data.load_images(str(tmp_path), image_size=8).x_train[0, :, 4, 4].int()
    assert (pixel - torch.tensor(colour)).abs().max() <= 1, pixel


def test_alpha_of_16_bits_is_put_on_white(tmp_path):
    x = np.zeros((8, 8, 4), np.uint16)
    x[..., 3], x[0, :, 3] = 13107, 65535  # a fifth
    png16(tmp_path / "rgba.png", x)
    read = data.load_images(str(tmp_path), image_size=8, pixel_range="0,65535").x_train[0, 0]
    assert read[0].eq(0).all() and read[1:].eq(204).all()


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "16.png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation, tmp_path):
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:] = 255, 128  # neither symmetric nor, turned, equal to itself
    stored = {  # how a camera stores what it saw, by the EXIF standard: where row 0 and column 0 are
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image, exif = Image.fromarray(stored.astype(np.uint16) * 257 if kind == "16.png" else stored), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{kind}", exif=exif)
    read = data.load_images(str(tmp_path), image_size=16).x_train[0, 0].int()
    assert (read[[2, 2, 12], [2, 12, 2]] - torch.tensor([255, 128, 0])).abs().max() < 12, read


def test_a_damaged_exif_block_does_not_spoil_an_image(tmp_path):
    Image.new("L", (8, 8), 9).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert data.load_images(str(tmp_path), image_size=8).x_train.eq(9).all()


# ------------------------------------------------------------------------------------------------------------- files


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def test_links_are_followed_and_every_image_is_read_once(tmp_path, capsys):
    """A class that is a link, a linked file, loops upwards and sideways, and a second way to the same images."""
    put(tmp_path / "elsewhere/dogs/2.png", 2), put(tmp_path / "elsewhere/3.png", 3)
    party = tmp_path / "party"
    put(party / "cat/1.png", 1)
    (party / "dog").symlink_to(tmp_path / "elsewhere/dogs")
    (party / "cat/linked.png").symlink_to(tmp_path / "elsewhere/3.png")
    (party / "cat/loop").symlink_to(party)
    (party / "cat/all").symlink_to(tmp_path / "elsewhere")  # leads to the dogs too, which have a nearer place
    (party / "latest").symlink_to(party / "cat")
    assert data.load_unlabelled(party, 8)[:, 0, 0, 0].tolist() == [1, 3, 2]
    assert "passed over 4 links to what is read already" in capsys.readouterr().err
    images = data.load_images(str(party), image_size=8)
    assert images.classes == ["cat", "dog"] and images.y_train.tolist() == [0, 0, 1]
    assert images.names[0] == ["cat/1.png", "cat/linked.png", "dog/2.png"]


def test_folders_that_link_to_each_other_end(tmp_path):
    for a, b in itertools.permutations("abcdef", 2):
        put(tmp_path / a / "x.png")
        (tmp_path / a / b).symlink_to(tmp_path / b)
    assert len(find_images(tmp_path).paths) == 6


def test_a_link_into_nothing_is_named(tmp_path):
    put(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"cannot be read \(.*1.png: FileNotFoundError"):
        data.load_unlabelled(tmp_path, 8)


LEFT = [
    *(".ipynb_checkpoints/0.png", "._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/cat/0.png", "@eaDir/0.png/small.jpg"),
    *("#recycle/old.png", "$RECYCLE.BIN/old.png", "System Volume Information/x.png", "lost+found/x.png", "~$note.png", "0.png~"),
    *("1.png.crdownload", ".Trash-1000/files/x.png", ".git/x.png"),
]


@pytest.mark.parametrize("place", ["", "train", "test", "train/cat", "test/dog"])
def test_what_systems_leave_is_neither_image_nor_class(place, tmp_path, capsys):
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        put(tmp_path / split / name / "0.png", 7)
    for name in LEFT:
        (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).write_bytes(b"no image")
    images = data.load_images(str(tmp_path), image_size=8)
    assert images.classes == ["cat", "dog"] and images.y_train.tolist() == images.y_test.tolist() == [0, 1]
    assert len(data.load_unlabelled(tmp_path, 8)) == 2
    if place:
        said = capsys.readouterr().err.splitlines()
        assert said == 2 * [f"{tmp_path}: passed over {len(LEFT)} leftovers of a system"]


def test_no_image_is_left_out_without_a_word(tmp_path, capsys):
    for name in ("train/a/0.png", "train/b/1.PNG", "train/b/deep/er/2.jpeg", "test/a/3.tif", "val/a/4.png", "more.png"):
        Image.new("L", (8, 8)).save(Path(put(tmp_path / "x" / name).parent) / Path(name).name)
    folder = tmp_path / "x"
    (folder / "train/a/unnamed").write_bytes((folder / "train/a/0.png").read_bytes())  # an image by its first bytes
    (folder / "train/labels.csv").write_text("file,label")
    images = data.load_images(str(folder), image_size=8)
    assert images.names == (["train/a/0.png", "train/a/unnamed", "train/b/1.PNG", "train/b/deep/er/2.jpeg"], ["test/a/3.tif"])
    assert capsys.readouterr().err == f"{folder}: passed over 1 .csv files, 2 images beside train and test\n"
    put(folder / "train/stray.png")
    assert data.load_images(str(folder), image_size=8).num_classes == 0
    assert "read without labels, since 1 images lie beside its sub-folders (stray.png)" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    put(tmp_path / "a/0.png"), put(tmp_path / "b/0.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(InputError, match="cannot be listed"):
        data.load_images(str(tmp_path), image_size=8)


def test_a_folder_that_the_system_refuses_to_list_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a/0.png")
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path) if Path(path) == tmp_path else listdir(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"cannot be listed \(.*a: No such file"):
        data.load_images(str(tmp_path), image_size=8)


@pytest.mark.parametrize("files", [[], ["readme.txt"], ["train/readme.txt"], ["test/0.png"]])
def test_folders_without_training_images_are_refused(files, tmp_path):
    for name in files:
        put(tmp_path / name) if name.endswith("png") else (put(tmp_path / "x.png").unlink(), (tmp_path / name).parent.mkdir(exist_ok=True))
    with pytest.raises(InputError, match="with images in it|no folder train"):
        data.load_images(str(tmp_path), image_size=8)


# ------------------------------------------------------------------------------------------------- unreadable images


def whole(kind: str, tmp_path: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{kind}")
    content = (tmp_path / f"whole.{kind}").read_bytes()
    (tmp_path / f"whole.{kind}").unlink()
    return content


BROKEN = {
    "truncated.jpg": lambda p: whole("jpeg", p)[:-400],
    "truncated.png": lambda p: whole("png", p)[:-400],
    "truncated.tif": lambda p: whole("tiff", p)[:-400],
    "truncated.webp": lambda p: whole("webp", p)[:-400],
    "empty.png": lambda p: b"",
    "text.jpg": lambda p: b"<html>404</html>",
    "phone.heic": lambda p: b"ftypheic",
    "volume.nii.gz": lambda p: b"\x1f\x8b",
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_read_is_named_or_left_out_with_a_count(name, tmp_path, capsys):
    folder = tmp_path / "x"
    for split, label, k in itertools.product(("train", "test"), ("a", "b"), range(2)):
        put(folder / split / label / f"z{k}.png", 10 * (label == "b") + k)
    for split in ("train/a", "test/b"):
        (folder / split / name).write_bytes(BROKEN[name](tmp_path))
    sentence = rf"{folder} holds an image that cannot be read \({folder}/train/a/{name}: .*, and 1 others\); --skip-broken leaves it out"
    with pytest.raises(InputError, match=sentence):
        data.load_images(str(folder), image_size=8)
    images = data.load_images(str(folder), image_size=8, skip_broken=True)
    assert "2 images cannot be read and are left out" in capsys.readouterr().err
    for x, y, names in ((images.x_train, images.y_train, images.names[0]), (images.x_test, images.y_test, images.names[1])):
        assert x[:, 0, 0, 0].tolist() == [0, 1, 10, 11] and y.tolist() == [0, 0, 1, 1] and len(names) == 4
    with pytest.raises(InputError, match=rf"cannot be read \({folder}/train/a/{name}"):
        data.load_unlabelled(folder, 8)
    assert data.load_unlabelled(folder, 8, skip_broken=True)[:, 0, 0, 0].tolist() == [0, 1, 10, 11]


def test_a_set_of_which_no_image_can_be_read_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match="no training image that can be read"):
        data.load_images(str(tmp_path), image_size=8, skip_broken=True)


def test_further_frames_of_a_file_are_said(tmp_path, capsys):
    frames = [Image.new("L", (8, 8), value) for value in (5, 6, 7)]
    for kind in ("gif", "tif"):
        frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:])
    assert data.load_images(str(tmp_path), image_size=8).x_train.eq(5).all()
    assert "2 files hold several frames, of which the first is read" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- cache


def cached(folder: Path, cache: Path, **how) -> torch.Tensor:
    return data.load_images(str(folder), cache, image_size=8, cached=True, **how).x_train[:, 0, 0, 0]


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_images_are_decoded_once_and_again_if_a_file_changes(tmp_path, monkeypatch, capsys):
    folder, cache = tmp_path / "x", tmp_path / "cache"
    for k in range(4):
        Image.fromarray(np.full((8, 8), 4000 * k, np.uint16)).save(put(folder / f"{k}.png"))
    first = cached(folder, cache)
    said = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("images.read_file", lambda path: pytest.fail("decoded again"))
        assert torch.equal(cached(folder, cache), first) and capsys.readouterr().err == said != ""
    former = files(cache)
    assert len(former) == 2 and torch.equal(data.load_images(str(folder), image_size=8).x_train[:, 0, 0, 0], first)
    put(folder / "3.png", 255)
    assert cached(folder, cache).tolist() == [0, 128, 255, 255] and not set(former) & set(files(cache)) and len(files(cache)) == 2
    put(folder / "4.png", 9)
    assert cached(folder, cache)[4] == 9
    assert cached(folder, cache, pixel_range="0,16000").tolist() == [0, 64, 128, 255, 9]


def test_broken_images_are_remembered_as_such(tmp_path, capsys):
    folder, cache = tmp_path / "x", tmp_path / "cache"
    put(folder / "0.png", 7), put(folder / "2.png", 8)
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").symlink_to("gone")
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be read"):
            cached(folder, cache)
        assert not files(cache)
    for _ in range(2):
        assert cached(folder, cache, skip_broken=True).tolist() == [7, 8]
        assert "2 images cannot be read and are left out" in capsys.readouterr().err


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path):
    folder, cache = tmp_path / "x", tmp_path / "cache"
    put(folder / "0.png", 7)
    cached(folder, cache)
    pixels, report = sorted(files(cache))
    pixels.write_bytes(bytes(192))
    report.rename(pixels.with_name("fragment"))  # killed after the pixels, before the report
    assert cached(folder, cache).tolist() == [7] and sorted(files(cache)) == [pixels, report]


def test_two_processes_decode_once(tmp_path, monkeypatch):
    folder, cache, counted, results = tmp_path / "x", tmp_path / "cache", itertools.count(), multiprocessing.SimpleQueue()
    for k in range(50):
        put(folder / f"{k:02}.png", k)
    monkeypatch.setattr(images, "read_file", lambda path, read=images.read_file: (read(path), next(counted))[0])
    processes = [
        multiprocessing.get_context("fork").Process(target=lambda: results.put((cached(folder, cache).tolist(), next(counted))))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert sorted(results.get() for _ in processes) == [([*range(50)], 0), ([*range(50)], 50)]
    for process in processes:
        process.join()


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    put(tmp_path / "x/0.png")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be kept in .*, --data-root chooses another place and --no-cache none: Not a directory"):
        cached(tmp_path / "x", tmp_path / "file")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device"):
        cached(tmp_path / "x", tmp_path / "cache")


def test_images_larger_than_a_gpus_memory_are_one_sentence(tmp_path, monkeypatch):
    for k in range(4):
        put(tmp_path / f"{k}.png")
    images = data.load_images(str(tmp_path), image_size=8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 10**9))
    with pytest.raises(InputError, match="4 images of 8 pixels need .* in which 2 fit: use --device cpu, a smaller --image-size"):
        images.to(torch.device("cuda"))


# ---------------------------------------------------------------------------------------------------- DICOM and parquet


def dicom(path: Path, pixels: np.ndarray, **tags) -> None:
    pydicom = pytest.importorskip("pydicom")
    content = pydicom.Dataset()
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content.file_meta.MediaStorageSOPClassUID = content.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    content.Rows, content.Columns, content.SamplesPerPixel, content.PhotometricInterpretation = *pixels.shape[-2:], 1, "MONOCHROME2"
    content.BitsAllocated, content.BitsStored, content.HighBit, content.PixelRepresentation = 16, 16, 15, int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(content, name, value)
    content.PixelData = pixels.tobytes()
    content.save_as(path, enforce_file_format=True)


CT = np.linspace(0, 4095, 256).round().astype(np.int16)[None].repeat(256, 0)


@pytest.mark.parametrize("name", ["x.dcm", "1.2.840.113619", "IM0001"])
@pytest.mark.parametrize(
    "tags, pixel_range, low, high, inverted",
    [
        ({}, None, 0, 4095, False),  # the set's own range
        ({"RescaleSlope": 2, "RescaleIntercept": -1000}, "-1000,1000", 0, 1000, False),
        ({"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40.5, "WindowWidth": 401}, None, 864, 1264, False),
        ({"WindowCenter": [1000.5, 5], "WindowWidth": [1001, 5], "PhotometricInterpretation": "MONOCHROME1"}, None, 500, 1500, True),
        ({"WindowCenter": 1000.5, "WindowWidth": 1001}, "0,2000", 0, 2000, False),  # a given range goes before the window
        ({"PhotometricInterpretation": "MONOCHROME1"}, None, 0, 4095, True),
        ({"NumberOfFrames": 2}, None, 0, 4095, False),
    ],
)
def test_dicom_is_rescaled_windowed_and_inverted(name, tags, pixel_range, low, high, inverted, tmp_path):
    dicom(tmp_path / name, np.stack([CT, CT]) if "NumberOfFrames" in tags else CT, **tags)
    expected = ((CT[0].astype(float) - low) * 255 / (high - low)).clip(0, 255).round()
    read = data.load_images(str(tmp_path), image_size=256, pixel_range=pixel_range).x_train[0, 1, 7].numpy()
    assert np.abs(read - (255 - expected if inverted else expected)).max() <= 1


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.dcm").write_bytes(bytes(200))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/train.parquet").write_bytes(b"PAR1")
    for package, folder in (("pydicom", "a"), ("pyarrow", "b")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"the package {package}: `pip install -r requirements-optional.txt`"):
            data.load_images(str(tmp_path / folder), skip_broken=True)


@pytest.mark.parametrize("labelled", [True, False])
def test_parquet_files_of_hugging_face(labelled, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for file, values in (("train-0.parquet", [1, 2]), ("train-1.parquet", [3]), ("validation-0.parquet", [4])):
        images = [{"bytes": put(tmp_path / "x.png", value).read_bytes(), "path": f"{value}.png"} for value in values]
        columns = {"image": images} | ({"label": [value % 2 for value in values]} if labelled else {})
        features = {"info": {"features": {"label": {"names": ["even", "odd"]}}}}
        table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
        (tmp_path / "x/data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / "x/data" / file)
    for cached in (False, True, True):
        read = data.load_images(str(tmp_path / "x"), tmp_path / "cache", image_size=8, cached=cached)
        assert read.x_train[:, 0, 0, 0].tolist() == [1, 2, 3] and read.x_test[:, 0, 0, 0].tolist() == [4]
        assert read.names == (["1.png", "2.png", "3.png"], ["4.png"]) and list(read.classes) == ["even", "odd"] * labelled
        assert read.y_train.tolist() == [1, 0, 1] * labelled and torch.equal(data.load_unlabelled(tmp_path / "x", 8), read.x_train)
    (tmp_path / "x/data/train-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="holds a parquet file without images"):
        data.load_images(str(tmp_path / "x"), image_size=8)
