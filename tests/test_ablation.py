"""Beginnings of a dense state matrix, and the networks that are compared."""

import itertools
import json

import pytest
import torch

from s4mini import ablation, lra
from s4mini.data import from_tensors


def is_bright(L):
    """A data set of two classes: is the sequence above zero on average?"""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    u = 0.3 * torch.randn(400, L, 1, generator=generator) + (2.0 * labels - 1)[:, None, None]
    return from_tensors("bright", train=(u[:300], labels[:300]), test=(u[300:], labels[300:]))


@pytest.fixture(scope="module")
def bright():
    return is_bright(16)


@pytest.mark.parametrize("name", ablation.BEGINNINGS)
def test_a_beginning_is_drawn_from_its_generator_alone(name):
    first, again = (
        ablation.beginning(name, 10, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = ablation.beginning(name, 10, torch.Generator().manual_seed(4))
    assert torch.equal(first[0], other[0]) == (name == "hippo")


@pytest.mark.parametrize("make", [ablation.beginning, lambda n, k: ablation.make_start(n, k, 2)])
def test_an_unknown_beginning_names_the_choices(make):
    with pytest.raises(ValueError, match=r"name.*hippo.*gaussian.*spectrum"):
        make("hipo", 4)


def test_modes_of_a_real_spectrum_count_each_eigenvalue_once():
    A, B = ablation.beginning("spectrum", 6, torch.Generator().manual_seed(0))
    Lambda, b, V = ablation.modes(A, B)
    assert len(Lambda) == 6 and (Lambda.imag == 0).all()
    assert torch.allclose(2 * (V @ b).real, B)


@pytest.mark.parametrize("name", ablation.BEGINNINGS + ablation.STRUCTURED)
def test_every_beginning_learns_and_the_future_is_not_seen(name, bright):
    run = ablation.train_start(
        name, bright, 0, 2, images=200, held=100, batch=20, d_model=8, n_layers=1
    )
    last = run["curve"][-1]
    assert last["validation"] > 0.9
    assert (run["after"] is None) == (name in ablation.STRUCTURED)


def test_a_run_that_explodes_is_no_result(monkeypatch):
    A, B = ablation.beginning("gaussian", 32)
    unstable = A + 100 * torch.eye(32)
    monkeypatch.setattr(ablation, "beginning", lambda *_: (unstable, B))
    with pytest.raises(ValueError, match="finite"):
        ablation.train_start("gaussian", is_bright(256), 0, 1, images=40, held=20, n_layers=1)


def test_recorded_runs_are_kept_and_not_made_again(tmp_path, bright, monkeypatch):
    monkeypatch.setattr(ablation, "load", lambda *_, **__: bright)
    made = []

    def run(name, data, seed, epochs):
        made.append(name)
        return {"start": name, "seed": seed}

    monkeypatch.setattr(ablation, "train_start", run)
    out = tmp_path / "ablation.json"
    for names in (("hippo",), ("hippo", "gaussian")):
        ablation.record_starts(out, 0, names)
    assert made == ["hippo", "gaussian"]
    found = json.loads(out.read_text("utf8"))
    assert {"command", "device", "versions", "seed"} <= set(found)
    assert [r["start"] for r in found["runs"]] == made


@pytest.mark.parametrize("name", lra.READERS)
def test_a_reader_stops_in_time_and_learns(name, bright, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(lra.time, "process_time", lambda: next(clock))  # a second a step
    model, run = lra.train_reader(name, bright, 20, looks=2, held=50)
    assert run["steps"] == run["seconds"] == 20
    assert [look["step"] for look in run["curve"]] == [10, 20]
    share, error = lra.accuracy(model, bright, "test", torch.arange(100))
    assert 0.9 < share <= 1 and error == pytest.approx((share * (1 - share) / 100) ** 0.5)


def test_an_unknown_reader_or_task_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"name.*lstm"):
        lra.make_reader("gru", 1, 2)
    with pytest.raises(ValueError, match=r"task.*listops"):
        lra.record_readers(tmp_path / "x.json", "text")


def test_training_leaves_the_callers_numbers_where_they_were(bright):
    before = torch.get_rng_state()
    ablation.train_start("hippo", bright, 0, 1, images=40, held=20, n_layers=1)
    lra.train_reader("s4d", bright, 0.01, looks=1, held=20)
    assert torch.equal(torch.get_rng_state(), before)  # the same bytes, untouched
