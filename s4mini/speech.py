"""Spoken digits.

Sound as it is, 8000 numbers a second, without a spectrogram: who names the word, and
who still does when every second number is missing?

Tangled from book/speech.md.
"""

import math
import struct
import time
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4mini.bench import write_record
from s4mini.checks import check_choice, check_int
from s4mini.data import Batch, SequenceData, Source, contents, load
from s4mini.model import S4Config, S4Model, descend, parameter_groups
from s4mini.saving import write_atomically

__all__ = [
    "read_wav",
    "SoundData",
    "SPEAKERS",
    "load_speech",
    "SPEECH",
    "resampled",
    "SpeechNet",
    "WaveClassifier",
    "ConvNet",
    "cepstrum",
    "CepstrumClassifier",
    "LISTENERS",
    "make_listener",
    "held_out",
    "answers",
    "share_right",
    "train_listener",
    "half_rate",
    "run_speech",
    "record_speech",
    "warped",
]


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
    at = 12  # the parts of the file, each with a size before it, must fill it
    while at <= len(content) - 8:
        size = struct.unpack("<I", content[at + 4 : at + 8])[0]
        at += 8 + size + size % 2
    if at != len(content):
        raise ValueError(
            f"{path}: expected a WAV file of whole parts, found sizes that add "
            f"up to {at} bytes of {len(content)}; delete it and download it again"
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


def resampled(data: SoundData, up: int, down: int) -> SoundData:
    """Return the same recordings at up/down of their sampling rate.

    Args:
        data: the recordings.
        up: how many samples there shall be
        down: for so many there are now.

    Returns:
        A data set of length data.length * up // down, normalised as data is.

    Source: Oppenheim and Schafer 2010, section 4.6; book/speech.md.
    """
    length = data.length * check_int("up", up) // check_int("down", down)
    samples, starts, lengths = {}, {}, {}
    for split, every in data.samples.items():
        ends = data.starts[split] + data.lengths[split]
        sounds = [
            scipy.signal.resample_poly(every[a:b].double().numpy(), up, down)
            for a, b in zip(data.starts[split], ends, strict=True)
        ]
        sizes = torch.tensor([len(sound) for sound in sounds])
        rounded = np.concatenate(sounds).round().clip(-(2**15), 2**15 - 1)
        samples[split] = torch.from_numpy(rounded.astype("<i2"))
        starts[split] = sizes.cumsum(0) - sizes
        lengths[split] = sizes.clamp(max=length)
    return replace(data, length=length, samples=samples, starts=starts, lengths=lengths)


class SpeechNet(nn.Module):
    """Name the word in a waveform: S4 on samples, then S4 on frames.

    Args:
        samples_a_frame: at the rate of the training data.
        d_front: channels of the one block that sees every sample.
        d_model: channels of the blocks that see frames.
        n_layers: how many of these.
        dropout: in these.

    Source: Gu et al. 2022a, section 4.3; book/speech.md.
    """

    def __init__(
        self,
        samples_a_frame: int = 32,
        d_front: int = 16,
        d_model: int = 64,
        n_layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.samples_a_frame = check_int("samples_a_frame", samples_a_frame)
        self.front = S4Model(
            S4Config(
                d_input=1,
                d_output=d_model,
                d_model=d_front,
                n_layers=1,
                dropout=0.0,
                norm="batch",
                pool="none",
            )
        )
        self.back = S4Model(
            S4Config(
                d_input=d_model,
                d_output=10,
                d_model=d_model,
                n_layers=n_layers,
                dropout=dropout,
                norm="batch",
                prenorm=True,
                dt_min=1e-2,
            )
        )

    def forward(self, u: Tensor, lengths: Tensor, rate: int = 1) -> Tensor:
        """Map waveforms (B, L, 1) to logits (B, 10).

        A frame lasts as long at every rate: rate must divide samples_a_frame.
        """
        check_choice("rate", rate, _divisors(self.samples_a_frame))
        n = self.samples_a_frame // rate
        u = self.front(F.pad(u, (0, 0, 0, -u.shape[1] % n)), lengths, rate)
        frames = u.unflatten(1, (-1, n)).mean(2)  # (B, L/n, d_model)
        return self.back(frames, (lengths // n).clamp(min=1))


def _divisors(n: int) -> tuple[int, ...]:
    """Return the divisors of n."""
    return tuple(k for k in range(1, n + 1) if n % k == 0)


class WaveClassifier(nn.Module):
    """Classify by a linear map of the waveform.

    Args:
        length: samples of a recording; a shorter one is filled up with zeros.

    Source: book/speech.md.
    """

    def __init__(self, length: int = 8000) -> None:
        super().__init__()
        self.map = nn.Linear(length, 10)

    def forward(self, u: Tensor, lengths: Tensor) -> Tensor:
        """Map waveforms (B, L, 1) to logits (B, 10)."""
        return self.map(F.pad(u[..., 0], (0, self.map.in_features - u.shape[1])))


class ConvNet(nn.Module):
    """Classify by four strided convolutions and their mean over time.

    Args:
        d_model: channels after the first.

    Source: book/speech.md.
    """

    def __init__(self, d_model: int = 64) -> None:
        super().__init__()
        layers, channels = [], 1
        for width, stride in ((32, 4), (8, 4), (8, 4), (8, 2)):
            layers += [
                nn.Conv1d(channels, d_model, width, stride, width // 2, bias=False),
                nn.BatchNorm1d(d_model),
                nn.ReLU(),
            ]
            channels = d_model
        self.layers, self.map = nn.Sequential(*layers), nn.Linear(d_model, 10)

    def forward(self, u: Tensor, lengths: Tensor) -> Tensor:
        """Map waveforms (B, L, 1) to logits (B, 10)."""
        v = self.layers(u.mT)  # (B, d_model, L/128)
        frames = (lengths // 128 + 1).clamp(max=v.shape[2])
        kept = torch.arange(v.shape[2]) < frames[:, None]
        return self.map((v * kept[:, None]).sum(2) / frames[:, None])


def cepstrum(u: np.ndarray, coefficients: int = 13, hz: int = 8000) -> np.ndarray:
    """Return mel-frequency cepstral coefficients, frame by frame.

    Args:
        u: (L,) a waveform.
        coefficients: how many of them.
        hz: samples a second.

    Returns:
        (frames, coefficients), a frame every 10 ms.

    Source: Davis and Mermelstein 1980; book/speech.md.
    """
    width, hop = hz // 40, hz // 100
    u = np.pad(u, (0, max(0, width - len(u))))
    _, _, Z = scipy.signal.stft(
        u, hz, nperseg=width, noverlap=width - hop, nfft=512, padded=True
    )
    mel = np.linspace(0, 2595 * np.log10(1 + hz / 1400), 28)
    edges = 700 * (10 ** (mel / 2595) - 1)  # Hz
    f = np.linspace(0, hz / 2, 257)
    rise = (f - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - f) / np.diff(edges)[1:, None]
    bands = np.minimum(rise, fall).clip(0) @ np.abs(Z) ** 2  # (26, frames)
    return scipy.fft.dct(np.log(bands + 1e-8), norm="ortho", axis=0)[:coefficients].T


class CepstrumClassifier(nn.Module):
    """Classify by a linear map of the cepstrum, averaged in parts of the word.

    Args:
        parts: of equal length, in which the word is divided.
        coefficients: of each frame.
        hz: samples a second.

    Source: book/speech.md.
    """

    def __init__(self, parts: int = 8, coefficients: int = 13, hz: int = 8000) -> None:
        super().__init__()
        self.parts, self.coefficients, self.hz = parts, coefficients, hz
        self.scale = nn.BatchNorm1d(parts * coefficients, affine=False)
        self.map = nn.Linear(parts * coefficients, 10)

    def forward(self, u: Tensor, lengths: Tensor) -> Tensor:
        """Map waveforms (B, L, 1) to logits (B, 10)."""
        found = [
            self.features(v[:n, 0].numpy()) for v, n in zip(u, lengths, strict=True)
        ]
        return self.map(self.scale(torch.from_numpy(np.stack(found)).float()))

    def features(self, u: np.ndarray) -> np.ndarray:
        """Map one waveform (n,) to (parts * coefficients,) numbers."""
        frames = cepstrum(u, self.coefficients, self.hz)
        at = np.linspace(0, len(frames), self.parts + 1)
        parts = [frames[int(a) : max(int(b), int(a) + 1)] for a, b in pairwise(at)]
        return np.concatenate([part.mean(0) for part in parts])


LISTENERS = ("waveform", "cepstrum", "cnn", "s4")


def make_listener(name: str, hz: int = 8000) -> nn.Module:
    """Make one of the models that are compared.

    Args:
        name: "waveform", "cepstrum", "cnn" or "s4".
        hz: samples a second of what it will hear.

    Raises:
        ValueError: the name is unknown.

    Source: book/speech.md.
    """
    check_choice("name", name, LISTENERS)
    if name == "s4":
        return SpeechNet(hz // 250)
    if name == "waveform":
        return WaveClassifier(hz)
    return ConvNet() if name == "cnn" else CepstrumClassifier(hz=hz)


def held_out(data: SoundData) -> tuple[Tensor, Tensor]:
    """Return which training recordings to train on, and which to validate on.

    Args:
        data: the spoken digits.

    Returns:
        The numbers of recordings to train on, and of those to validate on:
        the last five of each speaker and digit.

    Source: book/speech.md.
    """
    index = torch.arange(data.count("train"))
    last = index % 45 >= 40
    return index[~last], index[last]


def _batches(data: SoundData, index: Tensor, size: int) -> list[Tensor]:
    """Divide recordings, in random order, into batches of similar length."""
    batches = []
    for part in index[torch.randperm(len(index))].split(10 * size):
        order = data.lengths["train"][part].argsort()
        batches += part[order].split(size)
    return [batches[k] for k in torch.randperm(len(batches))]


@torch.no_grad()
def answers(
    model: nn.Module, data: SoundData, split: str, index: Tensor, rate: int = 1
) -> Tensor:
    """Return the logits (n, 10) of a trained model.

    Args:
        model: one of the listeners, in evaluation mode.
        data: the recordings.
        split: "train" or "test".
        index: (n,) which of them.
        rate: told to S4 where it is not 1.

    Source: book/speech.md.
    """
    told, found = {} if rate == 1 else {"rate": rate}, []
    for part in index.split(50):
        u, _, n = data.batch(split, part)
        u = u if n is None else u[:, : n.max()]
        found.append(model(u, n, **told))
    return torch.cat(found)


def share_right(
    model: nn.Module, data: SoundData, split: str, index: Tensor, rate: int = 1
) -> float:
    """Return the share of right answers.

    Args:
        model: as in answers.
        data: as in answers.
        split: as in answers.
        index: as in answers.
        rate: as in answers.

    Returns:
        A number from 0 to 1.

    Source: book/speech.md.
    """
    right = answers(model, data, split, index, rate).argmax(1)
    return (right == data.labels[split][index]).double().mean().item()


def _optimizer(model: nn.Module, lr: float, steps: int) -> tuple:
    """Return AdamW, and a rate that rises for a tenth and falls as a cosine."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, 0.01, min(lr, 1e-3)))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * k / steps)),
    )
    return optimizer, schedule


def _epoch(
    model: nn.Module, data: SoundData, index: Tensor, optimizer, schedule
) -> float:
    """Train once on all recordings of the index; return the mean loss."""
    model.train()
    losses = []
    for part in _batches(data, index, 16):
        u, target, n = data.batch("train", part)
        u = u if n is None else u[:, : n.max()]
        loss = F.cross_entropy(model(u, n), target)
        losses.append(descend(model, loss, optimizer, schedule))
    model.eval()
    return float(np.mean(losses))


def _keep(path: Path, run: dict, parts: tuple) -> None:
    """Write a run so that it can go on."""
    run = run | {
        "states": [part.state_dict() for part in parts],
        "random": torch.get_rng_state(),
    }
    file = BytesIO()
    torch.save(run, file)
    write_atomically(path, file.getvalue())


def _resume(path: Path, parts: tuple) -> dict:
    """Read what _keep has written, into a model and its optimiser."""
    run = torch.load(path)
    for part, state in zip(parts, run.pop("states"), strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(run.pop("random"))
    return run


def train_listener(
    model: nn.Module,
    data: SoundData,
    epochs: int,
    lr: float = 1e-2,
    keep: Path | None = None,
) -> dict:
    """Train a listener; leave it with the weights that validated best.

    Args:
        model: one of the listeners.
        data: the recordings.
        epochs: how often each recording is heard.
        lr: largest learning rate; the state spaces have at most 1e-3.
        keep: a file to go on from, written after each epoch.

    Returns:
        A record of the run: the curve, the best validation accuracy, the
        seconds of processor time.

    Source: book/speech.md.
    """
    train, validation = held_out(data)
    steps = epochs * math.ceil(len(train) / 16)
    parts = (model, *_optimizer(model, lr, steps))
    run: dict = {"curve": [], "best": -1.0, "kept": {}, "seconds": 0.0}
    if keep and keep.exists():
        run = _resume(keep, parts)
    for epoch in range(len(run["curve"]), epochs):
        start = time.process_time()
        loss = _epoch(model, data, train, *parts[1:])
        share = share_right(model, data, "train", validation)
        run["curve"].append({"epoch": epoch + 1, "train": loss, "validation": share})
        if share >= run["best"]:
            weights = model.state_dict().items()
            run |= {"best": share, "kept": {k: v.clone() for k, v in weights}}
        run["seconds"] += time.process_time() - start
        if keep:
            _keep(keep, run, parts)
    model.load_state_dict(run["kept"])
    model.eval()
    return {
        "epochs": epochs,
        "lr": lr,
        "curve": run["curve"],
        "validation": run["best"],
        "seconds": round(run["seconds"], 1),
    }


def half_rate(model: nn.Module, data: SoundData, half: SoundData) -> dict[str, float]:
    """Measure a trained listener on the test recordings, in four ways.

    Args:
        model: a listener.
        data: the recordings.
        half: the same at half their sampling rate.

    Returns:
        Shares of right answers: "full"; at half the rate "untold", "rate"
        for S4, and "interpolated".

    Source: book/speech.md.
    """
    test = torch.arange(data.count("test"))
    found = {
        "full": share_right(model, data, "test", test),
        "untold": share_right(model, half, "test", test),
        "interpolated": share_right(model, resampled(half, 2, 1), "test", test),
    }
    if isinstance(model, SpeechNet):
        found["rate"] = share_right(model, half, "test", test, 2)
    return found


_TRAINING = {  # epochs, and the learning rate
    "waveform": (10, 1e-3),
    "cepstrum": (12, 1e-2),
    "cnn": (12, 1e-2),
    "s4": (6, 1e-2),
}


@torch.random.fork_rng()  # the caller's numbers go on where they were
def run_speech(folder: str | Path, hz: int = 8000, seed: int = 0) -> tuple[dict, dict]:
    """Train all listeners, and measure them.

    Args:
        folder: where unfinished runs are kept; they go on from there.
        hz: samples a second, 8000 or a part of it.
        seed: of the weights, the order and dropout.

    Returns:
        Every run with its curve, and the figures of each listener; and the
        trained models.

    Source: book/speech.md.
    """
    data = resampled(cast(SoundData, load("speech")), 1, 8000 // hz)
    half, runs, summary, models = resampled(data, 1, 2), [], {}, {}
    for name, (epochs, lr) in _TRAINING.items():
        torch.manual_seed(seed)
        models[name] = make_listener(name, hz)
        keep = Path(folder, f"{name}-{lr:g}.pt")
        record = train_listener(models[name], data, epochs, lr, keep)
        runs.append({"model": name, "seed": seed} | record)
        print(name, record["validation"], record["seconds"], flush=True)
        summary[name] = half_rate(models[name], data, half) | {
            "validation": record["validation"],
            "lr": lr,
            "seconds": record["seconds"],
            "parameters": sum(p.numel() for p in models[name].parameters()),
        }
    return {
        "data": data.title,
        "hz": hz,
        "test": data.count("test"),
        "summary": summary,
        "runs": runs,
    }, models


def record_speech(
    out: str | Path, folder: str | Path, hz: int = 8000, seed: int = 0
) -> None:
    """Run the comparison; keep it, how it was made, and the weights of S4.

    Args:
        out: the file to write, such as results/speech.json; the weights go
            to a folder of the same name beside it.
        folder: as in run_speech.
        hz: as in run_speech.
        seed: as in run_speech.

    Source: book/speech.md.
    """
    found, models = run_speech(folder, hz, seed)
    beside = Path(out).with_suffix("")
    for part in ("front", "back"):
        getattr(models["s4"], part).save_pretrained(beside / part)
    call = f"speech.record_speech({str(out)!r}, 'runs/speech', {hz}, {seed})"
    write_record(out, call, seed, found)


def warped(f: float, hz: float, rate: float) -> float:
    """Return where a mode resonates at another rate.

    Args:
        f: where it does at rate 1, in Hz, below hz / 2.
        hz: samples a second at rate 1.
        rate: how many of those steps one step spans.

    Returns:
        The resonance in Hz.

    Source: Oppenheim and Schafer 2010, section 7.2.2; book/speech.md.
    """
    T = 1 / hz
    turned = math.atan(rate * math.tan(math.pi * f * T))
    return turned / (math.pi * rate * T)
