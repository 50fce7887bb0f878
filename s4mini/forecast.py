"""Hours to come.

Two years of a transformer's temperature, hour by hour. What comes in the next thirty
days, and is a network of state spaces better at saying so than yesterday was?

Tangled from book/forecast.md.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4mini.baselines import Stack
from s4mini.bench import write_record
from s4mini.checks import check_bool, check_int
from s4mini.data import Batch, SequenceData, Source, contents, load
from s4mini.model import S4Config, S4Model, descend, parameter_groups

__all__ = [
    "HOURS",
    "read_ett",
    "WindowData",
    "load_ett",
    "ETTH1",
    "ETTH2",
    "last_value",
    "last_day",
    "LinearForecaster",
    "LevelForecaster",
    "make_forecaster",
    "forecast_errors",
    "train_forecaster",
    "run_forecasts",
    "record_forecasts",
]

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
    horizon: int = field()
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
    values, columns = values[:, kept], tuple(_COLUMNS)[kept]
    train = values[: 12 * _MONTH]
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1.0
    a, b, normal = (
        torch.from_numpy(x).float() for x in (mean, std, (values - mean) / std)
    )
    return WindowData(
        length=L,
        mean=a,
        std=b,
        values=normal,
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


def last_value(u: Tensor, horizon: int) -> Tensor:
    """Forecast the last value for all hours.

    Args:
        u: (B, L) the windows.
        horizon: hours to forecast.

    Returns:
        (B, horizon).

    Source: book/forecast.md.
    """
    return u[:, -1:].expand(-1, horizon)


def last_day(u: Tensor, horizon: int) -> Tensor:
    """Forecast that the last 24 hours repeat.

    Args:
        u: (B, L) the windows, L >= 24.
        horizon: hours to forecast.

    Returns:
        (B, horizon).

    Source: book/forecast.md.
    """
    return u[:, -24:].repeat(1, -(-horizon // 24))[:, :horizon]


class LinearForecaster(nn.Module):
    """Map the window, less its last value, to the hours to come.

    Args:
        window: hours of the window.
        horizon: hours to forecast.

    Source: Zeng et al. 2023, NLinear; book/forecast.md.
    """

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__()
        self.map = nn.Linear(window, horizon)

    def forward(self, u: Tensor) -> Tensor:
        """Map windows (B, L) to forecasts (B, horizon)."""
        level = u[:, -1:]
        return self.map(u - level) + level


class LevelForecaster(nn.Module):
    """Forecast how a signal moves away from its last value.

    Args:
        network: maps (B, L + horizon, 2) to (B, L + horizon, 1).
        horizon: hours to forecast.

    Source: Gu et al. 2022a, section 4.3; book/forecast.md.
    """

    def __init__(self, network: nn.Module, horizon: int) -> None:
        super().__init__()
        self.network, self.horizon = network, horizon

    def forward(self, u: Tensor) -> Tensor:
        """Map windows (B, L) to forecasts (B, horizon)."""
        level = u[:, -1:]
        values = F.pad(u - level, (0, self.horizon))
        known = F.pad(torch.ones_like(u), (0, self.horizon))
        y = self.network(torch.stack((values, known), -1))
        return y[:, -self.horizon :, 0] + level


def make_forecaster(name: str, window: int, horizon: int) -> nn.Module:
    """Make one of the models that are trained.

    Args:
        name: "s4", "lstm" or "linear".
        window: hours of the window.
        horizon: hours to forecast.

    Raises:
        ValueError: the name is unknown.

    Source: book/forecast.md.
    """
    if name == "linear":
        return LinearForecaster(window, horizon)
    if name == "lstm":
        lstm = nn.LSTM(2, 128, 2, batch_first=True, dropout=0.25)
        network = Stack(lstm, nn.Dropout(0.25), nn.Linear(128, 1))
        return LevelForecaster(network, horizon)
    if name != "s4":
        raise ValueError(f"name: expected 's4', 'lstm' or 'linear', got {name!r}")
    config = S4Config(
        d_input=2,
        d_output=1,
        d_model=128,
        n_layers=2,
        dropout=0.25,
        prenorm=True,
        pool="none",
    )
    return LevelForecaster(S4Model(config), horizon)


@torch.no_grad()
def forecast_errors(
    forecast: Callable[[Tensor], Tensor],
    data: SequenceData,
    split: str,
    every: int = 1,
    batch: int = 32,
) -> tuple[float, float]:
    """Return the mean square and the mean absolute error on a split.

    Args:
        forecast: maps windows (B, L) to (B, horizon).
        data: of one channel.
        split: "train", "validation" or "test".
        every: use each window of this many.
        batch: windows at once.

    Source: book/forecast.md.
    """
    square = absolute = count = 0.0
    for index in torch.arange(0, data.count(split), every).split(batch):
        u, target, _ = data.batch(split, index)
        error = (forecast(u[..., 0]) - target[..., 0]).double()
        square += error.square().sum().item()
        absolute += error.abs().sum().item()
        count += error.numel()
    return square / count, absolute / count


@torch.random.fork_rng()  # the caller's numbers go on where they were
def train_forecaster(
    name: str,
    data: WindowData,
    seed: int,
    steps: int = 150,
    every: int = 25,
    lr: float = 2e-3,
) -> tuple[nn.Module, dict]:
    """Train on random windows; keep the weights that validate best.

    Args:
        name: as in make_forecaster.
        data: of one channel.
        seed: of the weights, the windows and dropout.
        steps: of 50 windows each.
        every: steps between two validations.
        lr: learning rate; the state spaces have 1e-3.

    Returns:
        The model with its best weights, and a record of the run: the
        validation errors, the best, the seconds.

    Source: book/forecast.md.
    """
    torch.manual_seed(seed)
    model, start = make_forecaster(name, data.length, data.horizon), time.time()
    groups = parameter_groups(model, lr, 0.0, min(lr, 1e-3))
    optimizer = torch.optim.AdamW(groups)
    order = torch.randperm(data.count("train"))
    curve, best, kept = [], float("inf"), {}
    for step in range(1, steps + 1):
        index = order[torch.arange(50 * (step - 1), 50 * step) % len(order)]
        u, target, _ = data.batch("train", index)
        loss = F.mse_loss(model(u[..., 0]), target[..., 0])
        train = descend(model, loss, optimizer)
        if step % every == 0:
            model.eval()
            mse, _ = forecast_errors(model, data, "validation", 20)
            curve.append({"step": step, "train": train, "validation": mse})
            if mse < best:
                best = mse
                kept = {k: v.clone() for k, v in model.state_dict().items()}
            model.train()
    model.load_state_dict(kept)
    record = {
        "model": name,
        "window": data.length,
        "seed": seed,
        "curve": curve,
        "validation": best,
        "seconds": round(time.time() - start, 1),
    }
    return model.eval(), record


def _windows(name: str, length: int, horizon: int) -> WindowData:
    """Read a series in windows."""
    data = load(name, length=length, horizon=horizon)
    if not isinstance(data, WindowData):
        raise ValueError(f"name: expected a series, got {name!r}")
    return data


def run_forecasts(name: str, seeds: int = 3, steps: int = 150) -> dict:
    """Measure all forecasters on a series, 720 hours ahead.

    Args:
        name: "etth1" or "etth2".
        seeds: how many runs of each trained model with the chosen window.
        steps: of each run.

    Returns:
        Every run that was tried, the chosen window, and for each model mean
        and standard deviation of the test errors.

    Source: book/forecast.md.
    """
    horizon, windows = 720, (336, 720)
    sets = {L: _windows(name, L, horizon) for L in windows}
    runs: list[dict] = []
    summary: dict[str, dict] = {}
    for title, function in (("last value", last_value), ("last day", last_day)):
        repeat = partial(function, horizon=horizon)
        mse, mae = forecast_errors(repeat, sets[336], "test")
        summary[title] = {"mse": [mse, 0.0], "mae": [mae, 0.0]}
    for model_name in ("linear", "s4", "lstm"):
        tried = {
            L: train_forecaster(model_name, data, 0, steps) for L, data in sets.items()
        }
        chosen = min(windows, key=lambda L: tried[L][1]["validation"])
        trained = [tried.pop(chosen)]
        runs += [record | {"chosen": False} for _, record in tried.values()]
        for seed in range(1, seeds):
            trained.append(train_forecaster(model_name, sets[chosen], seed, steps))
        errors = [forecast_errors(model, sets[chosen], "test") for model, _ in trained]
        runs += [
            record | {"chosen": True, "mse": mse, "mae": mae}
            for (_, record), (mse, mae) in zip(trained, errors, strict=True)
        ]
        summary[model_name] = {
            k: [float(np.mean(v)), float(np.std(v, ddof=1)) if seeds > 1 else 0.0]
            for k, v in zip(("mse", "mae"), zip(*errors, strict=True), strict=True)
        } | {"window": chosen}
        print(model_name, summary[model_name], flush=True)
    return {"data": name, "horizon": horizon, "summary": summary, "runs": runs}


def record_forecasts(
    name: str, out: str | Path, seeds: int = 3, steps: int = 150
) -> None:
    """Run the comparison, and keep it with how it was made.

    Args:
        name: "etth1" or "etth2".
        out: the file to write, such as results/ett-h1.json.
        seeds: as in run_forecasts.
        steps: as in run_forecasts.

    Source: book/forecast.md.
    """
    call = f"forecast.record_forecasts({name!r}, {str(out)!r}, {seeds}, {steps})"
    write_record(out, call, 0, run_forecasts(name, seeds, steps))
