"""Training: recipes, order, schedule, resuming, files, the command line."""

import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from s4mini import cli, recipes, train
from s4mini.data import load
from s4mini.forecast import WindowData
from s4mini.images import ImageData, reading_order
from s4mini.model import S4Model, parameter_groups
from s4mini.recipes import RECIPES, Recipe
from s4mini.speech import SoundData

TINY = Recipe(
    "digits", size=4, d_model=8, n_layers=1, d_state=4, epochs=3, epoch_size=100, warmup=0.2
)
SPLITS = ("train", "test")
CLOCKS = ("seconds", "examples_per_second")  # what a clock measures differs between runs


def same_history(one, other, tolerance=1e-6):
    """Compare two histories, but for what a clock measures."""
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        assert all(a[k] == pytest.approx(b[k], abs=tolerance) for k in a if k not in CLOCKS)


def as_options(recipe):
    """Write a recipe as options of the command line."""
    options = []
    for name, value in asdict(recipe).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        elif name != "data":
            options += [f"--{option}", str(value)]
    return options


@pytest.fixture(scope="module")
def digits():
    return load("digits", size=4)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return train.fit(TINY, out, digits, progress="none")


def test_resuming_gives_the_uninterrupted_run(digits, whole, tmp_path):
    stopped = train.fit(TINY, tmp_path, digits, until=1, progress="none")
    assert stopped.test_accuracy is None and len(stopped.history) == 1
    train.fit(TINY, tmp_path, digits, until=2, resume=True, progress="none")
    ended = train.fit(TINY, tmp_path, digits, resume=True, progress="none")
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(ended.model.state_dict()[name], weight, rtol=0, atol=1e-6)
    same_history(whole.history, ended.history)
    assert ended.test_accuracy == whole.test_accuracy
    seconds = [row["seconds"] for row in ended.history]
    assert seconds == sorted(seconds)
    again = train.fit(TINY, tmp_path, digits, resume=True, progress="none")  # nothing left to do
    assert again.history == ended.history and again.test_accuracy == ended.test_accuracy
    logs = {p.parent.name for p in tmp_path.rglob("metrics.csv")}
    assert logs == {"from-epoch-0", "from-epoch-1", "from-epoch-2"}


def test_the_same_seed_gives_the_same_run_and_another_does_not(digits, whole, tmp_path):
    torch.manual_seed(123)  # what came before does not matter
    same = train.fit(TINY, tmp_path / "a", digits, progress="none")
    other = train.fit(replace(TINY, seed=1), tmp_path / "b", digits, progress="none")
    weight = whole.model.encoder.weight
    torch.testing.assert_close(same.model.encoder.weight, weight, rtol=0, atol=1e-6)
    assert (other.model.encoder.weight - weight).abs().max() > 1e-3


def test_the_best_epoch_on_validation_is_kept(whole, digits):
    accuracies = [row["validation_accuracy"] for row in whole.history]
    assert whole.validation_accuracy == max(accuracies)
    _, held_out = train.split_indices(len(digits.labels["train"]))
    guesses = train.predict(whole.model, digits, "train")[held_out]
    right = (guesses == digits.labels["train"][held_out]).float().mean().item()
    assert right == pytest.approx(max(accuracies), abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 40), size=st.integers(1, 60), epochs=st.integers(1, 8), seed=st.integers(0, 9)
)
def test_epochs_are_stretches_of_whole_passes(n, size, epochs, seed):
    stream = torch.cat([train.epoch_order(n, e, size, seed) for e in range(epochs)])
    assert len(stream) == epochs * size
    for piece in stream.split(n):
        assert len(piece.unique()) == len(piece), "no example twice in a pass"


@given(n=st.integers(10, 2000), share=st.floats(0.1, 0.9))
def test_the_split_is_a_partition(n, share):
    kept, held = train.split_indices(n, share)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(n))
    assert len(held) == round(n * share)


