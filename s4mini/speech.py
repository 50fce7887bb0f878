"""Spoken digits.

Sound as it is, 8000 numbers a second, without a spectrogram: how recordings are read,
and what S4 makes of them.

Tangled from book/speech.md.
"""

import struct
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4mini.checks import check_int
from s4mini.data import Batch, SequenceData, Source, contents

__all__ = ["read_wav", "SoundData", "SPEAKERS", "load_speech", "SPEECH"]


def read_wav(path: str | Path) -> np.ndarray:
    """Read a recording of one channel, 16 bits, 8000 samples a second.

    Args:
        path: the file, at most 16 MB.

    Returns:
        (n,) int16, the samples, at least one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a recording, or of another length than its
            header says.

    Source: Jackson et al. 2018; book/speech.md.
    """
    content = contents(path, 2**24)
    says = struct.unpack("<I", content[4:8].ljust(4, b"\0"))[0] + 8
    if says != len(content):
        raise ValueError(
            f"{path}: expected a WAV file of {says} bytes of sound and "
            f"header, found {len(content)}; delete it and download it again"
        )
    try:
        with wave.open(BytesIO(content)) as file:
            kind, n = file.getparams()[:3], file.getnframes()
            samples = file.readframes(n)
    except (wave.Error, EOFError, RuntimeError, struct.error) as error:
        raise ValueError(
            f"{path}: expected a WAV file, found a broken one: {error}"
        ) from error
    if kind != (1, 2, 8000):
        raise ValueError(
            f"{path}: expected 1 channel of 2 bytes at 8000 Hz, "
            f"found {kind[0]} of {kind[1]} at {kind[2]}"
        )
    if not n or len(samples) != 2 * n:
        raise ValueError(
            f"{path}: expected {2 * n or 2} bytes of sound, "
            f"found {len(samples)}; delete it and download it again"
        )
    return np.frombuffer(samples, "<i2")


@dataclass(frozen=True, eq=False, kw_only=True)
class SoundData(SequenceData):
    """Labelled recordings of different lengths.

    Attributes:
        samples: for each split, all its recordings end to end, int16.
        starts: for each split, (n,) int64, where each begins.
        lengths: for each split, (n,) int64, how long each is when read.

    Source: book/speech.md.
    """

    samples: dict[str, Tensor] = field(repr=False)
    starts: dict[str, Tensor] = field(repr=False)
    lengths: dict[str, Tensor] = field(repr=False)

    def draw(self, split: str, index: Tensor) -> Batch:
        samples, n = self.samples[split], self.lengths[split][index]
        at = torch.arange(self.length, device=samples.device)
        inside = at < n[:, None]  # (B, L)
        at = self.starts[split][index][:, None] + at
        u = samples[at.clamp(max=len(samples) - 1)].float()
        u = (u - self.mean) / self.std * inside
        return Batch(u[..., None], self.labels[split][index], n)


SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
_RECORDINGS = tuple(
    f"{digit}_{speaker}_{k}.wav"
    for digit in range(10)
    for speaker in SPEAKERS
    for k in range(50)
)


def load_speech(paths: Mapping[str, Path], length: int | None = None) -> SoundData:
    """Read the spoken digits.

    Args:
        paths: the files, by name.
        length: cut to so many samples (8000, a second).

    Returns:
        The data set.

    Raises:
        TypeError: an option is of a wrong kind.
        ValueError: an option does not fit, or a file is damaged.

    Source: book/speech.md.
    """
    L = 8000 if length is None else check_int("length", length)
    samples, starts, lengths, labels = {}, {}, {}, {}
    for split, test in (("train", False), ("test", True)):
        files = [f for f in paths if (int(f[:-4].split("_")[2]) < 5) == test]
        sounds = [read_wav(paths[f]) for f in files]
        sizes = torch.tensor([len(s) for s in sounds])
        samples[split] = torch.from_numpy(np.concatenate(sounds))
        starts[split] = sizes.cumsum(0) - sizes
        lengths[split] = sizes.clamp(max=L)
        labels[split] = torch.tensor([int(f[0]) for f in files])
    std, mean = torch.std_mean(samples["train"].double(), correction=0)
    std = torch.where(std > 0, std, 1.0)
    return SoundData(
        classes=tuple("0123456789"),
        length=L,
        mean=mean[None].float(),
        std=std[None].float(),
        labels=labels,
        samples=samples,
        starts=starts,
        lengths=lengths,
    )


SPEECH = Source(
    "Free Spoken Digit Dataset",
    load_speech,
    "fsdd/recordings",
    _RECORDINGS,
    "https://github.com/Jakobovski/free-spoken-digit-dataset"
    "/archive/refs/tags/v1.0.10.tar.gz",
    {"all": "575d10204aa6565da0ad51913285d00b9aca4db4"},
    "not the recordings that the book was made with",
)
