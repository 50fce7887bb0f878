"""Data sets as sequences: formats, damaged files, orders, generators, downloading."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import random
import re
import struct
import tarfile
import threading
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini import data, forecast, images, lra, speech
from s4mini.lra import SYMBOLS

RECORDS = 20
MADE = ("listops", "pathfinder")
IMAGE_SETS = ("cifar10", "mnist", "digits", "pathfinder")
RECORDINGS = tuple(
    f"{d}_{who}_{k}.wav" for d in range(10) for who in ("ann", "bob") for k in range(7)
)


def change(monkeypatch, name, **values):
    """Change the record of a data set for one test."""
    monkeypatch.setitem(data.SOURCES, name, replace(data.source(name), **values))


def sha1(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(autouse=True)
def made_elsewhere(tmp_path_factory, monkeypatch):
    """Keep what is made out of the user's folder."""
    if "S4MINI_DATA" not in os.environ:
        monkeypatch.setenv("S4MINI_DATA", str(tmp_path_factory.mktemp("data")))


def cifar10_file(rng, records=RECORDS):
    content = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
    content[:, 0] %= 10
    return content.tobytes()


def idx_file(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def wav_file(samples, channels=1, width=2, rate=8000):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels), file.setsampwidth(width), file.setframerate(rate)
        file.writeframes(samples.astype(f"<i{width}").tobytes())
    return buffer.getvalue()


HOURS = 20 * 30 * 24 + 100


def ett_file(rng):
    hours = np.datetime64("2016-07-01T00") + np.arange(HOURS)
    days = [str(h).replace("T", " ") + ":00:00" for h in hours]
    rows = rng.normal(10, 3, (HOURS, 7))
    lines = [
        f"{d},{','.join(repr(float(v)) for v in row)}" for d, row in zip(days, rows, strict=True)
    ]
    return "\n".join(["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT", *lines, ""])


@pytest.fixture(scope="session")
def ett_text():
    return ett_file(np.random.default_rng(1))


@pytest.fixture
def folder(tmp_path, monkeypatch, ett_text):
    """Tiny, valid copies of all data sets that have files."""
    monkeypatch.setattr(images, "RECORDS", RECORDS)
    monkeypatch.setattr(forecast, "HOURS", HOURS)
    change(monkeypatch, "speech", files=RECORDINGS)
    rng = np.random.default_rng(0)
    cifar10, mnist = tmp_path / "cifar-10-batches-bin", tmp_path / "mnist"
    cifar10.mkdir(), mnist.mkdir()
    for name in data.source("cifar10").files:
        (cifar10 / name).write_bytes(cifar10_file(rng))
    for split, n in (("train", 30), ("t10k", 12)):
        shown = rng.integers(0, 256, (n, 28, 28))
        (mnist / f"{split}-images-idx3-ubyte").write_bytes(idx_file(shown))
        packed = gzip.compress(idx_file(np.arange(n) % 10))
        (mnist / f"{split}-labels-idx1-ubyte.gz").write_bytes(packed)
    speech, ett = tmp_path / "fsdd" / "recordings", tmp_path / "ETT-small"
    speech.mkdir(parents=True), ett.mkdir()
    for file in list(data.source("speech").files):
        sound = rng.integers(-(2**15), 2**15, rng.integers(10, 90))
        (speech / file).write_bytes(wav_file(sound))
    for file in ("ETTh1.csv", "ETTh2.csv"):
        (ett / file).write_text(ett_text)
    return tmp_path


def test_cifar10_is_read_plane_by_plane(folder):
    path = folder / "cifar-10-batches-bin" / "test_batch.bin"
    raw = path.read_bytes()
    shown, labels = images.read_cifar10(path)
    assert shown.shape == (RECORDS, 32, 32, 3) and shown.dtype == np.uint8
    for record, row, column, colour in [(0, 0, 0, 0), (3, 5, 7, 1), (19, 31, 31, 2)]:
        at = 3073 * record + 1 + 1024 * colour + 32 * row + column
        assert shown[record, row, column, colour] == raw[at]
    assert labels.tolist() == list(raw[::3073])


@pytest.mark.parametrize("order", ["raster", "permuted", "bitreversal"])
@pytest.mark.parametrize("name", IMAGE_SETS)
def test_images_are_normalised_and_can_be_undone(folder, name, order):
    made = {"examples": 20} if name == "pathfinder" else {}
    read = data.load(name, folder=folder, order=order, **made)
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
    shown = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    u = images.raster(shown)
    assert all(torch.equal(u[:, 8 * i + j], shown[:, i, j].float()) for i, j in [(0, 7), (5, 2)])
    small = images.raster(shown, size=4).unflatten(1, (4, 4))
    square = shown[:, 2:4, 6:8].float().mean((1, 2))
    assert torch.equal(small[:, 1, 3], square)


