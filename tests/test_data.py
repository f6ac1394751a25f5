import hashlib
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, run
from PIL import Image

import data
import eval as evaluation
import fedu
import ops
from options import DIRICHLET, parse, parse_evaluation
from runtime.cli import InputError, command_line, locked

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def typed():
    """The sentences of errors name options as they are typed."""
    with command_line():
        yield


# ------------------------------------------------------------------------------------------------------ two views


def test_boxes_have_the_recipes_distribution():
    top, left, height, width = data.draw_views(20000, 32, 32, CPU, torch.Generator().manual_seed(4))[:, :4].unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    share = height * width / 32**2
    assert 0.06 < share.min() < 0.1 and 0.95 < share.max() <= 1
    # torchvision's own draws: a mean share of 0.47, since large oblong boxes do not fit and are drawn again
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop

    boxes = [RandomResizedCrop.get_params(torch.zeros(3, 32, 32), [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.mean([h * w / 32**2 for _, _, h, w in boxes])
    assert abs(share.mean() - theirs) < 0.015


@pytest.mark.parametrize("jitter", [1.0, 0.5])
def test_draws_have_the_recipes_distribution(jitter):
    draws = data.draw_views(20000, 32, 32, CPU, torch.Generator().manual_seed(4), jitter)
    column = dict(zip(ops.VIEW, draws.unbind(1), strict=True))
    jittered = column["hue"] != 0
    for share, expected in ((column["flip"], 0.5), (column["greyscale"], 0.2), (jittered.float(), 0.8)):
        assert abs(share.mean() - expected) < 0.02  # five deviations of 20,000 draws
    for factor in (column["brightness"], column["contrast"], column["saturation"]):
        low, high = (factor.min() - 1) / jitter, (factor.max() - 1) / jitter
        assert factor[~jittered].eq(1).all() and -0.800001 < low < -0.79 and 0.79 < high < 0.800001
        assert abs(factor[jittered].mean() - 1) < 0.02
    assert -0.2 <= column["hue"].min() / jitter < -0.19 and 0.19 < column["hue"].max() / jitter <= 0.2
    orders, counts = draws[:, 9:13].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (orders.sort(1).values == torch.arange(4)).all()
    assert counts.min() > 650 and counts.max() < 1020  # 833 expected, within six deviations


def test_jitter_changes_nothing_but_the_colours():
    usual, mild = (data.draw_views(50, 32, 32, CPU, torch.Generator().manual_seed(4), *jitter) for jitter in ((), (0.5,)))
    differs = (usual != mild).any(0)
    assert {name for name, changed in zip(ops.VIEW, differs) if changed} == {"brightness", "contrast", "saturation", "hue"}
    x = torch.randint(0, 256, (25, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(torch.cat(data.random_views(x, torch.Generator().manual_seed(4), jitter=0.5)), ops.augment(x, mild))


def test_two_views_differ_repeat_and_stay_in_range():
    x = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    view1, view2 = data.random_views(x, torch.Generator().manual_seed(5))
    assert view1.dtype == torch.float32 and view1.shape == (512, 3, 32, 32)
    assert view1.min() >= 0 and view1.max() <= 1
    assert not torch.equal(view1, view2)
    again = data.random_views(x, torch.Generator().manual_seed(5))
    assert torch.equal(view1, again[0]) and torch.equal(view2, again[1])
    grey = (view1 - view1[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert 0.13 < grey.float().mean() < 0.27  # probability 0.2; five deviations of 512 draws are 0.09
    assert data.random_views(x[:1])[0].shape == (1, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------ partition

LABELS = np.repeat(np.arange(10), 50)


@pytest.mark.parametrize(
    "kind, more",
    [("classes", {}), ("classes", {"classes_per_client": 4}), ("iid", {}), *((kind, {"alpha": 0.3}) for kind in DIRICHLET)],
)
def test_partition_is_disjoint_complete_and_by_seed(kind, more):
    parts = data.partition(LABELS, 5, kind, seed=7, **more)
    assert sorted(np.concatenate(parts)) == list(range(500))
    again, other = (data.partition(LABELS, 5, kind, seed=seed, **more) for seed in (7, 8))
    assert all(map(np.array_equal, parts, again))
    assert not all(map(np.array_equal, parts, other))


def test_partition_by_classes_gives_each_client_its_classes():
    classes = [set(LABELS[part]) for part in data.partition(LABELS, 5, "classes", seed=0)]
    assert all(len(c) == 2 for c in classes) and set.union(*classes) == set(range(10))
    assert [len(set(LABELS[p])) for p in data.partition(LABELS, 5, "classes", seed=0, classes_per_client=4)] == [4] * 5
    assert [len(set(LABELS[p])) for p in data.partition(LABELS, 20, "classes", seed=0)] == [1] * 20


def test_iid_is_even_and_dirichlet_is_not():
    assert [len(p) for p in data.partition(LABELS, 5, "iid", seed=0)] == [100] * 5
    iid, skewed = (data.partition(LABELS, 5, kind, seed=0, alpha=0.1) for kind in ("iid", "dirichlet"))
    largest = [np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts]) for parts in (iid, skewed)]
    assert largest[0] < 0.25 < 0.35 < largest[1]


def test_a_hundred_clients_of_equal_size_have_shares_as_dirichlet_draws_them():
    """The 100 clients and alpha = 0.1 of Orchestra's experiments on CIFAR-10, against shares that nothing has balanced."""
    parts = data.partition(np.repeat(np.arange(10), 5000), 100, "dirichlet-balanced", seed=0, alpha=0.1, at_least=16)
    assert [len(part) for part in parts] == [500] * 100
    shares = np.sort([np.bincount(part // 5000, minlength=10) / 500 for part in parts])[:, ::-1]
    drawn = np.sort(np.random.default_rng(0).dirichlet(np.full(10, 0.1), 10_000))[:, ::-1]
    assert np.abs(shares.mean(0) - drawn.mean(0)).max() < 0.06  # of the most frequent class, of the second, ...


def test_clients_of_equal_size_share_out_the_remainder_and_classes_of_other_sizes():
    labels = np.repeat([0, 2, 3], [400, 80, 23])  # of class 1 there is no image
    assert sorted(map(len, data.partition(labels, 5, "dirichlet-balanced", seed=0, alpha=1e-3))) == [100, 100, 101, 101, 101]
    shares = [np.bincount(labels[part], minlength=4) / 101 for part in data.partition(labels, 5, "dirichlet-balanced", seed=0, alpha=1e6)]
    assert np.abs(shares - np.bincount(labels) / 503).max() < 0.15  # the same for all clients, but for the draws


@pytest.mark.parametrize(
    "clients, kind, more, words",
    [
        (501, "iid", {}, "501 clients want 1 images"),
        (5, "classes", {"classes_per_client": 11}, "--classes-per-client got 11"),
        (3, "classes", {"classes_per_client": 2}, "leave some of 10 classes to nobody"),
        (5, "iid", {"at_least": 101}, "5 clients want 101 images each, there are 500"),
        (20, "dirichlet", {"alpha": 0.01, "at_least": 20}, "a batch wants 20: lower --batch-size or --clients, or raise --alpha"),
    ],
)
def test_partitions_that_cannot_be_are_refused(clients, kind, more, words):
    with pytest.raises(InputError, match=words):
        data.partition(LABELS, clients, kind, seed=0, **more)


def test_labelled_subset_is_balanced():
    labels = torch.tensor(LABELS)
    for fraction, count in ((0.1, 5), (0.01, 1), (1.0, 50)):
        subset = data.balanced_subset(labels, fraction, seed=3)
        assert labels[subset].bincount().tolist() == [count] * 10
        assert len(subset.unique()) == len(subset)
    assert not torch.equal(data.balanced_subset(labels, 0.1, 3), data.balanced_subset(labels, 0.1, 4))


# ---------------------------------------------------------------------------------------------------- image sets


def test_as_many_classes_as_a_byte_can_name(tmp_path):
    x, y = np.zeros((256, 4, 4), np.uint8), np.arange(256, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert data.load_images(str(tmp_path / "x.npz")).num_classes == 256


def test_fashion_is_balanced_and_padded():
    images = data.load_images("fashion")
    assert images.x_train.shape == (6000, 3, 32, 32) and images.x_train.dtype == torch.uint8
    assert images.y_train.bincount().tolist() == [600] * 10 and images.y_test.bincount().tolist() == [100] * 10
    assert images.x_train[:, :, :2].max() == 0 and images.x_train[:, :, 2:30].float().mean() > 50
    assert torch.equal(images.x_train[:, 0], images.x_train[:, 2])


def test_cifar100_through_torchvisions_loader(tmp_path, monkeypatch):
    """Three images in CIFAR-100's own format: pickled dicts, rows of 1,024 red, green and blue bytes, a meta file."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = np.arange(3 * 3072, dtype=np.int64).reshape(3, 3072).astype(np.uint8)

    def dump(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    listed = [
        dump(s, {"data": rows[:n], "fine_labels": list(range(n)), "coarse_labels": [0] * n, "filenames": ["x"] * n})
        for s, n in (("train", 3), ("test", 2))
    ]
    meta = dump("meta", {"fine_label_names": ["a", "b", "c"], "coarse_label_names": ["z"]})
    monkeypatch.setattr(CIFAR100, "train_list", listed[:1])
    monkeypatch.setattr(CIFAR100, "test_list", listed[1:])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta[1]})
    monkeypatch.setattr(data, "CIFAR_CLASSES", {"cifar100": 3})
    images = data.load_images("cifar100", tmp_path)
    assert torch.equal(images.x_train, torch.from_numpy(rows).view(3, 3, 32, 32))
    assert images.y_train.tolist() == [0, 1, 2] and images.y_test.tolist() == [0, 1] and images.num_classes == 3


def test_cifar_that_cannot_be_downloaded_is_one_sentence(tmp_path, monkeypatch):
    import urllib.error

    from torchvision.datasets import CIFAR10

    def unreachable(self):
        with pytest.raises(InputError, match="somebody else"), locked(tmp_path, busy="somebody else downloads"):
            pass
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    with pytest.raises(InputError, match="put cifar10.npz there, or choose --data-root"):
        data.load_images("cifar10", tmp_path)


def test_npz_in_the_data_root_is_taken_first(npz, tmp_path, monkeypatch):
    (tmp_path / "cifar10.npz").write_bytes(npz.read_bytes())
    with pytest.raises(InputError, match="holds 4 classes, cifar10 has 10"):
        data.load_images("cifar10", tmp_path)
    monkeypatch.setitem(data.CIFAR_CLASSES, "cifar10", 4)
    assert len(data.load_images("cifar10", tmp_path).x_train) == 64


def test_image_folder(tmp_path):
    for split, name, count in itertools.product(("train", "test"), ("cat", "dog"), range(2)):
        folder = tmp_path / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), (count, 0, 200 if name == "dog" else 0)).save(folder / f"{count}.png")
    images = data.load_images(str(tmp_path), image_size=16)
    assert images.x_train.shape == (4, 3, 16, 16) and images.y_train.tolist() == [0, 0, 1, 1]
    assert images.x_test[:, 2, 0, 0].tolist() == [0, 0, 200, 200]
    (tmp_path / "test/dog/0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(InputError, match="test/dog/0.png"):
        data.load_images(str(tmp_path), image_size=16)
    (tmp_path / "test/fox").mkdir()
    (tmp_path / "test/dog/1.png").rename(tmp_path / "test/fox/1.png")
    with pytest.raises(InputError, match="the test images have the labels fox, which no training image has"):
        data.load_images(str(tmp_path), image_size=16, skip_broken=True)


GOOD = {"x_train": np.zeros((4, 8, 8, 3), np.uint8), "y_train": np.arange(4) % 2, "x_test": np.zeros((2, 8, 8, 3), np.uint8)}
GOOD["y_test"] = np.arange(2)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"x_train": np.linspace(0, 1, 4 * 64).reshape(4, 8, 8)},
            r"x_train is float64 \[4, 8, 8\], .*`\(255 \* x\).round\(\)`, then `.astype",
        ),
        ({"x_train": np.full((4, 8, 8, 3), 200.0, np.float32)}, "x_train is float32 .*`x.round"),
        ({"x_train": np.full((4, 8, 8), 60000, np.uint16)}, "x_train is uint16 .*x.max"),
        ({"x_train": np.ones((4, 8, 8), bool)}, r"x_train is bool .*`255 \* x`"),
        ({"x_train": np.zeros((4, 8, 9, 3), np.uint8)}, "needs uint8 .* cut or resize each image to a square"),
        ({"x_train": np.zeros((4, 8, 8, 4), np.uint8)}, "x_train is uint8 .* without the transparency"),
        ({"x_train": np.zeros((4, 8, 8, 8, 1), np.uint8)}, "x_train is uint8 .* a volume's slices"),
        ({"x_test": np.zeros((2, 3, 8, 8), np.uint8)}, r"x_test is uint8 \[2, 3, 8, 8\].*transpose"),
        ({"x_test": np.zeros((2, 9, 9, 3), np.uint8)}, "the training images are 8 pixels wide and the test images 9, they need the same"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, int)}, "x_train is uint8"),
        ({"y_train": np.arange(3)}, "for each of 4 images"),
        ({"y_train": np.array([0, 0.5, 1, 1])}, "y_train is float64"),
        ({"y_train": np.array([0, 1, 0, -1])}, "y_train holds -1, 0, 1; a label below 0"),
        ({"y_train": np.eye(4, dtype=int)}, r"y_train is int64 \[4, 4\], several labels for an image \(multi-label\)"),
        ({"y_test": np.array([0, 2])}, "the test images have the labels 2, which no training image has"),
        ({"y_test": np.array(["cat", "dog"])}, "the test images have the labels cat, dog"),
        ({"x_test": None}, "has the labels y_test and no images x_test or test_images"),
        ({"x_train": None}, "has no array x_train or train_images; it has y_train, x_test, y_test"),
        ({"y_train": np.array([0, 1, {}, 1], dtype=object)}, "not a readable .npz.*text needs `.astype"),
    ],
)
def test_npz_of_another_form_is_refused(change, words, tmp_path):
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in (GOOD | change).items() if v is not None})
    with pytest.raises(InputError, match=words):
        data.load_images(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("change", range(4))
def test_the_expression_in_a_refusal_converts_the_array(change, tmp_path):
    """What a refusal of an array says, done with it, makes an .npz that is read with the same image, black to white."""
    ramp = np.linspace(0, 1, 64).reshape(1, 8, 8)
    x = [ramp, (ramp * 255).astype(np.float32), (ramp * 4095).astype(np.uint16), (ramp * 65535 - 32768).astype(np.int16)][change]
    np.savez(tmp_path / "x.npz", x_train=x)
    with pytest.raises(InputError) as refusal:
        data.load_images(str(tmp_path / "x.npz"))
    convert = str(refusal.value).split("`")[1]
    np.savez(tmp_path / "x.npz", x_train=eval(convert, {"x": x, "numpy": np}).astype(np.uint8))
    assert np.abs(data.load_images(str(tmp_path / "x.npz")).x_train[0, 0].numpy() - 255 * ramp[0]).max() <= 1


def test_medmnist_is_read_as_it_is_downloaded(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 256, (n, 28, 28), np.uint8) for split, n in (("train", 9), ("val", 3), ("test", 6))}
    labels = {f"{split}_labels": (np.arange(n) % 3)[:, None].astype(np.uint8) for split, n in (("train", 9), ("val", 3), ("test", 6))}
    np.savez(tmp_path / "medmnist.npz", **arrays, **labels)
    images = data.load_images(str(tmp_path / "medmnist.npz"))
    assert torch.equal(images.x_test[:, 1], torch.from_numpy(arrays["test_images"])) and images.x_train.shape == (9, 3, 28, 28)
    assert images.y_train.tolist() == [0, 1, 2] * 3 and images.y_test.tolist() == [0, 1, 2] * 2
    assert capsys.readouterr().err == f"{tmp_path}/medmnist.npz: arrays that are not read: val_images, val_labels\n"
    del arrays["test_images"], labels["test_labels"]
    np.savez(tmp_path / "medmnist.npz", **arrays, **labels)
    assert torch.equal(data.load_images(str(tmp_path / "medmnist.npz")).x_test[:, 0], torch.from_numpy(arrays["val_images"]))
    assert "the val images are taken as test images, since it has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "labels, classes, said",
    [
        (np.array([1, 4, 2, 3]), ["1", "2", "3", "4"], "the labels 1, 2, 3, 4 are read as the classes 0 to 3"),
        (np.array([[10], [30], [10], [20]]), ["10", "20", "30"], "the labels 10, 20, 30 are read as the classes 0 to 2"),
        (np.array(["dog", "cat", "dog", "eel"]), ["cat", "dog", "eel"], ""),
        (np.array([b"dog", b"cat", b"dog", b"eel"]), ["cat", "dog", "eel"], ""),
        (np.array([True, False, True, True]), ["0", "1"], ""),
        (np.array([0, 1, 2, 1], np.uint8), ["0", "1", "2"], ""),
    ],
)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1), (4, 8, 8, 3)])
def test_labels_of_any_kind_are_numbered_in_their_order(labels, classes, said, shape, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x_train=np.zeros(shape, np.uint8), y_train=labels, x_test=np.zeros(shape, np.uint8)[:1], y_test=labels[:1])
    images = data.load_images(str(tmp_path / "x.npz"))
    assert images.classes == classes and images.num_classes == len(classes) and said in capsys.readouterr().err
    names = [classes[k] for k in images.y_train]
    assert names == [n.decode() if isinstance(n, bytes) else str(int(n) if isinstance(n, np.bool) else n) for n in labels.flatten()]
    assert images.y_test[0] == images.y_train[0]


def test_damaged_npz_is_refused(npz, tmp_path):
    whole = npz.read_bytes()
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2], whole[:2000] + b"\0" * 40 + whole[2040:]):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="bad.npz"):
            data.load_images(str(tmp_path / "bad.npz"))
    with pytest.raises(InputError, match="does not exist"):
        data.load_images(str(tmp_path / "none.npz"))
    with pytest.raises(InputError, match="--dataset got 'mnist'"):
        data.load_images("mnist")


def test_an_image_folder_is_resized(tmp_path):
    for split, colour in itertools.product(("train", "test"), ("red", "blue")):
        (tmp_path / "images" / split / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (24, 20), colour).save(tmp_path / "images" / split / colour / f"{i}.png")
    options = ["--dataset", str(tmp_path / "images"), "--image-size", "16", "--encoder", "tiny", "--method", "central", "--rounds", "1"]
    result = run(tmp_path / "run", *options, "--batch-size", "4", "--ema-decay", "0.9", "--clients", "2", "--data-root", str(tmp_path))
    assert result["metrics"][0]["num_examples"] == [8]


@pytest.mark.parametrize("arguments, words", [([], "got 0 arguments, wants FOLDER"), (["absent"], "absent/train-images-idx3-ubyte.gz")])
def test_making_fashion_without_its_files_is_refused(command, tmp_path, arguments, words):
    assert refused(command("assets/make_fashion.py", *arguments, cwd=tmp_path), words)


# ------------------------------------------------------------------------------------------- without labels or test images

SMALL = ["--encoder", "tiny", "--clients", "2", "--rounds", "1", "--local-epochs", "1", "--batch-size", "4", "--device", "cpu"]
FOLDER = ["--no-cache", "--image-size", "16"]


def colours(folder, *names):
    """Images of 16 pixels, each of a colour of its own."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * k, 100, 200)).save(folder / name)
    return folder


def unlabelled(kind, folder):
    names = [f"{k:02}.png" for k in range(10)]
    if kind == "npz":
        np.savez(folder / "x.npz", x_train=np.zeros((10, 16, 16, 3), np.uint8))
        return folder / "x.npz", []
    place = {"flat": "", "train": "train/", "one folder": "images/", "nested": ""}[kind]
    files = [place + ("deep/" * (k % 2) if kind == "nested" else "") + name for k, name in enumerate(names)]
    return colours(folder / "x", *files), sorted(files)


@pytest.mark.parametrize("kind", ["flat", "train", "one folder", "nested", "npz"])
def test_images_without_labels_train_and_are_exported_with_their_names(kind, tmp_path, capsys):
    path, names = unlabelled(kind, tmp_path)
    options = ["--dataset", str(path), *SMALL]
    result = run(tmp_path / "run", *options, "--partition", "iid", *(FOLDER if names else []))
    assert result["metrics"][0]["num_examples"] == [5, 5] and result["metrics"][0]["knn"] is None
    assert "The kNN column stays empty: the data set has no labels." in capsys.readouterr().out
    export = parse_evaluation([str(tmp_path / "run"), "--export", str(tmp_path / "features.npz")])
    evaluation.main(export)
    with np.load(tmp_path / "features.npz") as arrays:
        assert set(arrays) == {"train", "names_train"} if names else set(arrays) == {"train"}
        assert len(arrays["train"]) == 10 and (not names or arrays["names_train"].tolist() == names)
    for task in (["--linear"], ["--knn"], ["--semi", "0.5"]):
        with pytest.raises(InputError, match=f"{task[0]} needs labels and test images, and the data set has no labels"):
            evaluation.main(parse_evaluation([str(tmp_path / "run"), *task]))
    with pytest.raises(InputError, match="--partition classes, unlike iid, needs labels, and the data set has no labels"):
        run(tmp_path / "other", *options, *(FOLDER if names else []))
    with pytest.raises(InputError, match="--method fedavg-supervised needs labels"):
        run(tmp_path / "other", *options, *(FOLDER if names else []), "--partition", "iid", "--method", "fedavg-supervised")
    assert not (tmp_path / "other").exists()


def test_test_images_that_are_missing_or_have_no_labels_are_said(tmp_path):
    x, y = np.zeros((8, 16, 16, 3), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "train.npz", x_train=x, y_train=y)
    images = data.load_images(str(tmp_path / "train.npz"))
    with pytest.raises(InputError, match=r"kNN needs labels and test images, .* has no test images \(--holdout 0.1 makes some\)"):
        data.require(images, "kNN")
    data.require(images, "fedavg-supervised", test=False)
    np.savez(tmp_path / "test.npz", x_train=x, y_train=y, x_test=x)
    assert data.lacks(data.load_images(str(tmp_path / "test.npz"))) == "the test images have no labels"
    np.savez(tmp_path / "none.npz", x_train=x, x_test=x, y_test=y)
    assert data.lacks(data.load_images(str(tmp_path / "none.npz"))) == "the data set has no labels"


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_holdout_keeps_a_share_of_each_class_as_test_images(kind, tmp_path):
    values, labels = np.arange(50), np.repeat([0, 1, 2], [10, 39, 1])
    if kind == "npz":
        np.savez(tmp_path / "x.npz", x_train=np.broadcast_to(values[:, None, None], (50, 8, 8)).astype(np.uint8), y_train=labels)
        path = tmp_path / "x.npz"
    else:
        path = tmp_path / "x"
        for value, label in zip(values, labels):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), int(value)).save(path / str(label) / f"{value}.png")
    images = data.load_images(str(path), image_size=8, holdout=0.2)
    train, test = (x[:, 0, 0, 0].tolist() for x in (images.x_train, images.x_test))
    assert images.y_test.bincount().tolist() == [2, 8] and images.y_train.bincount().tolist() == [8, 31, 1]
    assert sorted(train + test) == values.tolist() and labels[train].tolist() == images.y_train.tolist()
    assert labels[test].tolist() == images.y_test.tolist()
    if kind == "folder":
        assert images.names[1] == [f"{labels[k]}/{k}.png" for k in test]
    assert torch.equal(data.load_images(str(path), image_size=8, holdout=0.2).x_test, images.x_test)


def test_holdout_is_refused_where_it_makes_no_sense(npz, tmp_path):
    with pytest.raises(InputError, match="--holdout got 0.1, and .* has test images of its own"):
        data.load_images(str(npz), holdout=0.1)
    with pytest.raises(InputError, match="--holdout got 0.1, and .* has no labels"):
        data.load_images(str(colours(tmp_path, "0.png", "1.png")), holdout=0.1)


def test_a_run_with_holdout_is_evaluated_on_it_and_transferred_without(npz, tmp_path):
    path = colours(tmp_path / "x", *(f"{c}/{k}.png" for c in "ab" for k in range(8)))
    result = run(tmp_path / "run", "--dataset", str(path), *FOLDER, "--holdout", "0.25", *SMALL, "--knn-every", "1")
    assert sum(result["metrics"][0]["num_examples"]) == 12 and result["metrics"][0]["knn"] is not None
    for more in ([], ["--transfer", str(npz)]):
        evaluation.main(parse_evaluation([str(tmp_path / "run"), "--knn", *more]))


# ------------------------------------------------------------------------------------------------------- one's own split


def indices(images, kind, clients, at_least=1):
    everything = np.arange(len(images.x_train))
    return [part.tolist() for part in data.client_indices(images, everything, clients, kind, 0, None, 0.5, at_least=at_least)]


FOLDERS = {  # the files, each with its party; the classes; the test images
    "without classes": ({"b/0.png": 1, "a/1.png": 0, "a/deep/2.png": 0, "c/3.png": 2}, [], []),
    "with classes": ({"a/cat/0.png": 0, "a/dog/1.png": 0, "b/cat/2.png": 1, "c/eel/3.png": 2}, ["cat", "dog", "eel"], []),
    "one class each": ({"a/cat/0.png": 0, "b/dog/1.png": 1, "c/eel/2.png": 2}, ["cat", "dog", "eel"], []),
    "some with classes": ({"a/cat/0.png": 0, "b/1.png": 1, "c/eel/2.png": 2}, [], []),
    "under train": ({"train/a/cat/0.png": 0, "train/b/dog/1.png": 1, "train/c/dog/2.png": 2}, ["cat", "dog"], ["test/cat/9.png"]),
    "with own tests": ({"a/train/cat/0.png": 0, "b/train/dog/1.png": 1, "c/train/dog/2.png": 2}, ["cat", "dog"], ["c/test/dog/9.png"]),
    "test beside": ({"a/cat/0.png": 0, "b/dog/1.png": 1, "c/dog/2.png": 2}, ["cat", "dog"], ["test/cat/9.png"]),
    "numbered": ({"10/0.png": 2, "9/1.png": 1, "2/2.png": 0}, [], []),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_for_each_party(kind, tmp_path, capsys):
    files, classes, tests = FOLDERS[kind]
    (colours(tmp_path, *files, *tests) / ".DS_Store").touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    images = data.load_images(str(tmp_path), image_size=16, partition="folders")
    owners = {name: k for k, part in enumerate(indices(images, "folders", 3)) for name in (images.names[0][i] for i in part)}
    assert owners == files and images.classes == classes and list(images.names[1]) == tests
    assert f"clients 0 to 2 are {', '.join(images.parties)}" in capsys.readouterr().err
    if classes:
        assert [classes[y] for y in images.y_train] == [Path(name).parent.name for name in images.names[0]]


def test_folders_of_parties_that_cannot_be_are_refused(tmp_path):
    colours(tmp_path, "a/0.png", "b/1.png", "b/2.png")
    images = data.load_images(str(tmp_path), image_size=16, partition="folders")
    with pytest.raises(InputError, match="--clients got 5, and --partition folders has 2 parties: a, b"):
        indices(images, "folders", 5)
    with pytest.raises(InputError, match=r"client 0 \(a\) has 1 images, a batch needs 2"):
        indices(images, "folders", 2, at_least=2)
    with pytest.raises(InputError, match="--partition folders needs a folder"):
        indices(data.load_images("fashion"), "folders", 2)
    (tmp_path / "b/copy.png").symlink_to(tmp_path / "a/0.png")
    with pytest.raises(InputError, match="the folders of a and b lead to the same image"):
        data.load_images(str(tmp_path), image_size=16, partition="folders")
    (tmp_path / "b/copy.png").unlink()
    colours(tmp_path, "loose.png")
    with pytest.raises(InputError, match=r"1 images lie beside the parties' folders \(loose.png\)"):
        data.load_images(str(tmp_path), image_size=16, partition="folders")
    (tmp_path / "a/0.png").unlink()
    with pytest.raises(InputError, match="has no folders of parties"):
        data.load_images(str(tmp_path / "a"), image_size=16, partition="folders")


@pytest.mark.parametrize(
    "content, words",
    [
        ("[[0, 1], [2", "cannot be read"),
        ('{"0": [1]}', "needs a list with one list of whole numbers for each client"),
        ("[[0, 1.5]]", "needs a list with one list of whole numbers"),
        ("[[0, true]]", "needs a list with one list of whole numbers"),
        ("[[0, 1], [2, 64]]", "has the index 64, and there are 64 training images, counted from 0"),
        ("[[-1], [2]]", "has the index -1"),
        ("[[0, 1], [2, 1]]", "gives the image 1 to 0 and to 1"),
        ("[[0, 0], [1]]", "gives the image 0 to 0 and to 0"),
    ],
)
def test_lists_of_indices_of_another_form_are_refused(content, words, npz, tmp_path):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(InputError, match=words):
        data.load_images(str(npz), partition=str(tmp_path / "split.json"))


def test_lists_of_indices_are_the_clients_images_and_the_missing_ones_are_counted(npz, tmp_path, capsys):
    (tmp_path / "split.json").write_text("[[5, 3], [], [60]]")
    images = data.load_images(str(npz), partition=str(tmp_path / "split.json"))
    assert "61 of 64 training images belong to nobody" in capsys.readouterr().err
    assert indices(images, "x.json", 3, at_least=0) == [[3, 5], [], [60]]
    with pytest.raises(InputError, match=r"client 1 \(1\) has 0 images"):
        indices(images, "x.json", 3)
    private = np.array([3, 4, 60])  # FedCA's public images are nobody's
    assert [part.tolist() for part in data.client_indices(images, private, 3, "x.json", at_least=0)] == [[3], [], [60]]


@pytest.mark.parametrize("comma", [",", ";"])
def test_a_csv_with_the_party_of_each_file(comma, tmp_path):
    colours(tmp_path / "x", *(f"{k}.png" for k in range(4)))
    table = tmp_path / "parties.csv"
    table.write_text("\ufefffile,party\n3.png,north\n0.png,south\n1.png,south\n".replace(",", comma))
    images = data.load_images(str(tmp_path / "x"), image_size=16, partition=str(table))
    assert indices(images, str(table), 2) == [[3], [0, 1]] and images.parties == ["north", "south"]
    for content, words in (
        ("file,owner\n0.png,a\n", "has no column party; it needs a first line with file, party"),
        ("file,party\n9.png,a\n", r"names 1 files that are no training images \(9.png\)"),
        ("file,party\n0.png,a\n0.png,b\n", "gives the image 0 to a and to b"),
        ("file,party\n0.png,a\n1.png\n", "line 3 has not one value for each column"),
        ("", "has no column file"),
    ):
        table.write_text(content)
        with pytest.raises(InputError, match=words):
            data.load_images(str(tmp_path / "x"), image_size=16, partition=str(table))


@pytest.mark.parametrize("owners", [np.array([2, 7, 10, 2]), np.array(["a", "b", "c", "a"])])
def test_an_npz_may_say_whose_each_image_is(owners, tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 8, 8), np.uint8), client_train=owners)
    images = data.load_images(str(tmp_path / "x.npz"))
    assert indices(images, "parties", 3) == [[0, 3], [1], [2]] and len(data.load_unlabelled(tmp_path / "x.npz", 8)) == 4
    with pytest.raises(InputError, match="--partition parties needs the array client_train"):
        indices(data.load_images("fashion"), "parties", 3)


@pytest.mark.draws
def test_three_folders_train_as_three_clients_and_their_partition_is_saved_and_used(tmp_path, monkeypatch, capsys):
    path = colours(tmp_path / "x", *(f"{party}/{k}.png" for party in "abc" for k in range(5)))
    base = ["--dataset", str(path), *FOLDER, *SMALL, "--clients", "3"]
    monkeypatch.chdir(tmp_path)
    fedu.main(parse([*base, "--partition", "folders", "--dry-run", "--save-partition", "split.json"]))
    assert capsys.readouterr().out.splitlines() == [f"client {k}: 5 images" for k in range(3)]
    assert (tmp_path / "partition.png").exists() and not (tmp_path / "runs").exists()
    assert json.loads((tmp_path / "split.json").read_text()) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    by_folders = run(tmp_path / "one", *base, "--partition", "folders")
    by_file = run(tmp_path / "two", *base, "--partition", "split.json")
    assert by_folders["metrics"][0]["num_examples"] == [5, 5, 5] and (tmp_path / "one/partition.png").exists()
    assert torch.equal(by_folders["encoders"][0], by_file["encoders"][0])
    pooled = run(tmp_path / "central", *base, "--partition", "split.json", "--method", "central")
    assert pooled["metrics"][0]["num_examples"] == [15]


def test_classes_of_each_client_are_counted(npz):
    images = data.load_images(str(npz))  # of which image k has the class k % 4
    assert data.count_classes(images, [torch.tensor([0, 4, 1]), torch.tensor([3])]).tolist() == [[2, 1, 0, 0], [0, 0, 0, 1]]
    without = images._replace(y_train=images.y_train[:0])
    assert data.count_classes(without, [torch.tensor([0, 4, 1]), torch.tensor([3])]).tolist() == [[3], [1]]


# ---------------------------------------------------------------------------------------------------- the same images later


def test_a_hash_of_images_and_labels_tells_every_change(npz):
    images = data.load_images(str(npz))
    assert images.digest == data.load_images(str(npz)).digest
    for name in ("x_train", "y_train", "x_test", "y_test"):
        changed = getattr(images, name).clone()
        changed.view(-1)[-1] ^= 1
        assert images._replace(**{name: changed}).digest != images.digest
    assert images._replace(x_train=images.x_train[:-1], y_train=images.y_train[:-1]).digest != images.digest
    assert data.digest_of(torch.zeros(2, 3)) != data.digest_of(torch.zeros(3, 2)) != data.digest_of(torch.zeros(2, 3), torch.zeros(0))


@pytest.fixture
def moved(stopped, tmp_path):
    """A stopped run on a data set of its own, which has moved since; where it was and where it is."""
    config = json.loads((stopped / "config.json").read_text())
    was, here = Path(config["options"]["dataset"]), tmp_path / "moved.npz"
    here.write_bytes(was.read_bytes())
    config["options"]["dataset"] = str(tmp_path / "gone.npz")
    (stopped / "config.json").write_text(json.dumps(config))
    return stopped, here


def change(path, invert=False):
    with np.load(path) as arrays:
        content = dict(arrays)
    content |= {"x_train": 255 - content["x_train"]} if invert else {"y_train": content["y_train"][::-1]}
    np.savez(path, **content)


@pytest.mark.parametrize("invert", [False, True])
def test_a_run_goes_on_with_its_own_images_wherever_they_lie(moved, invert):
    folder, here = moved
    with pytest.raises(InputError, match="gone.npz does not exist"):
        fedu.resume(folder)
    whole = here.read_bytes()
    change(here, invert)
    with pytest.raises(InputError, match=f"dataset {here} has other images or labels than when {folder} began"):
        fedu.resume(folder, dataset=str(here))
    here.write_bytes(whole)
    fedu.resume(folder, dataset=str(here))
    with pytest.raises(InputError, match="gone.npz does not exist"):
        evaluation.main(parse_evaluation([str(folder), "--knn"]))
    evaluation.main(parse_evaluation([str(folder), "--knn", "--dataset", str(here)]))
    assert json.loads((folder / "eval.jsonl").read_text())["dataset"].endswith("gone.npz")
    change(here, invert)
    with pytest.raises(InputError, match="has other images or labels than when"):
        evaluation.main(parse_evaluation([str(folder), "--knn", "--dataset", str(here)]))
    evaluation.main(parse_evaluation([str(folder), "--knn", "--transfer", str(here)]))


def test_a_run_goes_on_with_its_own_partition(tmp_path):
    split = tmp_path / "split.json"
    split.write_text(json.dumps([list(range(10)), list(range(10, 20))]))
    options = parse(["--partition", str(split), *SMALL, "--knn-every", "0", "--out", str(tmp_path / "run")])
    fedu.main(options)
    split.write_text(json.dumps([list(range(11)), list(range(11, 20))]))
    with pytest.raises(InputError, match="has other images of each client than when"):
        fedu.resume(tmp_path / "run")


def test_a_run_without_a_hash_is_not_moved(moved):
    folder, here = moved
    config = json.loads((folder / "config.json").read_text())
    del config["data"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no hash of its images, since an older version began it"):
        fedu.resume(folder, dataset=str(here))
    with pytest.raises(SystemExit):
        parse_evaluation([str(folder), "--transfer", "x.npz", "--dataset", "y.npz"])


# ------------------------------------------------------------------------------------------------------- a table of labels

ROWS = ["file,label,party,split", "1.png,cat,south,train", "deep/0.png,dog,north,train", "2.png,dog,north,val", "3.png,cat,south,train"]


def labelled(folder, table, comma=","):
    colours(folder / "x", "deep/0.png", "1.png", "2.png", "3.png")
    (folder / "labels.csv").write_text("\ufeff" + "\r\n".join(table).replace(",", comma))
    return data.load_images(str(folder / "x"), image_size=16, labels=str(folder / "labels.csv"))


@pytest.mark.parametrize("comma", [",", ";"])
def test_a_table_gives_labels_parties_and_splits(comma, tmp_path, capsys):
    images = labelled(tmp_path, ROWS, comma)
    assert images.names == (["1.png", "3.png", "deep/0.png"], ["2.png"]) and images.classes == ["cat", "dog"]
    assert images.y_train.tolist() == [0, 0, 1] and images.y_test.tolist() == [1]
    assert images.x_train[:, 0, 0, 0].tolist() == [10, 30, 0] and images.x_test[0, 0, 0, 0] == 20
    assert indices(images, "parties", 2) == [[2], [0, 1]]
    assert "the val images are taken as test images" in capsys.readouterr().err


def test_a_table_may_have_two_columns_and_miss_images(tmp_path, capsys):
    images = labelled(tmp_path, ["file,label", "1.png,4", "3.png,2"])
    assert images.y_train.tolist() == [1, 0] and images.classes == ["2", "4"] and not len(images.x_test)
    assert "2 of 4 images have no label there and are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table, words",
    [
        (["1.png,cat"], "has no column file"),
        (["file,class", "1.png,cat"], "has no column label"),
        (["file,label", "9.png,cat"], r"names 1 files that are no images of .* \(9.png\)"),
        (["file,label", "1.png,cat", "1.png,dog"], r"several rows for an image \(1.png\), which needs one label \(not multi-label\)"),
        (["file,label,split", "1.png,cat,Dev"], "has the split dev; it needs one of train, test, val"),
        (["file,label,split", "1.png,cat,test"], "has no training image"),
        (["file,label", "1.png,"], "line 2 has not one value for each column"),
    ],
)
def test_tables_of_another_form_are_refused(table, words, tmp_path):
    with pytest.raises(InputError, match=words):
        labelled(tmp_path, table)
