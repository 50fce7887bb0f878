"""Training: recipes, order, schedule, resuming, files, the command line."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini import train
from s4mini.data import load
from s4mini.model import parameter_groups
from s4mini.train import RECIPES, Recipe

TINY = Recipe(
    "digits", size=4, d_model=8, n_layers=1, d_state=4, epochs=3, epoch_size=100, warmup=0.2
)


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
    for one, other in zip(whole.history, ended.history, strict=True):
        assert all(one[k] == pytest.approx(other[k], abs=1e-6) for k in one if k != "seconds")
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


def test_files_are_plain_and_complete(whole):
    checkpoint = torch.load(whole.folder / "last.ckpt", weights_only=True)
    assert checkpoint["recipe"] == asdict(TINY) and checkpoint["history"] == whole.history
    model, recipe = train.load_weights(whole.folder / "best.safetensors")
    assert recipe == TINY and not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])
    result = json.loads((whole.folder / "result.json").read_text())
    assert result["test_accuracy"] == whole.test_accuracy
    assert {"command", "device", "versions", "seed", "recipe", "data", "history"} <= set(result)
    assert not list(whole.folder.rglob("*.part"))


def test_optimiser_follows_schedule_and_groups(digits):
    module = train.SequenceClassifier(TINY, digits)
    made = module.configure_optimizers()
    groups = parameter_groups(module.model, TINY.lr, TINY.weight_decay, TINY.ssm_lr)
    first = train.schedule(0, 1, 6)
    for ours, theirs in zip(made["optimizer"].param_groups, groups, strict=True):
        assert ours["initial_lr"] == theirs["lr"] and ours["weight_decay"] == theirs["weight_decay"]
        assert ours["lr"] == pytest.approx(first * theirs["lr"])
    assert made["lr_scheduler"]["interval"] == "step"


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


def test_predict_restores_the_mode(digits, whole):
    model = train.build(TINY, 1, 10).train()
    guesses = train.predict(model, digits, "test", batch_size=7)
    assert model.training and guesses.shape == digits.labels["test"].shape
    assert torch.equal(guesses, train.predict(model, digits, "test", batch_size=1000))


def test_every_named_recipe_builds():
    for name, recipe in RECIPES.items():
        model = train.build(recipe, 3 if recipe.data == "cifar10" else 1, 10)
        assert sum(p.numel() for p in model.parameters()) > 1000, name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_override_reads_back_every_field(recipe):
    changes = {f.name: str(getattr(recipe, f.name)) for f in fields(Recipe)}
    assert train.override(TINY, changes) == recipe


def test_a_loss_that_is_no_number_stops_the_run(digits, tmp_path, monkeypatch):
    def broken(logits, target):
        return logits.sum() * math.nan

    monkeypatch.setattr(train, "cross_entropy", broken)
    with pytest.raises(FloatingPointError, match=r"nan at step 0, batch 0 of epoch 0, rate"):
        train.fit(TINY, tmp_path, digits, progress="none")


def test_lines_tell_each_epoch(digits, tmp_path, capsys):
    train.fit(replace(TINY, epochs=1), tmp_path, digits, progress="lines")
    seen = capsys.readouterr()
    assert "epoch   1 of 1: loss" in seen.out and seen.err == ""


def test_nothing_is_overwritten_or_mixed(digits, whole, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run"):
        train.fit(TINY, whole.folder, digits)
    with pytest.raises(ValueError, match=r"lr = 0\.01, not 0\.02"):
        train.fit(replace(TINY, lr=0.02), whole.folder, digits, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train.fit(TINY, tmp_path, digits, resume=True)
    content = (whole.folder / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        train.fit(TINY, tmp_path, digits, resume=True)


def test_damaged_weights_are_refused(whole, tmp_path):
    content = (whole.folder / "best.safetensors").read_bytes()
    for name, part in [("short", content[:-10]), ("empty", b""), ("other", b"weights")]:
        (tmp_path / name).write_bytes(part)
        with pytest.raises(ValueError, match="expected weights with their recipe"):
            train.load_weights(tmp_path / name)


def test_the_command_line(tmp_path, capsys):
    tiny = [f"--set={k}={v}" for k, v in asdict(TINY).items() if k != "seed"]
    command = ["digits", *tiny, "--epochs", "2", "--seed=3", "--out", str(tmp_path), "--lines"]
    assert train.main([*command, "--until=1"]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert train.main([*command, "--resume"]) == 0
    assert "test " in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["recipe"]["seed"] == 3
    assert train.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonesuch"], "'digits', 'smnist-small', 'scifar-live', 'scifar'"),
        (["digits", "--set", "lr"], "NAME=VALUE"),
        (["digits", "--set", "lr=fast"], "lr: expected a number, got 'fast'"),
        (["digits", "--set", "speed=1"], "setting: expected one of 'data'"),
        (["digits", "--epochs", "none"], "epochs: expected an integer"),
        (["digits", "--epochs", "0"], "epochs: expected an integer >= 1"),
        (["digits", "--set", "bidirectional=perhaps"], "true or false"),
    ],
)
def test_the_command_line_names_mistakes(arguments, message, capsys):
    assert train.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_running_the_module_shows_help():
    done = subprocess.run(
        [sys.executable, "-m", "s4mini.train", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0 and "name of a recipe" in done.stdout
    assert done.stderr == ""


MODEL = train.build(TINY, 1, 10)
BAD_CALLS = [
    (ValueError, "data", lambda: Recipe("imagenet")),
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
    (ValueError, "lr", lambda: train.override(TINY, {"lr": "-1"})),
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
    (TypeError, "recipe", lambda: train.build("digits", 1, 10)),
    (ValueError, "channels", lambda: train.build(TINY, 0, 10)),
    (TypeError, "recipe", lambda: train.fit("digits", "out")),
    (ValueError, "progress", lambda: train.fit(TINY, "out", progress="loud")),
    (ValueError, "until", lambda: train.fit(TINY, "out", until=0)),
    (ValueError, "split", lambda: train.predict(MODEL, None, "valid")),
    (TypeError, "Recipe", lambda: train.save_weights(MODEL, "digits", "w")),
    (FileNotFoundError, "nowhere", lambda: train.load_weights("nowhere")),
]


@pytest.mark.parametrize("kind, word, call", BAD_CALLS)
def test_bad_calls(kind, word, call):
    with pytest.raises(kind, match=word):
        call()


def test_data_of_another_recipe_are_refused(tmp_path):
    data = load("digits")
    with pytest.raises(ValueError, match=r"data: expected .*cifar10.*got .*digits"):
        train.fit(RECIPES["scifar"], tmp_path / "run", data)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="data: expected a SequenceData, got str"):
        train.fit(RECIPES["digits"], tmp_path / "run", "digits")


def test_weights_are_saved_with_their_own_recipe_only(tmp_path):
    model = train.build(replace(RECIPES["digits"], d_model=4), 1, 10)
    with pytest.raises(ValueError, match="recipe: expected the one"):
        train.save_weights(model, RECIPES["digits"], tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
