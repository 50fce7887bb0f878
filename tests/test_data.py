"""Data sets as sequences: formats, damaged files, order of pixels, downloading."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch

from s4mini import data

RECORDS = 20


def cifar10_file(rng, records=RECORDS):
    content = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
    content[:, 0] %= 10
    return content.tobytes()


def idx_file(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tiny, valid copies of CIFAR-10 and MNIST."""
    monkeypatch.setattr(data, "_RECORDS", RECORDS)
    rng = np.random.default_rng(0)
    cifar10, mnist = tmp_path / "cifar-10-batches-bin", tmp_path / "mnist"
    cifar10.mkdir(), mnist.mkdir()
    for name in data._SHA1["cifar10"]:
        (cifar10 / name).write_bytes(cifar10_file(rng))
    for split, n in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (n, 28, 28))
        (mnist / f"{split}-images-idx3-ubyte").write_bytes(idx_file(images))
        packed = gzip.compress(idx_file(np.arange(n) % 10))
        (mnist / f"{split}-labels-idx1-ubyte.gz").write_bytes(packed)
    return tmp_path


def test_cifar10_is_read_plane_by_plane(folder):
    path = folder / "cifar-10-batches-bin" / "test_batch.bin"
    raw = path.read_bytes()
    images, labels = data.read_cifar10(path)
    assert images.shape == (RECORDS, 32, 32, 3) and images.dtype == np.uint8
    for record, row, column, colour in [(0, 0, 0, 0), (3, 5, 7, 1), (19, 31, 31, 2)]:
        at = 3073 * record + 1 + 1024 * colour + 32 * row + column
        assert images[record, row, column, colour] == raw[at]
    assert labels.tolist() == list(raw[::3073])


@pytest.mark.parametrize("name", data.NAMES)
def test_sequences_are_normalised_and_can_be_undone(folder, name):
    read = data.load(name, folder=folder)
    everything = torch.arange(len(read.labels["train"]))
    u, target, _ = read.batch("train", everything)
    assert u.dtype == torch.float32 and target.dtype == torch.int64
    assert u.shape == (len(everything), read.size**2, len(read.mean))
    std, mean = torch.std_mean(u, dim=(0, 1), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-4)
    stored = read.images["train"] / read.images["train"].max()
    torch.testing.assert_close(read.pictures(u), stored, rtol=0, atol=1e-6)


def test_the_test_set_is_normalised_by_the_training_set(folder):
    read = data.load("cifar10", folder=folder)
    u, *_ = read.batch("test", torch.arange(RECORDS))
    pixels = read.images["test"].double().flatten(1, 2)
    train = read.images["train"].double().flatten(0, 2)
    expected = (pixels - train.mean(0)) / train.std(0, correction=0)
    torch.testing.assert_close(u.double(), expected, rtol=0, atol=1e-5)


def test_raster_order_and_averaging():
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    u = data.raster(images)
    assert all(torch.equal(u[:, 8 * i + j], images[:, i, j].float()) for i, j in [(0, 7), (5, 2)])
    small = data.raster(images, size=4).unflatten(1, (4, 4))
    square = images[:, 2:4, 6:8].float().mean((1, 2))
    assert torch.equal(small[:, 1, 3], square)


def test_grey_is_a_weighted_sum_of_colours():
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    expected = images.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = data.raster(images, gray=True)
    assert grey.shape == (2, 16, 1)
    torch.testing.assert_close(grey[..., 0].double(), expected.flatten(1), rtol=1e-6, atol=0)


def test_a_constant_channel_does_not_divide_by_zero(folder):
    root = folder / "cifar-10-batches-bin"
    for path in root.iterdir():
        content = np.frombuffer(path.read_bytes(), np.uint8).reshape(RECORDS, 3073).copy()
        content[:, 1:1025] = 7
        path.write_bytes(content.tobytes())
    u, *_ = data.load("cifar10", folder=folder).batch("train", torch.arange(3))
    assert u.isfinite().all() and (u[..., 0] == 0).all()


def test_the_digits_have_the_split_that_the_book_says():
    read = data.load("digits")
    assert (len(read.labels["train"]), len(read.labels["test"])) == (1437, 360)
    assert read.length == 64 and data.available("digits") and data.official("digits")