def test_grey_is_a_weighted_sum_of_colours():
    shown = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    expected = shown.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = images.raster(shown, gray=True)
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
    change(monkeypatch, "cifar10", digests={p.name: sha1(p.read_bytes()) for p in root.iterdir()})
    assert data.official("cifar10", folder)
    assert data.load("cifar10", folder=folder).title == "CIFAR-10"


def test_data_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("S4MINI_DATA", str(tmp_path))
    assert data.data_dir() == tmp_path
    for name in set(data.NAMES) - {"digits", *MADE}:
        assert not data.available(name)
        with pytest.raises(FileNotFoundError, match="s4mini data") as caught:
            data.load(name)
        assert str(tmp_path / data.source(name).folder) in str(caught.value)
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
    elif how == "bomb":
        path.write_bytes(gzip.compress(bytes(2**26 + 1), 1))
    elif how == "no images":
        path.write_bytes(idx_file(np.zeros((0, 28, 28))))
    elif how == "other shape":
        path.write_bytes(idx_file(np.zeros((30, 14, 14))))
    elif how == "huge":
        path.write_bytes(content[:4] + b"\xff" * 12 + content[16:])
    elif how == "no size":
        path.write_bytes(content[:4] + bytes(4) + content[8:])
    elif how == "full size":
        path.write_bytes(content[:4] + b"\xff" * 4 + content[8:])
    elif how == "stereo":
        path.write_bytes(wav_file(np.arange(20), channels=2))
    elif how == "silent":
        path.write_bytes(wav_file(np.arange(0)))
    elif how == "rate":
        path.write_bytes(wav_file(np.arange(20), rate=16000))
    else:  # a pattern and what takes its place
        path.write_text(re.sub(how[0], how[1], path.read_text(), count=1))


DAMAGED = [
    ("cifar10", "data_batch_3.bin", "truncated", "expected 61460 bytes .* found 61459"),
    ("cifar10", "data_batch_3.bin", "oversized", "found 61461"),
    ("cifar10", "test_batch.bin", "empty", "found 0"),
    ("cifar10", "test_batch.bin", "mislabelled", "labels 0 to 9, found 10 at record 0"),
    ("mnist", "train-images-idx3-ubyte", "truncated", "expected 23536 bytes for .*, found 23535"),
    ("mnist", "train-images-idx3-ubyte", "oversized", "found 23537"),
    ("mnist", "t10k-images-idx3-ubyte", "empty", "header of 16 bytes, found 0"),
    ("mnist", "t10k-images-idx3-ubyte", "magic", "magic number 2051, found 2049"),
    ("mnist", "train-labels-idx1-ubyte.gz", "truncated", "whole gzip file"),
    ("mnist", "t10k-labels-idx1-ubyte.gz", "mislabelled", "whole gzip file"),
    ("mnist", "t10k-labels-idx1-ubyte.gz", "bomb", "at most 67108864 bytes"),
    ("mnist", "train-images-idx3-ubyte", "no images", "for \\[0, 28, 28\\], found"),
    ("mnist", "train-images-idx3-ubyte", "other shape", "expected images of 28 x 28"),
    ("mnist", "train-images-idx3-ubyte", "huge", "for \\[4294967295"),
    ("speech", "3_ann_2.wav", "no size", "expected a WAV file of 8 bytes"),
    ("speech", "3_ann_2.wav", "full size", "expected a WAV file of 4294967303 bytes"),
    ("speech", "3_ann_2.wav", "truncated", r"expected a WAV file of \d+ bytes"),
    ("speech", "3_ann_2.wav", "empty", "expected a WAV file"),
    ("speech", "0_bob_6.wav", "mislabelled", "expected a WAV file"),
    ("speech", "0_bob_6.wav", "stereo", "found 2 of 2 at 8000"),
    ("speech", "0_bob_6.wav", "rate", "found 1 of 2 at 16000"),
    ("speech", "0_bob_6.wav", "silent", "found 0"),
    ("etth1", "ETTh1.csv", "truncated", f"expected {HOURS} whole rows"),
    ("etth1", "ETTh1.csv", "empty", "expected columns date,HUFL"),
    ("etth1", "ETTh1.csv", ("HUFL,HULL", "HULL,HUFL"), "found 'date,HULL,HUFL"),
    ("etth2", "ETTh2.csv", ("2016-07-02 .*\n", ""), "expected 14500 whole rows of 7 num.*14499"),
    ("etth2", "ETTh2.csv", ("07-01 05", "07-01 06"), "an hour after 2016-07-01T04"),
    ("etth2", "ETTh2.csv", (r"(07-01 05:00:00),[^,]*", r"\1,nan"), "finite numbers, row 5"),
    ("etth2", "ETTh2.csv", (r"(07-01 05:00:00),[^,]*", r"\1"), "a time and 7 numbers"),
    ("etth2", "ETTh2.csv", (r"(07-01 05:00:00),[^,]*", r"\1,x"), "a time and 7 numbers"),
]


