"""Hours to come.

Two years of a transformer's temperature, hour by hour: how the series is read, how it
is cut into windows, and what comes next.

Tangled from book/forecast.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s4mini.checks import check_bool, check_int
from s4mini.data import Batch, SequenceData, Source, contents

__all__ = ["HOURS", "read_ett", "WindowData", "load_ett", "ETTH1", "ETTH2"]

_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
HOURS = 17_420  # rows in each file
_MONTH = 30 * 24  # hours


def read_ett(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of hourly loads and oil temperatures.

    Args:
        path: ETTh1.csv or ETTh2.csv.

    Returns:
        The times (17420,) datetime64, an hour apart, and the values
        (17420, 7) float64: HUFL, HULL, MUFL, MULL, LUFL, LULL, OT.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its columns, its number of rows or its times are others,
            or a value is not a finite number.

    Source: Zhou et al. 2021; book/forecast.md.
    """
    try:
        head, *lines = contents(path, 2**24).decode().split("\n")
        rows = [line.rstrip("\r").split(",") for line in lines[:-1]]
        times = np.array([row[0] for row in rows], dtype="datetime64[s]")
        values = np.array([row[1:] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a time and 7 numbers a line: {error}"
        ) from error
    _check_ett(path, head.strip(), times, values, lines[-1:] == [""])
    return times, values


def _check_ett(
    path: str | Path, head: str, times: np.ndarray, values: np.ndarray, whole: bool
) -> None:
    """Refuse other columns, a missing row, a gap in time, or NaN."""
    columns = ",".join(("date", *_COLUMNS))
    if head != columns:
        raise ValueError(f"{path}: expected columns {columns}, found {head!r}")
    if not whole or values.shape != (HOURS, len(_COLUMNS)):
        raise ValueError(
            f"{path}: expected {HOURS} whole rows of {len(_COLUMNS)} "
            f"numbers, found {len(values)}; delete it and download it again"
        )
    bad = np.flatnonzero(np.diff(times) != np.timedelta64(3600, "s"))
    if bad.size:
        raise ValueError(f"{path}: expected an hour after {times[bad[0]]}")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise ValueError(f"{path}: expected finite numbers, row {row} has not")


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowData(SequenceData):
    """Windows of a series of which the continuation is to be forecast.

    Attributes:
        values: (T, channels) float32, the whole series, normalised.
        starts: for each split, (n,) int64, where each window begins.
        horizon: how many steps are to be forecast.
        columns: the name of each channel.

    Source: book/forecast.md.
    """

    values: Tensor = field(repr=False)
    starts: dict[str, Tensor] = field(repr=False)
    horizon: int
    columns: tuple[str, ...]

    def index(self) -> dict[str, Tensor]:
        return self.starts

    def draw(self, split: str, index: Tensor) -> Batch:
        first = self.starts[split][index][:, None]
        steps = torch.arange(self.length + self.horizon, device=first.device)
        window = self.values[first + steps]  # (B, L + horizon, channels)
        return Batch(window[:, : self.length], window[:, self.length :])


def _window_starts(L: int, horizon: int) -> dict[str, Tensor]:
    """Return where the windows of each split begin."""
    starts, begin = {}, L  # no target before hour L
    for split, month in (("train", 12), ("validation", 16), ("test", 20)):
        end = month * _MONTH
        if end - horizon < begin:
            raise ValueError(
                f"length, horizon: expected windows that fit into the {split} "
                f"split, got {L} and {horizon} hours"
            )
        starts[split] = torch.arange(begin - L, end - horizon - L + 1)
        begin = end
    return starts


def load_ett(
    paths: Mapping[str, Path],
    length: int | None = None,
    horizon: int = 96,
    univariate: bool = True,
) -> WindowData:
    """Read a transformer's hours.

    Args:
        paths: the files, by name.
        length: hours to look back on (384).
        horizon: hours to forecast.
        univariate: the oil temperature alone, or all seven columns.

    Returns:
        The data set.

    Raises:
        TypeError: an option is of a wrong kind.
        ValueError: an option does not fit, or a file is damaged.

    Source: book/forecast.md.
    """
    L = 384 if length is None else check_int("length", length)
    check_int("horizon", horizon)
    check_bool("univariate", univariate)
    starts = _window_starts(L, horizon)
    (path,) = paths.values()
    _, values = read_ett(path)
    kept = slice(-1, None) if univariate else slice(None)
    values, columns = values[:, kept], _COLUMNS[kept]
    train = values[: 12 * _MONTH]
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1.0
    mean, std, values = (
        torch.from_numpy(x).float() for x in (mean, std, (values - mean) / std)
    )
    return WindowData(
        length=L,
        mean=mean,
        std=std,
        values=values,
        starts=starts,
        horizon=horizon,
        columns=columns,
    )


def _etth(number: int, sha1: str) -> Source:
    """Return the record of one transformer."""
    file = f"ETTh{number}.csv"
    return Source(
        f"ETTh{number}",
        load_ett,
        "ETT-small",
        (file,),
        "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{}",
        {file: sha1},
        "not the official file",
    )


ETTH1 = _etth(1, "b22844d8be77297bde809d7ca0132f50fae8590b")
ETTH2 = _etth(2, "3c8512146f103b53ca7a3948bff17d4f5699ed8e")