def test_a_copy_is_called_a_copy(folder, monkeypatch):
    assert not data.official("cifar10", folder)
    assert "not the official files" in data.load("cifar10", folder=folder).title
    root = folder / "cifar-10-batches-bin"
    sums = {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in root.iterdir()}
    monkeypatch.setitem(data._SHA1, "cifar10", dict(sorted(sums.items())))
    assert data.official("cifar10", folder)
    assert data.load("cifar10", folder=folder).title == "CIFAR-10"


def test_data_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("S4MINI_DATA", str(tmp_path))
    assert data.data_dir() == tmp_path
    assert not data.available("cifar10")
    with pytest.raises(FileNotFoundError, match="make data") as caught:
        data.load("cifar10")
    assert str(tmp_path) in str(caught.value)
    monkeypatch.delenv("S4MINI_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.data_dir() == tmp_path / "cache" / "s4mini"


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "oversized":
        path.write_bytes(content + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "mislabelled":
        path.write_bytes(bytes([10]) + content[1:])
    elif how == "magic":
        path.write_bytes(b"\0\0\x08\x01" + content[4:])


DAMAGED = [
    ("cifar10", "data_batch_3.bin", "truncated", "expected 61460 bytes .* found 61459"),
    ("cifar10", "data_batch_3.bin", "oversized", "found 61461"),
    ("cifar10", "test_batch.bin", "empty", "found 0"),
    ("cifar10", "test_batch.bin", "mislabelled", "labels 0 to 9, found 10 at record 0"),
    ("mnist", "train-images-idx3-ubyte", "truncated", "expected 23536 bytes, found 23535"),
    ("mnist", "train-images-idx3-ubyte", "oversized", "found 23537"),
    ("mnist", "t10k-images-idx3-ubyte", "empty", "header of 16 bytes, found 0"),
    ("mnist", "t10k-images-idx3-ubyte", "magic", "magic number 2051, found 2049"),
    ("mnist", "train-labels-idx1-ubyte.gz", "truncated", "whole gzip file"),
    ("mnist", "t10k-labels-idx1-ubyte.gz", "mislabelled", "whole gzip file"),
]


@pytest.mark.parametrize("name, file, how, message", DAMAGED)
def test_a_damaged_file_is_named(folder, name, file, how, message):
    damage(folder / data._FOLDERS[name] / file, how)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(name, folder=folder)
    assert file in str(caught.value)


def test_labels_that_do_not_fit_are_refused(folder):
    path = folder / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_file(np.arange(29) % 10)))
    with pytest.raises(ValueError, match=r"expected 30 labels.*found 29"):
        data.load("mnist", folder=folder)
    path.write_bytes(gzip.compress(idx_file(np.full(30, 12))))
    with pytest.raises(ValueError, match="found 12 at record 0"):
        data.load("mnist", folder=folder)


IMAGES = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
BAD_CALLS = [
    (ValueError, "name", lambda: data.load("imagenet")),
    (ValueError, "name", lambda: data.available("imagenet")),
    (ValueError, "name", lambda: data.official("imagenet")),
    (ValueError, "name", lambda: data.download("imagenet")),
    (ValueError, "size", lambda: data.load("digits", size=3)),
    (ValueError, "size", lambda: data.load("digits", size=0)),
    (TypeError, "size", lambda: data.load("digits", size=4.0)),
    (TypeError, "images", lambda: data.raster(IMAGES.float())),
    (TypeError, "images", lambda: data.raster(IMAGES.numpy())),
    (ValueError, "images", lambda: data.raster(IMAGES[0])),
    (ValueError, "images", lambda: data.raster(IMAGES[:, :3])),
    (ValueError, "images", lambda: data.raster(IMAGES[..., :2])),
    (ValueError, "size", lambda: data.raster(IMAGES, size=3)),
    (ValueError, "split", lambda: data.load("digits").batch("valid", torch.arange(2))),
    (FileNotFoundError, "nowhere", lambda: data.read_cifar10("nowhere.bin")),
    (FileNotFoundError, "nowhere", lambda: data.read_idx("nowhere", 3)),
    (ValueError, "axes", lambda: data.read_idx("nowhere", 0)),
    (TypeError, "axes", lambda: data.read_idx("nowhere", 3.0)),
]


