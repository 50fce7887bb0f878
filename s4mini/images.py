"""Images as sequences.

The file formats of CIFAR-10 and MNIST, read byte by byte, and the orders in which
pixels become a sequence.

Tangled from book/images.md.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4mini.checks import check_bool, check_choice, check_int
from s4mini.data import Batch, SequenceData, Source, contents, needs

__all__ = [
    "RECORDS",
    "read_cifar10",
    "check_labels",
    "read_idx",
    "raster",
    "ORDERS",
    "reading_order",
    "ImageData",
    "image_data",
    "CIFAR10",
    "MNIST",
    "DIGITS",
]

RECORDS = 10_000  # images in each file of CIFAR-10
_RECORD = 1 + 3 * 32 * 32  # bytes


def read_cifar10(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one binary file of CIFAR-10.

    Args:
        path: data_batch_1.bin or one of its kind.

    Returns:
        images (10000, 32, 32, 3) and labels (10000,), both uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its length is not 10000 records, or a label is above 9.

    Source: Krizhevsky 2009; book/images.md.
    """
    size = RECORDS * _RECORD
    content = np.frombuffer(contents(path, 2 * size), dtype=np.uint8)
    if content.size != size:
        raise ValueError(
            f"{path}: expected {size} bytes ({RECORDS} records of {_RECORD}), "
            f"found {content.size}; delete it and download it again"
        )
    records = content.reshape(RECORDS, _RECORD)
    labels, planes = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
    check_labels(path, labels)
    return planes.transpose(0, 2, 3, 1), labels  # colour is the last axis


def check_labels(path: str | Path, labels: np.ndarray) -> None:
    """Refuse labels that are not digits.

    Args:
        path: the file they come from, for the message.
        labels: (n,) integers.

    Raises:
        ValueError: one is above 9; says which.

    Source: book/images.md.
    """
    wrong = np.flatnonzero(labels > 9)
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"{path}: expected labels 0 to 9, found {labels[at]} at record {at}"
        )