@pytest.mark.parametrize("name, file, how, message", DAMAGED)
def test_a_damaged_file_is_named(folder, name, file, how, message):
    damage(folder / data.source(name).folder / file, how)
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


def test_a_truncated_table_is_refused_even_in_mid_number(folder):
    path = folder / "ETT-small" / "ETTh1.csv"
    path.write_bytes(path.read_bytes()[:-5])  # a shorter last number, no end of line
    with pytest.raises(ValueError, match="whole rows"):
        data.load("etth1", folder=folder)


@pytest.mark.parametrize("L", [1, 2, 3, 8, 64, 784, 1024])
def test_orders_are_permutations(L):
    for order in ("raster", "permuted", "bitreversal"):
        steps = images.reading_order(order, L)
        assert torch.equal(steps.sort().values, torch.arange(L))
        assert torch.equal(steps, images.reading_order(order, L))


def test_bit_reversal_is_that_of_the_official_code():
    def reversal(m):  # by its recursion: even places first
        half = reversal(m - 1) if m else None
        return [0] if half is None else [2 * k for k in half] + [2 * k + 1 for k in half]

    for L in (8, 11, 784):
        m = (L - 1).bit_length()
        # even-odd interleaving reversed: number of place k is the reversed digits of k
        digits = [int(f"{k:0{m}b}"[::-1], 2) for k in range(2**m)]
        assert reversal(m) == digits
        assert images.reading_order("bitreversal", L).tolist() == [k for k in digits if k < L]


def test_the_random_order_is_the_one_of_the_literature():
    steps = images.reading_order("permuted", 784)
    assert steps[:5].tolist() == np.random.RandomState(92916).permutation(784)[:5].tolist()
    assert steps[:5].tolist() == [319, 576, 323, 107, 355]


def test_orders_move_pixels_only(folder):
    read = {o: data.load("mnist", folder=folder, order=o) for o in images.ORDERS}
    index = torch.arange(5)
    u = {o: d.batch("test", index).u for o, d in read.items()}
    for order, d in read.items():
        assert torch.equal(u[order], u["raster"][:, images.reading_order(order, 784)])
        assert torch.equal(d.pictures(u[order]), read["raster"].pictures(u["raster"]))


def test_speech_follows_the_official_split_and_pads_with_zeros(folder):
    read = data.load("speech", folder=folder, length=60)
    assert read.splits == ("train", "test") and read.task == "classify"
    assert (read.count("train"), read.count("test")) == (10 * 2 * 2, 10 * 2 * 5)
    root = folder / "fsdd" / "recordings"
    train = np.concatenate(
        [speech.read_wav(root / f) for f in list(data.source("speech").files) if f[-5] in "56"]
    ).astype(float)
    u, target, lengths = read.batch("test", torch.arange(100))
    assert u.shape == (100, 60, 1) and u.dtype == torch.float32
    files = [f for f in list(data.source("speech").files) if f[-5] in "01234"]
    for k in (0, 7, 41, 99):
        sound = speech.read_wav(root / files[k])[:60]
        assert target[k] == int(files[k][0]) and lengths[k] == len(sound)
        expected = torch.from_numpy((sound - train.mean()) / train.std())
        torch.testing.assert_close(u[k, : len(sound), 0].double(), expected, rtol=0, atol=1e-5)
        assert (u[k, len(sound) :] == 0).all()


def test_windows_are_those_of_the_official_loader(folder):
    L, h, month = 100, 24, 30 * 24
    _, values = forecast.read_ett(folder / "ETT-small" / "ETTh2.csv")
    scaled = (values - values[: 12 * month].mean(0)) / values[: 12 * month].std(0)
    borders = {"train": (0, 12), "validation": (12, 16), "test": (16, 20)}
    for univariate in (True, False):
        read = data.load("etth2", folder=folder, length=L, horizon=h, univariate=univariate)
        assert read.task == "forecast" and read.classes == () and read.splits == tuple(borders)
        assert read.channels == (1 if univariate else 7) and read.columns[-1] == "OT"
        kept = scaled[:, -1:] if univariate else scaled
        for split, (begin, end) in borders.items():
            part = kept[max(0, begin * month - L) : end * month]
            assert read.count(split) == len(part) - L - h + 1
            index = torch.tensor([0, 1, read.count(split) - 1])
            u, target, lengths = read.batch(split, index)
            assert lengths is None and target.shape == (3, h, read.channels)
            for k, i in enumerate(index):
                seen, future = part[i : i + L], part[i + L : i + L + h]
                assert np.abs(u[k].numpy() - seen).max() < 1e-5
                assert np.abs(target[k].numpy() - future).max() < 1e-5
        back = read.values * read.std + read.mean
        assert np.abs(back.numpy() - values[:, -read.channels :]).max() < 1e-4


