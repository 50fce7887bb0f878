"""Figures and recorded measurements."""

import json

import matplotlib.pyplot as plt
import plotly.graph_objects as go
import pytest
import torch

import s4mini
from s4mini.figures import COLORS, packed, playable, recorded, show, take_controls, use_style


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "s4mini").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(s4mini, "__file__", str(tmp_path / "s4mini" / "__init__.py"))
    return tmp_path / "results"


def test_what_nobody_measured_is_none(results):
    assert recorded("speed") is None


def test_a_measurement_must_say_how(results):
    (results / "speed.json").write_text(json.dumps({"command": "x", "seed": 0}))
    with pytest.raises(ValueError, match="does not say its device, versions"):
        recorded("speed")


def test_a_measurement_is_returned_whole(results):
    content = {"command": "x", "device": "cpu", "versions": {}, "seed": 0, "ms": 1.5}
    (results / "speed.json").write_text(json.dumps(content))
    assert recorded("speed") == content


def test_interactive_figures_ask_no_other_host(monkeypatch):
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]))
    monkeypatch.delenv("S4MINI_BOOK_BUILD", raising=False)
    assert show(figure, "a line") is figure
    monkeypatch.setenv("S4MINI_BOOK_BUILD", "1")
    page = show(figure, 'a line "up"').data
    assert 'role="img" aria-label="a line &quot;up&quot;"' in page
    assert 'src="../_static/plotly.min.js"' in page
    assert "cdn" not in page and len(page) < 20_000
    assert list(figure.layout.colorway) == list(COLORS.values())
    assert figure.layout.xaxis.fixedrange and figure.layout.dragmode is False


def test_controls_leave_the_drawing_as_data():
    step = {"label": "</script>", "method": "restyle", "args": ["visible", [True]]}
    figure = go.Figure(
        layout={
            "sliders": [{"steps": [step], "currentvalue": {"prefix": "N = "}}],
            "updatemenus": [{"buttons": [step, step], "active": 1}],
        }
    )
    text = take_controls(figure)
    assert "</" not in text  # it stands inside a script element
    buttons, slider = json.loads(text)
    assert (buttons["kind"], slider["kind"]) == ("buttons", "slider")
    assert buttons["active"] == 1 and len(buttons["steps"]) == 2
    assert slider["prefix"] == "N = " and slider["steps"] == [step]
    assert not figure.layout.sliders and not figure.layout.updatemenus
    assert json.loads(take_controls(figure)) == []


def test_still_figures_have_no_ground():
    use_style()
    figure, axes = plt.subplots()
    assert figure.get_facecolor()[3] == 0 and axes.get_facecolor()[3] == 0
    plt.close(figure)


def test_packed_numbers_are_little_endian_floats():
    assert packed(torch.tensor([1.0, -2.0], dtype=torch.float64)) == "AACAPwAAAMA="
    X = torch.arange(6.0).view(2, 3)
    assert packed(X.T) == packed(torch.tensor([0.0, 3, 1, 4, 2, 5]))
    with pytest.raises(TypeError, match="X: expected a floating"):
        packed(X * 1j)


def test_a_playable_is_a_picture_with_data_behind_it(monkeypatch):
    monkeypatch.setenv("S4MINI_BOOK_BUILD", "1")
    page = playable("toy", {"end": "</script>"}, plt.figure(), 'A "toy" & more.').data
    assert page.count("<script") == page.count("</script") == 2  # the data do not end early
    assert 'alt="A &quot;toy&quot; &amp; more."' in page and 'src="../_static/toy.js"' in page
    assert not plt.get_fignums()
    monkeypatch.delenv("S4MINI_BOOK_BUILD")
    page = playable("toy", {"end": 1}, plt.figure(), "A toy.").data
    assert "<script" not in page and page.startswith("<img")