def read_idx(path: str | Path, axes: int) -> np.ndarray:
    """Read an idx file of bytes, packed by gzip or not.

    Args:
        path: the file; one that ends in .gz is unpacked.
        axes: how many axes its content must have, 3 for images.

    Returns:
        The content, uint8, with that many axes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, longer or shorter than it says, or
            larger than 64 MB, which no file of MNIST is.

    Source: LeCun et al. 1998; book/images.md.
    """
    axes = check_int("axes", axes)
    content, start = contents(path, 2**26), 4 + 4 * axes
    if len(content) < start:
        raise ValueError(
            f"{path}: expected a header of {start} bytes, found {len(content)}"
        )
    magic, *shape = struct.unpack(f">{1 + axes}I", content[:start])
    if magic != 0x0800 + axes:
        raise ValueError(
            f"{path}: expected magic number {0x0800 + axes}, found {magic}"
        )
    size = start + math.prod(shape)
    if len(content) != size or not all(shape):
        raise ValueError(
            f"{path}: expected {size} bytes for {shape}, found {len(content)}; "
            "delete it and download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def raster(images: Tensor, gray: bool = False, size: int | None = None) -> Tensor:
    """Read images row by row.

    Args:
        images: (B, W, W, channels) pixels, uint8, square.
        gray: whether three colours become one grey level.
        size: pixels a side after averaging; must divide W. None: W.

    Returns:
        (B, size * size, channels or 1) float32, in the unit of the pixels.

    Raises:
        TypeError: images is not a uint8 tensor, or size not an integer.
        ValueError: the shape is another, or size does not divide W.

    Source: book/images.md.
    """
    _check_images(images)
    check_bool("gray", gray)
    W = images.shape[1]
    size = W if size is None else check_int("size", size)
    if W % size:
        raise ValueError(f"size: expected a divisor of {W}, got {size}")
    u = images.float()
    if gray and u.shape[-1] == 3:
        u = (u @ u.new_tensor(_GREY))[..., None]
    q = W // size  # averages squares of q x q pixels
    if q > 1:
        u = u.unflatten(2, (size, q)).unflatten(1, (size, q)).mean(dim=(2, 4))
    return u.flatten(1, 2)  # (B, size * size, channels)


def _check_images(images: Tensor) -> None:
    """Refuse what is not a batch of square uint8 images."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images: expected a uint8 tensor, got {kind}")
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != shape[2] or shape[3] not in (1, 3):
        raise ValueError(f"images: expected shape (B, W, W, 1 or 3), got {shape}")


ORDERS = ("raster", "permuted", "bitreversal")


def reading_order(order: str, L: int) -> Tensor:
    """Return which pixel is read at each step.

    Args:
        order: "raster", "permuted" or "bitreversal".
        L: how many pixels there are.

    Returns:
        (L,) int64, a permutation of 0 ... L - 1; always the same.

    Raises:
        TypeError: L is not an integer.
        ValueError: order is unknown, or L < 1.

    Source: Gu et al. 2022 (official code); book/images.md.
    """
    check_choice("order", order, ORDERS)
    L = check_int("L", L)
    if order == "permuted":
        drawn = np.random.RandomState(92916).permutation(L)
        return torch.from_numpy(drawn.astype(np.int64))
    if order == "raster":
        return torch.arange(L)
    m = (L - 1).bit_length()
    digits = (torch.arange(2**m)[:, None] >> torch.arange(m)) & 1  # (2^m, m)
    reverse = (digits << torch.arange(m).flip(0)).sum(1)
    return reverse[reverse < L]


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageData(SequenceData):
    """Labelled images that are read as sequences.

    Attributes:
        images: for each split, (n, W, W, channels) uint8.
        gray: whether colours become grey levels.
        size: pixels a side of an image when it is read.
        steps: (L,) int64, which pixel is read at each step.
        order: "raster", "permuted" or "bitreversal".

    Source: book/images.md.
    """

    images: dict[str, Tensor] = field(repr=False)
    gray: bool
    size: int
    steps: Tensor = field(repr=False)
    order: str

    def pictures(self, u: Tensor) -> Tensor:
        """Undo batch: images (B, size, size, channels) between 0 and 1."""
        if self.order != "raster":
            u = u[:, self.steps.argsort()]
        levels = (u * self.std + self.mean) / self.images["train"].max()
        return levels.unflatten(1, (self.size, self.size)).clamp(0, 1)

    def draw(self, split: str, index: Tensor) -> Batch:
        u = raster(self.images[split][index], self.gray, self.size)
        u = (u - self.mean) / self.std
        if self.order != "raster":
            u = u[:, self.steps]
        return Batch(u, self.labels[split][index])


def _moments(images: Tensor, gray: bool, size: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, float32."""
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for part in images.split(5000):
        u = raster(part, gray, size).flatten(0, 1)
        total = total + u.sum(0, dtype=torch.float64)
        squares = squares + u.square().sum(0, dtype=torch.float64)
        count += len(u)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def image_data(
    images: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    classes: tuple[str, ...],
    gray: bool = False,
    size: int | None = None,
    order: str = "raster",
) -> ImageData:
    """Make a data set of images.

    Args:
        images: for each split, (n, W, W, channels) uint8.
        labels: for each split, (n,) int64.
        classes: what the labels stand for.
        gray: whether colours become grey levels.
        size: pixels a side after averaging; None: as they are.
        order: "raster", "permuted" or "bitreversal".

    Returns:
        The data set, normalised by the training images.

    Raises:
        TypeError: an option is of a wrong kind.
        ValueError: an option is unknown, or size does not divide W.

    Source: book/images.md.
    """
    check_bool("gray", gray)
    check_choice("order", order, ORDERS)
    W = images["train"].shape[1]
    size = W if size is None else check_int("size", size)
    mean, std = _moments(images["train"], gray, size)
    return ImageData(
        classes=classes,
        length=size**2,
        mean=mean,
        std=std,
        labels=dict(labels),
        images=dict(images),
        gray=gray,
        size=size,
        steps=reading_order(order, size**2),
        order=order,
    )


_TEN = tuple("0123456789")
_THINGS = "airplane automobile bird cat deer dog frog horse ship truck"


def _four(arrays: list[np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sort train images, train labels, test images, test labels."""
    tensors = [torch.from_numpy(np.array(a, order="C")) for a in arrays]
    images, labels = tensors[0::2], [y.long() for y in tensors[1::2]]
    splits = "train", "test"
    return dict(zip(splits, images, strict=True)), dict(
        zip(splits, labels, strict=True)
    )


def _reader(
    arrays: Callable[[Mapping[str, Path]], list[np.ndarray]], classes: tuple[str, ...]
) -> Callable[..., ImageData]:
    """Return what reads a data set of images from its files."""

    def read(
        paths: Mapping[str, Path],
        gray: bool = False,
        size: int | None = None,
        order: str = "raster",
    ) -> ImageData:
        """Read the files, by name; gray, size and order as image_data explains."""
        return image_data(*_four(arrays(paths)), classes, gray, size, order)

    return read


def _cifar10(paths: Mapping[str, Path]) -> list[np.ndarray]:
    """Read the six files of CIFAR-10."""
    parts = [read_cifar10(path) for path in paths.values()]
    images, labels = zip(*parts[:5], strict=True)
    return [np.concatenate(images), np.concatenate(labels), *parts[5]]


def _mnist(paths: Mapping[str, Path]) -> list[np.ndarray]:
    """Read the four files of MNIST."""
    arrays: list[np.ndarray] = []
    for file, path in paths.items():
        arrays.append(read_idx(path, 3 if "images" in file else 1))
        if "images" in file and arrays[-1].shape[1:] != (28, 28):
            raise ValueError(
                f"{path}: expected images of 28 x 28, found {arrays[-1].shape[1:]}"
            )
        if "labels" in file:
            check_labels(path, arrays[-1])
            if len(arrays[-1]) != len(arrays[-2]):
                raise ValueError(
                    f"{path}: expected {len(arrays[-2])} labels, one for "
                    f"each image, found {len(arrays[-1])}"
                )
    return [a[..., None] if a.ndim == 3 else a for a in arrays]


def _digits(_: Mapping[str, Path]) -> list[np.ndarray]:
    """Take scikit-learn's digits; each fifth tests."""
    digits = needs("sklearn.datasets").load_digits()
    images = digits.images[..., None].astype(np.uint8)  # levels 0 to 16
    labels, test = digits.target, np.arange(len(images)) % 5 == 0
    return [images[~test], labels[~test], images[test], labels[test]]


_COPY = "not the official files: a recompressed or reordered copy"
_CIFAR10_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
_MNIST_SHA1 = {
    "train-images-idx3-ubyte": "c3557c10f29b266e19b3eeee1553c85e0ef4a8ea",
    "train-labels-idx1-ubyte": "adbf52269f5d842899f287c269e2883e40b4f6e2",
    "t10k-images-idx3-ubyte": "65e11ec1fd220343092a5070b58418b5c2644e26",
    "t10k-labels-idx1-ubyte": "a6d52cc628797e845885543326e9f10abb8a6f89",
}

CIFAR10 = Source(
    "CIFAR-10",
    _reader(_cifar10, tuple(_THINGS.split())),
    "cifar-10-batches-bin",
    tuple(_CIFAR10_SHA1),
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    _CIFAR10_SHA1,
    _COPY,
)
MNIST = Source(
    "MNIST",
    _reader(_mnist, _TEN),
    "mnist",
    tuple(_MNIST_SHA1),
    "https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz",
    _MNIST_SHA1,
    _COPY,
)
DIGITS = Source("handwritten digits (scikit-learn)", _reader(_digits, _TEN))