def recursive_value(words):
    """The value of an expression by recursion on text: independent of the library's."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    values = []
    while words[0] != "]":
        values.append(recursive_value(words))
    words.pop(0)
    rules = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda v: int(np.median(v)),
        "[SM": lambda v: int(np.sum(v) % 10),
    }
    return rules[word](values)


def levels(symbols):
    depth = np.cumsum([(s in range(10, 14)) - (s == SYMBOLS.index("]")) for s in symbols])
    return 1 + depth.max()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    length=st.integers(8, 300),
    depth=st.integers(4, 12),
    arguments=st.integers(5, 12),
)
def test_expressions_keep_their_rules(seed, length, depth, arguments):
    symbols = lra.draw_listops(random.Random(seed), length, depth, arguments)
    assert length // 4 < len(symbols) < length
    assert levels(symbols) <= depth
    words = [SYMBOLS[s] for s in symbols]
    assert lra.evaluate_listops(symbols) == recursive_value(words) and not words
    again = lra.draw_listops(random.Random(seed), length, depth, arguments)
    assert again == symbols


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("[MIN 3 5 1 ]", 1),
        ("[MAX 3 [SM 9 9 ] 1 ]", 8),
        ("[MED 1 2 ]", 1),
        ("[MED 9 0 4 ]", 4),
        ("[MED 9 0 4 5 ]", 4),
        ("[SM 9 9 9 9 9 9 9 9 9 9 ]", 0),
        ("[MIN [MAX 1 [MED 5 7 6 ] ] 9 ]", 6),
    ],
)
def test_expressions_have_the_right_value(text, value):
    assert lra.evaluate_listops([SYMBOLS.index(w) for w in text.split()]) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "0 lists left open and 0 values"),
        ("1 2", "0 lists left open and 2 values"),
        ("[MIN 1 2", "1 lists left open and 0 values"),
        ("[MIN ]", "unexpected 14 at position 1"),
        ("1 ]", "unexpected 14 at position 1"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        lra.evaluate_listops([SYMBOLS.index(w) for w in text.split()])
    with pytest.raises(ValueError, match="unexpected 15 at position 0"):
        lra.evaluate_listops([15])


def test_listops_is_what_long_range_arena_asks_for():
    read = data.load("listops", examples=30)
    assert read.classes == tuple("0123456789") and read.channels == len(SYMBOLS) == 15
    assert [read.count(s) for s in ("train", "validation", "test")] == [30, 3, 3]
    u, target, lengths = read.batch("train", torch.arange(30))
    assert u.shape == (30, 2000, 15) and u.dtype == torch.float32
    assert lengths.min() > 500 and lengths.max() < 2000
    for k in range(30):
        n = lengths[k]
        assert (u[k, :n].sum(-1) == 1).all() and (u[k, n:] == 0).all()
        symbols = u[k, :n].argmax(-1).tolist()
        assert lra.evaluate_listops(symbols) == target[k] and levels(symbols) <= 10
    assert lra._counts(None, 96_000, 2000, 0, 1) == (96_000, 2000, 2000)


def same(one, other):
    assert one.splits == other.splits
    for split in one.splits:
        index = torch.arange(one.count(split))
        ours, theirs = one.batch(split, index), other.batch(split, index)
        assert torch.equal(ours.u, theirs.u) and torch.equal(ours.target, theirs.target)


@pytest.mark.parametrize("name, options", [("listops", {"length": 60}), ("pathfinder", {})])
def test_made_data_depend_on_the_seed_only(name, options):
    n = 300 if name == "listops" else 30
    one = data.load(name, examples=n, **options)
    same(one, data.load(name, examples=n, **options))
    other = data.load(name, examples=n, seed=1, **options)
    index = torch.arange(20)
    assert not torch.equal(one.batch("train", index).u, other.batch("train", index).u)
    assert not torch.equal(one.batch("train", index[:3]).u, one.batch("test", index[:3]).u)


def test_made_data_do_not_depend_on_the_number_of_workers():
    options = {"examples": 500, "length": 40, "seed": 5}
    same(data.load("listops", **options), data.load("listops", **options, workers=2))


def test_curves_and_dots_are_what_the_label_says():
    agree, labels = 0, []
    for seed in range(150):
        image, label = lra.draw_pathfinder(np.random.RandomState(seed))
        assert image.shape == (32, 32) and image.dtype == np.uint8
        bright = image > 0.8 * 255
        dots, found = scipy.ndimage.label(bright, np.ones((3, 3)))
        parts, _ = scipy.ndimage.label(image > 20, np.ones((3, 3)))
        if found == 2:
            touched = [set(parts[dots == k].tolist()) for k in (1, 2)]
            agree += (touched[0] == touched[1]) == bool(label)
        labels.append(label)
    assert agree >= 148  # at 32 x 32 pixels two curves may touch now and then
    assert 50 < sum(labels) < 100


def test_curves_keep_apart_and_the_label_decides_the_second_dot_only():
    for seed in range(40):
        a, b, _ = lra._two_curves(np.random.RandomState(seed))
        assert abs(abs(a[-1] - a[0]) - abs(b[0] - a[0])) < 1e-9
        assert abs(a[:, None] - b).min() > lra._ROOM - 0.75  # pixels have a width
        for curve in (a, b):
            assert min(curve.real.min(), curve.imag.min()) > 2
            assert max(curve.real.max(), curve.imag.max()) < 30
        image, label = lra.draw_pathfinder(np.random.RandomState(seed))
        ends = (a[0], a[-1]) if label else (a[0], b[0])
        for z in ends:
            assert image[int(z.imag), int(z.real)] == 255


def test_pathfinder_is_an_image_set():
    read = data.load("pathfinder", examples=20, size=16, order="permuted")
    assert read.classes == ("apart", "joined") and read.length == 256 and read.channels == 1
    assert read.splits == ("train", "validation", "test") and read.count("test") == 2
    assert "made by s4mini" in read.title and not data.official("pathfinder")


@pytest.mark.parametrize("name", data.NAMES)
def test_every_data_set_has_the_same_interface(folder, name):
    made = {"examples": 10} if name in MADE else {}
    read = data.load(name, folder=folder, **made)
    assert read.name == name and read.title and read.task in ("classify", "forecast")
    for split in read.splits:
        batch = read.batch(split, torch.tensor([0]))
        assert isinstance(batch, data.Batch) and batch.u.dtype == torch.float32
        assert batch.u.shape == (1, read.length, read.channels)
        if read.task == "classify":
            assert batch.target.dtype == torch.int64 and 0 <= batch.target < len(read.classes)
            assert len(read.labels[split]) == read.count(split)
        else:
            assert batch.target.shape == (1, read.horizon, read.channels)
        if batch.lengths is not None:
            assert batch.lengths.dtype == torch.int64 and 0 < batch.lengths <= read.length
        with pytest.raises(ValueError, match="index"):
            read.batch(split, torch.tensor([read.count(split)]))
    with pytest.raises(ValueError, match="split"):
        read.batch("dev", torch.tensor([0]))
    moved = read.to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    tensors += [t for v in vars(moved).values() if isinstance(v, dict) for t in v.values()]
    assert tensors and all(t.device.type == "meta" for t in tensors)
    assert read.mean.device.type == "cpu"


IMAGES = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
BAD_CALLS = [
    (ValueError, "name", lambda: data.load("imagenet")),
    (ValueError, "name", lambda: data.available("imagenet")),
    (ValueError, "name", lambda: data.official("imagenet")),
    (ValueError, "name", lambda: data.download("imagenet")),
    (ValueError, "size", lambda: data.load("digits", size=3)),
    (ValueError, "size", lambda: data.load("digits", size=0)),
    (TypeError, "size", lambda: data.load("digits", size=4.0)),
    (TypeError, "images", lambda: images.raster(IMAGES.float())),
    (TypeError, "images", lambda: images.raster(IMAGES.numpy())),
    (ValueError, "images", lambda: images.raster(IMAGES[0])),
    (ValueError, "images", lambda: images.raster(IMAGES[:, :3])),
    (ValueError, "images", lambda: images.raster(IMAGES[..., :2])),
    (ValueError, "size", lambda: images.raster(IMAGES, size=3)),
    (ValueError, "split", lambda: data.load("digits").batch("valid", torch.arange(2))),
    (FileNotFoundError, "nowhere", lambda: images.read_cifar10("nowhere.bin")),
    (FileNotFoundError, "nowhere", lambda: images.read_idx("nowhere", 3)),
    (ValueError, "axes", lambda: images.read_idx("nowhere", 0)),
    (FileNotFoundError, "nowhere", lambda: speech.read_wav("nowhere.wav")),
    (FileNotFoundError, "nowhere", lambda: forecast.read_ett("nowhere.csv")),
    (ValueError, "order", lambda: data.load("digits", order="columns")),
    (ValueError, "order", lambda: images.reading_order("columns", 4)),
    (ValueError, "L", lambda: images.reading_order("permuted", 0)),
    (TypeError, "L", lambda: images.reading_order("permuted", 4.0)),
    (
        ValueError,
        "order: etth1 has no such option, only length, horizon",
        lambda: data.load("etth1", order="permuted"),
    ),
    (ValueError, "size: \\w+ has no such option", lambda: data.load("speech", size=4)),
    (ValueError, "length: \\w+ has no such option", lambda: data.load("digits", length=4)),
    (ValueError, "horizon: \\w+ has no such option", lambda: data.load("listops", horizon=4)),
    (
        ValueError,
        "univariate: \\w+ has no such option",
        lambda: data.load("digits", univariate=False),
    ),
    (ValueError, "examples: \\w+ has no such option", lambda: data.load("digits", examples=4)),
    (ValueError, "seed: \\w+ has no such option", lambda: data.load("speech", seed=4)),
    (ValueError, "workers: \\w+ has no such option", lambda: data.load("mnist", workers=4)),
    (ValueError, "horizon", lambda: data.load("etth1", horizon=0)),
    (TypeError, "horizon", lambda: data.load("etth1", horizon=None)),
    (TypeError, "univariate", lambda: data.load("etth1", univariate="OT")),
    (ValueError, "did you mean 'horizon'", lambda: data.load("etth1", horizont=4)),
    (ValueError, "did you mean 'digits'", lambda: data.load("digitz")),
    (TypeError, "gray", lambda: data.load("digits", gray="yes")),
    (ValueError, "examples", lambda: data.load("listops", examples=10**9)),
    (ValueError, "length", lambda: data.load("listops", length=10**9)),
    (
        TypeError,
        "train: expected tensors",
        lambda: data.from_tensors("x", train=(torch.zeros(1, 2, 3), 2), test=(1, 2)),
    ),
    (ValueError, "length, horizon: .* train split", lambda: data.load("etth1", length=9000)),
    (ValueError, "length, horizon: .* validation", lambda: data.load("etth2", horizon=2881)),
    (ValueError, "length", lambda: data.load("listops", length=7, examples=1)),
    (ValueError, "examples", lambda: data.load("listops", examples=0)),
    (ValueError, "seed", lambda: data.load("listops", seed=-1)),
    (ValueError, "seed", lambda: data.load("pathfinder", seed=2**32)),
    (TypeError, "workers", lambda: data.load("listops", workers=1.5)),
    (TypeError, "rng", lambda: lra.draw_listops(0)),
    (ValueError, "depth", lambda: lra.draw_listops(random.Random(0), depth=1)),
    (ValueError, "arguments", lambda: lra.draw_listops(random.Random(0), arguments=1)),
    (ValueError, "length", lambda: lra.draw_listops(random.Random(0), 4)),
    (ValueError, "at most 39", lambda: lra.draw_listops(random.Random(0), 40, 3, 2)),
    (TypeError, "rng", lambda: lra.draw_pathfinder(np.random.default_rng(0))),
    (TypeError, "axes", lambda: images.read_idx("nowhere", 3.0)),
]


@pytest.mark.parametrize("kind, word, call", BAD_CALLS)
def test_bad_calls(kind, word, call):
    with pytest.raises(kind, match=word):
        call()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine, and the folder it serves."""
    root, asked = tmp_path / "served", []
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        """Knows ranges, and can be told to break off (root/break: after so many bytes)."""

        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append((self.path, self.headers.get("Range")))
            path = root / self.path.lstrip("/")
            if not path.exists():
                return self.send_error(404)
            content, begin = path.read_bytes(), 0
            if (text := self.headers.get("Range")) and not (root / "no-ranges").exists():
                begin = int(text.removeprefix("bytes=").removesuffix("-"))
                if begin >= len(content):
                    return self.send_error(416)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            stop = root / "break"
            end = int(stop.read_text()) if stop.exists() else None
            self.wfile.write(content[begin:][:end])

    handler = functools.partial(Quiet, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_port}/", asked
        running.shutdown()


