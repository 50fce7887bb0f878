"""Spoken digits: another rate, the listeners, and runs that go on where they ended."""

from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch

from s4mini import speech
from s4mini.data import data_dir
from s4mini.figures import recorded
from s4mini.speech import (
    LISTENERS,
    SoundData,
    half_rate,
    make_listener,
    read_wav,
    resampled,
    train_listener,
)

HZ = 2000


def words(n=90, seed=0):
    """Ten words, each a tone of its own in noise, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    lengths = torch.randint(200, 300, (n,), generator=generator)
    t = torch.arange(300) / HZ
    sounds = [
        3000 * torch.sin(2 * torch.pi * (20 + 15 * k) * t[:m])
        + 300 * torch.randn(int(m), generator=generator)
        for k, m in zip(labels, lengths, strict=True)
    ]
    parts = {
        "samples": torch.cat(sounds).to(torch.int16),
        "starts": lengths.cumsum(0) - lengths,
        "lengths": lengths,
        "labels": labels,
    }
    both = {k: {"train": v, "test": v} for k, v in parts.items()}
    return SoundData(
        classes=tuple("0123456789"),
        length=300,
        mean=torch.zeros(1),
        std=torch.full((1,), 2000.0),
        **both,
    )


def small():
    return speech.SpeechNet(8, d_front=4, d_model=8, n_layers=1, dropout=0.1)


@pytest.mark.parametrize("name", LISTENERS)
def test_listeners_answer_words_of_any_length(name):
    model = make_listener(name, HZ).eval()
    for m in (1, 30, 600):
        with torch.no_grad():
            logits = model(torch.randn(2, m, 1), torch.tensor([m, 1]))
        assert logits.shape == (2, 10) and logits.isfinite().all()


def test_an_unknown_listener_or_rate_is_named():
    with pytest.raises(ValueError, match=r"name: expected .*'waveform'.*'gru'"):
        make_listener("gru")
    with pytest.raises(ValueError, match=r"rate: expected .*4.*got 3"):
        small()(torch.randn(1, 64, 1), torch.tensor([64]), 3)


def test_down_and_up_again_gives_a_slow_tone_back():
    t = torch.arange(1200) / HZ
    tone = (8000 * torch.sin(2 * torch.pi * 50 * t)).to(torch.int16)
    data = replace(
        words(),
        samples={"train": tone},
        labels={"train": torch.tensor([0])},
        starts={"train": torch.tensor([0])},
        lengths={"train": torch.tensor([1200])},
        length=1200,
    )
    there = resampled(data, 1, 2)
    back = resampled(there, 2, 1)
    assert there.length == 600 and back.length == 1200
    index, middle = torch.tensor([0]), slice(100, 1100)
    u, v = (d.batch("train", index).u[0, middle, 0] for d in (data, back))
    assert (u - v).abs().max() < 0.01 * u.abs().max()


def test_a_recording_is_resampled_by_itself():
    data, half = words(), resampled(words(), 1, 2)
    assert torch.equal(half.lengths["test"], (data.lengths["test"] + 1) // 2)
    loud = data.samples["test"].clone()
    loud[data.starts["test"][1] :] = 0  # all but the first recording
    alone = resampled(replace(data, samples={"train": loud, "test": loud}), 1, 2)
    m = int(half.lengths["test"][0])
    assert torch.equal(alone.samples["test"][:m], half.samples["test"][:m])
    assert not alone.samples["test"][m:].any()


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    data, results = words(), []
    for interrupted in (False, True):
        torch.manual_seed(1)
        model, keep = small(), tmp_path / f"{interrupted}.pt"
        if interrupted:
            whole, calls = speech._epoch, []

            def once(*args, whole=whole, calls=calls):
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return whole(*args)

            monkeypatch.setattr(speech, "_epoch", once)
            with pytest.raises(KeyboardInterrupt):
                train_listener(model, data, 3, keep=keep)
            monkeypatch.setattr(speech, "_epoch", whole)
            torch.manual_seed(99)
            model = small()
        results.append((train_listener(model, data, 3, keep=keep), model.state_dict()))
    (a, weights), (b, others) = results
    assert len(a["curve"]) == len(b["curve"]) == 3
    for one, other in zip(a["curve"], b["curve"], strict=True):
        assert one["train"] == pytest.approx(other["train"], rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4)


def test_tones_are_learned_and_heard_at_half_the_rate():
    torch.manual_seed(0)
    data = words(450)
    model = speech.SpeechNet(8, d_front=16, d_model=16, n_layers=1, dropout=0.0)
    run = train_listener(model, data, 6)
    found = half_rate(model, data, resampled(data, 1, 2))
    assert run["validation"] > 0.8 and found["full"] > 0.8
    assert set(found) == {"full", "untold", "rate", "interpolated"}
    assert found["rate"] > found["full"] - 0.15 > found["untold"]


def test_the_cepstrum_of_a_louder_sound_differs_in_its_first_coefficient():
    u = np.random.default_rng(0).normal(size=2000)
    one, ten = speech.cepstrum(u), speech.cepstrum(10 * u)
    change = (ten - one)[2:-2]
    assert np.ptp(change[:, 0]) < 1e-2  # log 100, times the square root of 26 bands
    assert abs(change[:, 0].mean() - np.log(100) * np.sqrt(26)) < 1e-2
    assert abs(change[:, 1:]).max() < 1e-2


def test_the_word_of_the_front_page_is_a_recording_of_the_data_set():
    path = data_dir() / "fsdd" / "recordings" / "0_theo_0.wav"
    if not path.exists():
        pytest.skip("the recordings are not here: `make data` fetches them")
    u = scipy.signal.resample_poly(read_wav(path).astype(float), 1, 4)
    word = recorded("spoken")
    assert word["hz"] == 8000 / 4
    assert np.abs(u / np.abs(u).max() - word["samples"]).max() < 5.1e-4  # three decimals