@given(warmup=st.integers(0, 50), rest=st.integers(1, 200))
def test_schedule_rises_then_falls(warmup, rest):
    factors = [train.schedule(t, warmup, warmup + rest) for t in range(warmup + rest + 3)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[warmup] == 1 and factors[-1] == pytest.approx(0, abs=1e-12)
    held = [train.schedule(t, warmup, warmup + rest, "constant") for t in range(warmup + rest)]
    assert held == factors[:warmup] + [1.0] * rest


def test_predict_restores_the_mode(digits, whole):
    model = recipes.build(TINY, 1, 10).train()
    guesses = train.predict(model, digits, "test", batch_size=7)
    assert model.training and guesses.shape == digits.labels["test"].shape
    assert torch.equal(guesses, train.predict(model, digits, "test", batch_size=1000))


def images(name, gray=False, size=None, order="raster", side=8):
    """Make a few images of noise in place of real ones."""
    draw = Generator().manual_seed(0)
    channels, size = 3 if name == "cifar10" else 1, size or side
    shown = {s: torch.randint(256, (40, side, side, channels), generator=draw) for s in SPLITS}
    return ImageData(
        name=name, title="noise", classes=tuple("0123456789"), length=size**2,
        mean=torch.full((1 if gray else channels,), 128.0), std=torch.full((1,), 74.0),
        labels={s: torch.arange(40) % 10 for s in SPLITS},
        images={s: v.byte() for s, v in shown.items()},
        gray=gray, size=size, steps=reading_order(order, size**2), order=order,
    )  # fmt: skip


def sounds():
    """Make a few noises of different lengths in place of recordings."""
    draw, lengths = Generator().manual_seed(0), torch.arange(20, 60)
    samples = torch.randint(-1000, 1000, (int(lengths.sum()),), generator=draw).short()
    return SoundData(
        name="speech", title="noise", classes=tuple("0123456789"), length=60,
        mean=torch.zeros(1), std=torch.full((1,), 500.0),
        labels={s: torch.arange(40) % 10 for s in SPLITS},
        samples=dict.fromkeys(SPLITS, samples), lengths=dict.fromkeys(SPLITS, lengths),
        starts=dict.fromkeys(SPLITS, lengths.cumsum(0) - lengths),
    )  # fmt: skip


def hours(name, length, horizon):
    """Make a short sine in place of a transformer's temperature."""
    values = torch.sin(torch.arange(200.0) / 4)[:, None]
    starts = {s: torch.arange(40) + 40 * i for i, s in enumerate(("train", "validation", "test"))}
    return WindowData(
        name=name, title="a sine", classes=(), length=length, mean=torch.zeros(1),
        std=torch.ones(1), labels={}, values=values, starts=starts, horizon=horizon,
        columns=("OT",),
    )  # fmt: skip


def stand_in(name, **options):
    """Take the place of load, with data that need no files."""
    if name in ("cifar10", "mnist"):
        return images(name, **options)
    if name == "speech":
        return sounds()
    if name.startswith("ett"):
        return hours(name, options["length"], options["horizon"])
    return load(name, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_end_to_end(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "load", stand_in)
    recipe = RECIPES[name]
    small = {"d-model": 4, "n-layers": 1, "d-state": 4, "epochs": 2, "epoch-size": 8}
    small |= {"batch-size": 4, "validation": 0.2, "out": tmp_path, "progress": "none"}
    if recipe.size:
        small["size"] = 4
    if recipe.length:
        small |= {"length": 12, "horizon": 5}
    if recipe.data in ("listops", "pathfinder"):
        small["examples"] = 12
    if recipe.data == "listops":
        small["length"] = 40
    assert cli.main(["fit", name, *(f"--{k}={v}" for k, v in small.items())]) == 0
    assert "test " in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    names = {"mse", "mae"} if name.startswith("ett") else {"loss", "accuracy"}
    assert set(result["test"]) == set(result["validation"]) == names
    assert all(math.isfinite(v) and v >= 0 for v in result["test"].values())
    assert cli.main(["evaluate", str(tmp_path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {k: again[k] for k in names} == pytest.approx(result["test"])


def test_forecasts_are_chosen_by_their_error_and_learn_a_sine(tmp_path):
    recipe = Recipe(
        "etth1", length=30, horizon=5, n_layers=1, d_model=16, d_state=8, dropout=0.0,
        epochs=8, epoch_size=80, batch_size=10, dt_min=0.02, dt_max=0.5,
    )  # fmt: skip
    result = train.fit(recipe, tmp_path, hours("etth1", 30, 5), progress="none")
    errors = [row["validation_mse"] for row in result.history]
    assert result.validation["mse"] == min(errors)
    assert result.test["mse"] < 0.25, "half the variance of a sine is 0.25"
    assert result.guesses.shape == (40, 5, 1) and result.test_accuracy is None
    truth = hours("etth1", 30, 5).batch("test", torch.arange(40)).target
    difference = result.guesses - truth
    assert result.test["mse"] == pytest.approx(difference.square().mean().item(), abs=1e-6)
    assert result.test["mae"] == pytest.approx(difference.abs().mean().item(), abs=1e-6)


def test_lines_tell_each_epoch(digits, tmp_path, capsys):
    train.fit(replace(TINY, epochs=1), tmp_path, digits, progress="lines")
    seen = capsys.readouterr()
    assert "epoch   1 of 1: train loss" in seen.out and seen.err == ""
    assert "examples/s, 0 s left" in seen.out


def start(*arguments):
    """Start the program in a process of its own."""
    command = [sys.executable, "-m", "s4mini.cli", *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def test_a_killed_run_resumes_and_ends_like_one_left_alone(digits, tmp_path):
    recipe = replace(TINY, epochs=2, epoch_size=1200)
    options = [*as_options(recipe), "--out", tmp_path / "killed", "--progress=lines"]
    process = start("fit", "digits", *options)
    try:
        assert process.stdout.readline().startswith("epoch   1 of 2")
        time.sleep(0.05)  # into the second epoch
    finally:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    kept = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert len(kept["history"]) == 1 and not (tmp_path / "killed" / "result.json").exists()
    resumed = train.fit(recipe, tmp_path / "killed", resume=True, progress="none")
    alone = train.fit(recipe, tmp_path / "alone", digits, progress="none")
    same_history(alone.history, resumed.history)
    assert resumed.test == pytest.approx(alone.test, abs=1e-6)


def test_two_processes_give_the_loss_of_one(digits, tmp_path):
    # 101 = 2 batches of 50 and one of 1, for which the second process has nothing left
    recipe = replace(TINY, dropout=0.0, epochs=2, epoch_size=101)
    options = [*as_options(recipe), "--out", tmp_path / "two", "--progress=none"]
    process = start("fit", "digits", *options, "--devices=2", "--strategy=ddp")
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert errors == "" and output.count("test ") == 1, "one process speaks"
    one = train.fit(recipe, tmp_path / "one", digits, progress="none")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    same_history(one.history, two["history"], tolerance=1e-5)
    assert two["test"] == pytest.approx(one.test, abs=1e-5)
    weights = train.load_run(tmp_path / "two")[0].state_dict()
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


def test_a_full_disk_leaves_the_previous_checkpoint(digits, tmp_path):
    train.fit(TINY, tmp_path, digits, until=1, progress="none")
    kept = (tmp_path / "last.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))  # files may not grow longer
    try:
        with pytest.raises(OSError, match="File too large"):
            train.fit(TINY, tmp_path, digits, resume=True, progress="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "last.ckpt").read_bytes() == kept
    assert not list(tmp_path.rglob("*.tmp"))
    ended = train.fit(TINY, tmp_path, digits, resume=True, progress="none")
    assert len(ended.history) == TINY.epochs and ended.test is not None


def test_half_precision_trains_alike(digits, whole, tmp_path):
    half = train.fit(replace(TINY, precision="bfloat16"), tmp_path, digits, progress="none")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    for one, other in zip(whole.history, half.history, strict=True):
        assert 0 < abs(one["train_loss"] - other["train_loss"]) < 0.1


def test_shares_of_a_batch_make_the_batch():
    part = torch.arange(10, 23)
    for world in (1, 2, 3, 5, 20):
        shares = [train.share(part, rank, world) for rank in range(world)]
        assert sum(weight for _, weight in shares) == pytest.approx(world)
        assert torch.cat([s for s, w in shares if w]).sort().values.equal(part)
        assert all(len(s) for s, _ in shares)


def test_several_seeds_are_summarised(tmp_path, capsys):
    command = ["fit", "digits", *as_options(replace(TINY, epochs=1, seed=4))]
    command += ["--out", str(tmp_path), "--seeds=2", "--progress=none"]
    assert cli.main(command) == 0
    seen = capsys.readouterr().out
    assert "mean and standard deviation of 2 seeds" in seen and " ± " in seen
    summary = json.loads((tmp_path / "summary.json").read_text())
    runs = [json.loads((tmp_path / f"seed-{s}" / "result.json").read_text()) for s in (4, 5)]
    a, b = (run["test_accuracy"] for run in runs)
    assert summary["seeds"] == [4, 5] and runs[0]["seed"] == 4
    assert summary["test"]["accuracy"]["mean"] == pytest.approx((a + b) / 2)
    assert summary["test"]["accuracy"]["sd"] == pytest.approx(abs(a - b) / 2**0.5)
    assert cli.main(command) == 1  # the runs are there
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0


def test_summaries_need_runs_of_one_recipe(whole):
    with pytest.raises(ValueError, match=r"two or more .* got seeds \[0\]"):
        train.summarise([whole])
    with pytest.raises(ValueError, match="different seeds"):
        train.summarise([whole, whole])
    other = replace(whole, recipe=replace(TINY, seed=1, lr=0.5))
    with pytest.raises(ValueError, match="2 recipes"):
        train.summarise([whole, other])
    unfinished = replace(whole, recipe=replace(TINY, seed=1), test=None)
    with pytest.raises(ValueError, match="unfinished"):
        train.summarise([whole, unfinished])


def test_the_command_line(tmp_path, capsys):
    options = as_options(replace(TINY, epochs=2, seed=3))
    command = ["fit", "digits", *options, "--out", str(tmp_path), "--progress=lines"]
    assert cli.main([*command, "--until=1"]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert cli.main([*command, "--resume"]) == 0
    said = capsys.readouterr().out.splitlines()
    (tested,) = (line for line in said if line.startswith("test "))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["recipe"]["seed"] == 3
    for path in (tmp_path,):
        assert cli.main(["evaluate", str(path)]) == 0
        assert capsys.readouterr().out.splitlines()[1] == tested.removeprefix("test").strip()
    assert cli.main(["evaluate", str(tmp_path), "--split=validation", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["examples"] == 144 and measured["split"] == "validation"
    assert measured["accuracy"] == pytest.approx(result["validation"]["accuracy"])


def test_the_list(capsys):
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["RECIPE", *RECIPES]
    assert max(map(len, listed)) < 80
    assert cli.main(["list", "digits"]) == 0
    fields_listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in fields_listed] == [f.name for f in fields(Recipe)]
    assert all(len(line.split()) >= 2 for line in fields_listed)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "--help"])
    seen = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in fields(Recipe)[1:]:
        assert f"--{field.name.replace('_', '-')}" in seen


def test_a_reader_that_stops_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as head does when it has seen enough
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["list"]) == 141
        pipe.write("what is flushed at the end of the program")
    assert capsys.readouterr().err == ""


MODEL = recipes.build(TINY, 1, 10)
BAD_CALLS = [
    (ValueError, "name", lambda: train.fit(Recipe("imagenet"), "out")),
    (ValueError, "d_state", lambda: replace(TINY, d_state=5)),
    (ValueError, "norm", lambda: replace(TINY, norm="none")),
    (TypeError, "batch_size", lambda: replace(TINY, batch_size=2.5)),
    (ValueError, "epoch_size", lambda: replace(TINY, epoch_size=0)),
    (ValueError, "lr", lambda: replace(TINY, lr=0.0)),
    (ValueError, "ssm_lr", lambda: replace(TINY, ssm_lr=math.nan)),
    (ValueError, "dropout", lambda: replace(TINY, dropout=1.0)),
    (ValueError, "weight_decay", lambda: replace(TINY, weight_decay=-1.0)),
    (ValueError, "validation", lambda: replace(TINY, validation=0.0)),
    (ValueError, "seed", lambda: replace(TINY, seed=-1)),
    (ValueError, "n", lambda: train.split_indices(1)),
    (TypeError, "n", lambda: train.split_indices(10.0)),
    (ValueError, "validation", lambda: train.split_indices(10, 0.01)),
    (ValueError, "validation", lambda: train.split_indices(10, 1.0)),
    (ValueError, "n", lambda: train.epoch_order(0, 0, 1, 0)),
    (ValueError, "epoch", lambda: train.epoch_order(3, -1, 1, 0)),
    (ValueError, "size", lambda: train.epoch_order(3, 0, 0, 0)),
    (TypeError, "seed", lambda: train.epoch_order(3, 0, 1, 0.5)),
    (ValueError, "step", lambda: train.schedule(-1, 0, 1)),
    (ValueError, "total", lambda: train.schedule(0, 5, 5)),
    (TypeError, "warmup", lambda: train.schedule(0, 0.5, 5)),
    (TypeError, "recipe", lambda: recipes.build("digits", 1, 10)),
    (ValueError, "channels", lambda: recipes.build(TINY, 0, 10)),
    (TypeError, "recipe", lambda: train.fit("digits", "out")),
    (ValueError, "progress", lambda: train.fit(TINY, "out", progress="loud")),
    (ValueError, "until", lambda: train.fit(TINY, "out", until=0)),
    (ValueError, "devices", lambda: train.fit(TINY, "out", devices=0)),
    (ValueError, "nodes", lambda: train.fit(TINY, "out", nodes=0)),
    (ValueError, "strategy", lambda: train.fit(TINY, "out", strategy="fsdp")),
    (ValueError, "split", lambda: train.predict(MODEL, load("digits"), "valid")),
    (ValueError, "split", lambda: train.evaluate(MODEL, load("digits"), "valid")),
    (ValueError, "schedule", lambda: replace(TINY, schedule="plateau")),
    (ValueError, "precision", lambda: replace(TINY, precision="float16")),
    (ValueError, "pool", lambda: replace(TINY, pool="none")),
    (ValueError, "measure", lambda: replace(TINY, measure="hippo")),
    (ValueError, "kind", lambda: train.schedule(0, 0, 1, kind="linear")),
    (ValueError, "order", lambda: replace(TINY, order="random")),
    (ValueError, "horizon", lambda: recipes.build(TINY, 1, 1, 0)),
    (FileNotFoundError, "nowhere", lambda: train.load_run("nowhere")),
    (TypeError, "prenorm", lambda: replace(TINY, prenorm="False")),
    (TypeError, "bidirectional", lambda: replace(TINY, bidirectional=2)),
    (TypeError, "gray", lambda: replace(TINY, gray="yes")),
    (ValueError, "dt_max", lambda: replace(TINY, dt_max=1e-9)),
    (ValueError, "seed", lambda: replace(TINY, seed=2**64)),
    (ValueError, "epoch_size", lambda: replace(TINY, epoch_size=10**10)),
    (ValueError, "d_model", lambda: replace(TINY, d_model=10**9)),
    (TypeError, "data", lambda: train.fit(TINY, "out", "digits")),
]


@pytest.mark.parametrize("kind, word, call", BAD_CALLS)
def test_bad_calls(kind, word, call):
    with pytest.raises(kind, match=word):
        call()


def test_files_are_plain_and_complete(whole):
    checkpoint = torch.load(whole.folder / "last.ckpt", weights_only=True)
    assert checkpoint["recipe"] == asdict(TINY) and checkpoint["history"] == whole.history
    model, recipe = train.load_run(whole.folder)
    assert recipe == TINY and not model.training
    for name, weight in S4Model.from_pretrained(whole.folder).state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])
    result = json.loads((whole.folder / "result.json").read_text())
    assert result["test_accuracy"] == whole.test_accuracy
    assert {"command", "device", "versions", "seed", "recipe", "data", "history"} <= set(result)
    assert not list(whole.folder.rglob("*.tmp"))


def test_lightning_calls_any_callback_and_logger(digits, tmp_path):
    stop = pl.callbacks.EarlyStopping("validation_loss", patience=0, min_delta=1e9)
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = pl.Trainer(
        max_epochs=5, accelerator="cpu", logger=logger, callbacks=[stop], log_every_n_steps=1,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    learner = train.Learner(TINY, *recipes.sizes_of(digits))
    trainer.fit(learner, train.RecipeData(TINY, digits))
    assert len(learner.history) == 2 and "validation_loss" in trainer.callback_metrics
    plain = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 16, 1), torch.arange(8)), batch_size=4
    )
    learner = train.Learner(TINY, channels=1, outputs=10)
    pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
        learner, plain, plain
    )
    assert "validation_loss" in learner.history[0]


def test_a_loss_that_is_no_number_stops_the_run(digits, tmp_path, monkeypatch):
    real, calls = train.cross_entropy, []

    def broken(logits, target):
        calls.append(len(target))
        first_epoch = len(calls) <= 3  # two batches and the held-out images
        return real(logits, target) * (1.0 if first_epoch else math.nan)

    monkeypatch.setattr(train, "cross_entropy", broken)
    with pytest.raises(FloatingPointError, match=r"step 3 in epoch 2, .*after epoch 1"):
        train.fit(TINY, tmp_path, digits, progress="none")
    monkeypatch.setattr(train, "cross_entropy", real)
    resumed = train.fit(TINY, tmp_path, digits, resume=True, progress="none")
    assert len(resumed.history) == 3 and resumed.test_accuracy > 0


def test_a_run_that_ends_in_its_first_epoch_can_be_resumed(digits, whole, tmp_path, monkeypatch):
    real, calls = train.cross_entropy, []

    def fail_later(logits, target):
        calls.append(len(target))
        if len(calls) == 2:
            raise RuntimeError("the machine was taken away")
        return real(logits, target)

    monkeypatch.setattr(train, "cross_entropy", fail_later)
    with pytest.raises(RuntimeError, match="taken away"):
        train.fit(TINY, tmp_path, digits, progress="none")
    resumed = train.fit(TINY, tmp_path, digits, resume=True, progress="none")
    same_history(whole.history, resumed.history)
    assert resumed.test == pytest.approx(whole.test, abs=1e-6)


def test_nothing_is_overwritten_or_mixed(digits, whole, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run"):
        train.fit(TINY, whole.folder, digits)
    with pytest.raises(ValueError, match=r"lr = 0\.01, as in .*recipe\.json, got 0\.02"):
        train.fit(replace(TINY, lr=0.02), whole.folder, digits, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train.fit(TINY, tmp_path, digits, resume=True)


@pytest.mark.parametrize("how", ["half", "empty", "text", "history", "nan"])
def test_damaged_checkpoints_are_one_line(digits, whole, tmp_path, how):
    content = (whole.folder / "last.ckpt").read_bytes()
    kept = torch.load(whole.folder / "last.ckpt", weights_only=True)
    if how == "history":
        kept["history"] = kept["history"][:-1]
    elif how == "nan":
        next(iter(kept["state_dict"].values())).fill_(math.nan)
    (tmp_path / "recipe.json").write_bytes((whole.folder / "recipe.json").read_bytes())
    if how in ("history", "nan"):
        torch.save(kept, tmp_path / "last.ckpt")
    else:
        parts = {"half": content[: len(content) // 2], "empty": b"", "text": b"text"}
        (tmp_path / "last.ckpt").write_bytes(parts[how])
    with pytest.raises(ValueError, match="not a whole checkpoint of this program") as caught:
        train.fit(TINY, tmp_path, digits, resume=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_all_seeds_and_can_be_resumed(tmp_path, number, code):
    options = [*as_options(replace(TINY, epochs=500)), "--out", tmp_path, "--seeds", "3"]
    process = start("fit", "digits", *options, "--progress=lines")
    assert process.stdout.readline().startswith("epoch   1 of 500")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "interrupted" in errors and "resume it" in errors and "Traceback" not in errors
    assert [p.name for p in tmp_path.iterdir()] == ["seed-0"]


def test_a_folder_has_one_writer(digits, tmp_path):
    with train.only_writer(tmp_path), pytest.raises(BlockingIOError, match=str(os.getpid())):
        train.fit(TINY, tmp_path, digits)
    train.fit(replace(TINY, epochs=1), tmp_path, digits, progress="none")


def test_own_tensors_train(tmp_path):
    u, y = torch.randn(40, 12, 2), torch.arange(40) % 2
    own = torch.utils.data.TensorDataset(u, y, torch.full((40,), 9))
    result = train.fit(TINY, tmp_path, {"train": own, "test": own}, progress="none")
    assert result.recipe.data == "own" and result.data == "own data" and result.test
    assert json.loads((tmp_path / "recipe.json").read_text())["data"] == "own"


def test_a_data_module_trains_like_its_tensors(tmp_path):
    u, y = torch.randn(40, 12, 2), torch.arange(40) % 2
    own = torch.utils.data.TensorDataset(u, y)

    class Module(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(own, 7, shuffle=True)

        val_dataloader = test_dataloader = train_dataloader

    tensors = dict.fromkeys(("train", "validation", "test"), own)
    one = train.fit(TINY, tmp_path / "one", Module(), progress="none")
    other = train.fit(TINY, tmp_path / "other", tensors, progress="none")
    same_history(one.history, other.history)
    assert one.test == pytest.approx(other.test) and one.recipe.data == "own"


def test_rates_follow_schedule_and_groups(digits, tmp_path):
    seen = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append([g["lr"] for g in trainer.optimizers[0].param_groups])

    learner = train.Learner(TINY, *recipes.sizes_of(digits))
    groups = parameter_groups(learner.model, TINY.lr, TINY.weight_decay, TINY.ssm_lr)
    with train.quietly():
        runner = pl.Trainer(
            max_epochs=TINY.epochs,
            callbacks=[Note()],
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        runner.fit(learner, train.RecipeData(TINY, digits))
    total = TINY.epochs * math.ceil(TINY.epoch_size / TINY.batch_size)
    assert len(seen) == total
    for step, rates in enumerate(seen):
        factor = train.schedule(step, int(TINY.warmup * total), total)
        assert rates == pytest.approx([factor * group["lr"] for group in groups])
    decays = [group["weight_decay"] for group in runner.optimizers[0].param_groups]
    assert decays == [group["weight_decay"] for group in groups]


def test_features_that_are_no_numbers_stop_the_run_too(digits, tmp_path):
    wild = replace(TINY, lr=1e30, warmup=0.0)
    with pytest.raises(FloatingPointError, match=r"at step \d+ in epoch 1, learning rate"):
        train.fit(wild, tmp_path, digits, progress="none")
    assert not (tmp_path / "result.json").exists()


def test_logs_hold_every_epoch(whole):
    (path,) = whole.folder.glob("log/*/metrics.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    assert losses == pytest.approx([row["validation_loss"] for row in whole.history])
    assert {"train_loss", "validation_accuracy"} <= set(rows[0])
    assert list(whole.folder.glob("tensorboard/*/events*"))


def test_data_of_another_recipe_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data: expected size = 4, got 8"):
        train.fit(TINY, tmp_path / "run", load("digits"))
    with pytest.raises(TypeError, match=r"data: expected a SequenceData, .*got str"):
        train.fit(TINY, tmp_path / "run", "digits")
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_refused(whole, tmp_path, capsys):
    shutil.copytree(whole.folder, tmp_path / "run")
    content = (whole.folder / "model.safetensors").read_bytes()
    for part in (content[:-10], b"", b"weights"):
        (tmp_path / "run" / "model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            train.load_run(tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("s4mini: ")


@pytest.mark.parametrize("name", RECIPES)
def test_options_set_every_field(name, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(recipes, "load_data", lambda *_: None)
    monkeypatch.setattr(cli, "_show", lambda _: None)
    monkeypatch.setattr(train, "fit", lambda recipe, *_, **__: seen.append(recipe))
    wanted = replace(RECIPES[name], data=TINY.data)
    assert cli.main(["fit", "digits", *as_options(wanted)]) == 0
    assert seen == [wanted]


def test_the_command_line_shows_its_use(capsys):
    assert cli.main([]) == 2 and "usage: s4mini COMMAND" in capsys.readouterr().out
    assert cli.main(["fit"]) == 1 and "usage: s4mini fit RECIPE" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "x", "--split=all"])
    assert stopped.value.code == 2 and "validation" in capsys.readouterr().err


def test_slurm_without_srun_is_one_sentence(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ValueError, match="SLURM_NTASKS is 4, but this is one process"):
        train.fit(TINY, tmp_path, digits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "digitz"], "did you mean 'digits'"),
        (["lst"], "did you mean 'list'"),
        (["fit", "digits", "--seeds", "0"], "seeds: expected an integer >= 1"),
        (["fit", "digits", "--seeds", "2", "--devices", "2"], "seeds: expected 1 with several"),
        (["fit", "digits", "--resume", "--out", "nowhere"], "nothing to resume"),
        (["evaluate", "nowhere"], "nowhere/recipe.json: not found"),
        (["data", "imagenet"], "name: expected one of 'cifar10'"),
    ],
)
def test_the_command_line_names_mistakes(arguments, message, capsys):
    assert cli.main(arguments) == 1
    seen = capsys.readouterr()
    assert message in seen.err and seen.err.startswith("s4mini: ") and seen.out == ""


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "0", "epochs: expected an integer >= 1, got 0"),
        ("--lr", "fast", "fast"),
        ("--colour", "red", "--colour"),
    ],
)
def test_options_that_cannot_be_read_are_status_2(option, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "digits", option, value])
    seen = capsys.readouterr()
    assert stopped.value.code == 2 and message in seen.err and seen.out == ""
    assert "Traceback" not in seen.err


def test_any_terminal_will_do():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "s4mini.cli", "list"]
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    closed = subprocess.run(f"{sys.executable} -m s4mini.cli list >&-", shell=True, env=env)
    assert closed.returncode == 0
    loaded = "import sys, s4mini.cli as c; c.main(['list']); print('lightning' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert found.stdout.endswith("False\n")


def test_a_finished_run_without_its_checkpoint_is_not_begun_anew(whole, digits, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "last.ckpt").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt: not found"):
        train.fit(TINY, tmp_path / "run", digits, resume=True)
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert after == before


def test_figures_that_are_no_numbers_end_a_run_of_one_step(tmp_path):
    u = torch.randn(40, 5, 2, generator=Generator().manual_seed(0))
    own = {"train": (u, torch.arange(40) % 2), "test": (u, torch.arange(40) % 2)}
    wild = Recipe("own", d_model=8, n_layers=1, d_state=4, epochs=1, dropout=0.0, lr=1e30)
    with pytest.raises(FloatingPointError):
        train.fit(wild, tmp_path / "run", data=own, progress="none")
    assert not (tmp_path / "run" / "result.json").exists()


def test_more_machines_than_there_are(digits, tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "SLURM_JOB_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for options in ({"nodes": 2}, {"devices": 9999}):
        with pytest.raises(ValueError, match=next(iter(options))):
            train.fit(TINY, tmp_path / "run", digits, **options)
    assert not (tmp_path / "run").exists()