def archive(folder, names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in reversed(names):
            tar.add(folder / name, f"archive-1.0/{folder.name}/{name}")
        tar.addfile(tarfile.TarInfo("archive-1.0/README.md"))
    return buffer.getvalue()


@pytest.fixture
def published(folder, server, monkeypatch):
    """All data sets as their sites publish them, from this machine."""
    root, url, _ = server
    for name in FETCHED:
        found = data.source(name)
        paths = found.paths(folder)
        every = b"".join(data.contents(path) for path in paths.values())
        sums = {file: sha1(data.contents(path)) for file, path in paths.items()}
        digests = {"all": sha1(every)} if name == "speech" else sums
        if "{}" in found.url:
            packed = ".gz" if found.url.endswith(".gz") else ""
            for file, path in paths.items():
                content = data.contents(path)
                (root / f"{file}{packed}").write_bytes(
                    gzip.compress(content) if packed else content
                )
            change(monkeypatch, name, url=f"{url}{{}}{packed}", digests=digests)
        else:
            content = archive(folder / found.folder, list(found.files))
            (root / f"{name}.tar.gz").write_bytes(content)
            change(monkeypatch, name, url=f"{url}{name}.tar.gz", digests=digests)
    return root


FETCHED = ["cifar10", "mnist", "speech", "etth1", "etth2"]


@pytest.mark.parametrize("name", FETCHED)
def test_download_gives_what_load_reads(published, folder, tmp_path, name):
    target = tmp_path / "new" / "place"
    assert not data.available(name, target)
    assert data.download(name, target, progress=False) == target
    assert data.available(name, target)
    ours, theirs = data.load(name, folder=target), data.load(name, folder=folder)
    same(ours, theirs)
    left = {p.name for p in target.rglob("*") if p.is_file() and p.suffix != ".lock"}
    packed = {f"{f}.gz" for f in list(data.source(name).files)} if name == "mnist" else set()
    assert left == (packed or set(list(data.source(name).files))), (
        "nothing but the data set remains"
    )
    for file in published.iterdir():
        file.unlink()
    data.download(name, target, progress=False)  # there already: no request is made


LOST = [(name, 40) for name in FETCHED] + [("speech", n) for n in (1, 5, 9, 2000)]


@pytest.mark.parametrize("name, lost", LOST)
def test_what_arrives_damaged_leaves_nothing(published, tmp_path, name, lost):
    for file in published.iterdir():
        content = file.read_bytes()
        if len(content) > lost:
            file.write_bytes(content[:-lost] + (b"" if lost == 2000 else b"!" * lost))
        else:
            file.write_bytes(b"")
    target = tmp_path / "new"
    with pytest.raises(ValueError, match=r"expected checksum|broken (archive|one)") as caught:
        data.download(name, target, progress=False)
    assert re.search(r"http|\.gz", str(caught.value))
    assert not data.available(name, target)
    assert [p for p in target.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_recordings_are_compared_before_they_are_placed(published, folder, tmp_path):
    root = folder / "fsdd" / "recordings"
    damage(root / "3_ann_2.wav", "stereo")
    (published / "speech.tar.gz").write_bytes(archive(root, list(data.source("speech").files)))
    with pytest.raises(ValueError, match=r"speech\.tar\.gz: expected checksum"):
        data.download("speech", tmp_path / "new", progress=False)
    assert not list((tmp_path / "new").rglob("*.wav"))


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(published, server, folder, tmp_path, ranges):
    root, _, asked = server
    (root / "break").write_text("1000")
    if not ranges:
        (root / "no-ranges").touch()
    target = tmp_path / "new"
    with pytest.raises(OSError, match=r"broke after 1000 of \d+ bytes; the same command goes on"):
        data.download("etth1", target, progress=False)
    assert not data.available("etth1", target)
    (root / "break").unlink()
    data.download("etth1", target, progress=False)
    assert [text for _, text in asked] == [None, "bytes=1000-"]
    same(data.load("etth1", folder=target), data.load("etth1", folder=folder))
    # stopped between the last byte and the renaming: nothing is left to send
    path = target / "ETT-small" / "ETTh1.csv"
    path.rename(path.with_name(".ETTh1.csv.part"))
    if ranges:
        data.download("etth1", target, progress=False)
        assert data.available("etth1", target)


def test_an_archive_without_a_file_is_refused(published, folder, tmp_path, monkeypatch):
    content = archive(folder / "cifar-10-batches-bin", list(data.source("cifar10").files)[:-1])
    (published / "cifar10.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch\.bin"):
        data.download("cifar10", tmp_path / "new", progress=False)
    assert not data.available("cifar10", tmp_path / "new")


def test_a_missing_page_is_named(published, tmp_path):
    (published / "cifar10.tar.gz").unlink()
    with pytest.raises(OSError, match=r"http.*cifar10\.tar\.gz: the server says .*404"):
        data.download("cifar10", tmp_path / "b", progress=False)


def test_six_downloads_at_once_are_one(published, server, tmp_path):
    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(data.download, "cifar10", tmp_path / "x", False) for _ in range(6)]
        assert {d.result() for d in done} == {tmp_path / "x"}
    assert data.available("cifar10", tmp_path / "x") and len(server[2]) == 1


def test_what_a_killed_unpacking_left_is_removed(published, tmp_path):
    left = tmp_path / "n" / data.source("cifar10").folder / ".new-dead"
    left.mkdir(parents=True)
    (left / "data_batch_1.bin").write_bytes(b"half")
    data.download("cifar10", tmp_path / "n", progress=False)
    assert not left.exists() and data.available("cifar10", tmp_path / "n")


def test_archives_stay_in_their_folder(published, folder, tmp_path):
    root, names = folder / "cifar-10-batches-bin", data.source("cifar10").files
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            tar.add(root / name, f"../../{name}")
    (published / "cifar10.tar.gz").write_bytes(buffer.getvalue())
    data.download("cifar10", tmp_path / "in" / "deep", progress=False)
    placed = tmp_path / "in" / "deep" / "cifar-10-batches-bin"
    outside = [p for p in (tmp_path / "in").rglob("*.bin") if p.parent != placed]
    assert outside == [] and data.available("cifar10", tmp_path / "in" / "deep")


@pytest.mark.parametrize("name", MADE)
def test_made_data_are_kept_and_made_again_if_damaged(tmp_path, monkeypatch, name):
    monkeypatch.setenv("S4MINI_DATA", str(tmp_path))
    first = data.load(name, examples=4)
    (path,) = (tmp_path / "made").iterdir()
    content = path.read_bytes()
    monkeypatch.setattr(lra, "_make", None)  # not called again
    same(first, data.load(name, examples=4))
    monkeypatch.undo()
    monkeypatch.setenv("S4MINI_DATA", str(tmp_path))
    for damaged in (content[:-40], b"", b"PK no", content[:300] + b"x" * 60 + content[360:]):
        path.write_bytes(damaged)
        same(first, data.load(name, examples=4))
    assert list((tmp_path / "made").iterdir()) == [path]


READERS = {
    "cifar10": (lambda rng: cifar10_file(rng), images.read_cifar10),
    "images": (
        lambda rng: idx_file(rng.integers(0, 256, (5, 4, 3))),
        lambda p: images.read_idx(p, 3),
    ),
    "wav": (lambda rng: wav_file(rng.integers(-99, 99, 30)), speech.read_wav),
}


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(sorted(READERS)), packed=st.booleans(), change=st.data())
def test_mutated_files_are_read_rightly_or_refused_by_name(tmp_path_factory, kind, packed, change):
    make, read = READERS[kind]
    path = tmp_path_factory.mktemp("mutated") / ("file.gz" if packed else "file")
    content = make(np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "RECORDS", RECORDS)
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
        right = read(path)
        raw = bytearray(path.read_bytes())
        at = change.draw(st.integers(0, min(len(raw) - 1, 80)))
        how = change.draw(st.sampled_from(["flip", "cut", "extend", "repeat", "huge"]))
        if how == "flip":
            raw[at] ^= 1 << change.draw(st.integers(0, 7))
        elif how == "cut":
            del raw[change.draw(st.integers(0, len(raw) - 1)) :]
        elif how == "extend":
            raw += change.draw(st.binary(min_size=1, max_size=30))
        elif how == "repeat":
            raw = raw * 2
        else:
            raw[at : at + 4] = b"\xff" * 4
        path.write_bytes(raw)
        try:
            found = read(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # the format cannot tell a changed pixel, label or sample
            ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (found, right))
            assert [(a.dtype, a.ndim) for a in ours] == [(a.dtype, a.ndim) for a in theirs]
            assert sum(a.size for a in ours) == sum(a.size for a in theirs)