@pytest.mark.parametrize("kind, word, call", BAD_CALLS)
def test_bad_calls(kind, word, call):
    with pytest.raises(kind, match=word):
        call()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine, and the folder it serves."""
    root = tmp_path / "served"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def archive(folder, names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            tar.add(folder / "cifar-10-batches-bin" / name, f"cifar-10-batches-bin/{name}")
    return buffer.getvalue()


@pytest.fixture
def published(folder, server, monkeypatch):
    """CIFAR-10 and MNIST as their sites publish them, from this machine."""
    root, url = server
    content = archive(folder, data._SHA1["cifar10"])
    (root / "cifar.tar.gz").write_bytes(content)
    monkeypatch.setattr(data, "_CIFAR10_URL", url + "cifar.tar.gz")
    monkeypatch.setattr(data, "_CIFAR10_MD5", "md5:" + hashlib.md5(content).hexdigest())
    sums = {}
    for name in data._MNIST_MD5:
        raw = folder / "mnist" / name.removesuffix(".gz")
        packed = gzip.compress(raw.read_bytes()) if raw.exists() else None
        packed = packed or (folder / "mnist" / name).read_bytes()
        (root / name).write_bytes(packed)
        sums[name] = "md5:" + hashlib.md5(packed).hexdigest()
    monkeypatch.setattr(data, "_MNIST_URL", url)
    monkeypatch.setattr(data, "_MNIST_MD5", sums)
    return root


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_download_gives_what_load_reads(published, folder, tmp_path, name):
    target = tmp_path / "new" / "place"
    assert not data.available(name, target)
    assert data.download(name, target, progress=False) == target
    assert data.available(name, target)
    ours, theirs = data.load(name, folder=target), data.load(name, folder=folder)
    assert torch.equal(ours.images["test"], theirs.images["test"])
    left = {p.name for p in target.iterdir()}
    assert left == {data._FOLDERS[name]}, "nothing but the data set remains"
    for file in published.iterdir():
        file.unlink()
    data.download(name, target, progress=False)  # there already: no request is made


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_wrong_checksum_leaves_nothing(published, tmp_path, name):
    for file in published.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    target = tmp_path / "new"
    with pytest.raises(ValueError, match="hash"):
        data.download(name, target, progress=False)
    assert not data.available(name, target)
    assert [p for p in target.rglob("*") if p.is_file()] == []


def test_an_archive_without_a_file_is_refused(published, folder, tmp_path, monkeypatch):
    content = archive(folder, list(data._SHA1["cifar10"])[:-1])
    (published / "cifar.tar.gz").write_bytes(content)
    monkeypatch.setattr(data, "_CIFAR10_MD5", "md5:" + hashlib.md5(content).hexdigest())
    with pytest.raises(ValueError, match=r"test_batch\.bin"):
        data.download("cifar10", tmp_path / "new", progress=False)
    assert not data.available("cifar10", tmp_path / "new")


def test_the_command_line_says_what_went_wrong(published, tmp_path, capsys):
    assert data._main(["cifar10", "digits", "--folder", str(tmp_path / "a")]) == 0
    (published / "cifar.tar.gz").unlink()
    assert data._main(["cifar10", "--folder", str(tmp_path / "b")]) == 1
    assert data._main(["imagenet"]) == 1
    assert "imagenet" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(published, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        data.download("cifar10", tmp_path / "no", progress=False)


@pytest.mark.parametrize(
    ("error", "index"),
    [
        (TypeError, 3),
        (TypeError, torch.tensor([0.0])),
        (TypeError, torch.tensor([True])),
        (ValueError, torch.tensor(0)),
        (ValueError, torch.tensor([-1])),
        (ValueError, torch.tensor([10**6])),
    ],
)
def test_batches_are_numbered(error, index):
    with pytest.raises(error, match=r"^index: expected"):
        data.load("digits").batch("train", index)


def test_a_size_is_not_taken_for_a_flag():
    with pytest.raises(ValueError, match="gray: expected one of False, True; got 4"):
        data.load("digits", 4)