@settings(deadline=None, max_examples=12)
@given(at=st.integers(0, 200), byte=st.binary(min_size=1, max_size=1))
def test_mutated_tables_are_read_or_refused_by_name(tmp_path_factory, ett_text, at, byte):
    path = tmp_path_factory.mktemp("table") / "ETTh1.csv"
    content = ett_text.encode()
    path.write_bytes(content[:at] + byte + content[at + 1 :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "HOURS", HOURS)
        try:
            _, values = forecast.read_ett(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert values.shape == (HOURS, 7) and np.isfinite(values).all()


def test_own_tensors_are_a_data_set():
    u, y = torch.randn(6, 5, 2), torch.arange(6) % 3
    own = data.from_tensors("mine", train=(u, y, y + 1), test=(u[:2], y[:2]))
    assert (own.classes, own.length, own.channels, own.splits) == (
        ("0", "1", "2"),
        5,
        2,
        ("train", "test"),
    )
    batch = own.batch("train", torch.tensor([4, 0]))
    assert torch.equal(batch.u, u[[4, 0]]) and batch.lengths.tolist() == [2, 1]
    later = data.from_tensors("m", train=(u, u[:, :3]), test=(u, u[:, :3]))
    assert later.task == "forecast" and later.horizon == 3
    split = data.Split(own, "train", torch.tensor([5, 1]))
    assert torch.equal(split[0][0], u[5]) and len(split[0]) == 3
    loader = torch.utils.data.DataLoader(split, batch_size=2, collate_fn=data.whole)
    assert torch.equal(next(iter(loader)).target, y[[5, 1]])


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
    with pytest.raises(TypeError, match="gray: expected True or False, got int 4"):
        data.load("digits", gray=4)


def test_splits_of_ones_own_are_of_one_kind():
    u, labels = torch.randn(6, 5, 2), torch.arange(6) % 2
    values = u[:, :3]
    for train, test, word in (
        ((u, values), (u, u[:, :2]), "test: expected target"),
        ((u, values), (u, labels), "test: expected target"),
        ((u, labels), (u.double(), labels), "test: expected u"),
    ):
        with pytest.raises(ValueError, match=word):
            data.from_tensors("x", train=train, test=test)
