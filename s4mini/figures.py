"""How the figures are drawn.

One look for every figure of the book, interactive figures that work without a network,
and the recorded measurements that tables are built from.

Tangled from book/figures.md.
"""

import base64
import io
import json
import os
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import plotly.graph_objects as go
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from plotly.utils import PlotlyJSONEncoder
from torch import Tensor

import s4mini
from s4mini.checks import check_tensors

__all__ = [
    "COLORS",
    "use_style",
    "take_controls",
    "show",
    "packed",
    "playable",
    "result_path",
    "recorded",
]

#: Eight colours that colour-blind readers can tell apart, by name.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}


def use_style() -> None:
    """Give matplotlib the book's colours, sizes and sharp, clear output.

    Source: book/figures.md.
    """
    set_matplotlib_formats("svg")
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.facecolor": "none",
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "figure.figsize": (7.0, 3.0),
            "font.size": 11,
            "grid.alpha": 0.3,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "savefig.facecolor": "none",
            "svg.fonttype": "path",
            "svg.hashsalt": "s4mini",
        }
    )


def take_controls(figure: go.Figure) -> str:
    """Remove a figure's sliders and menus; return them as JSON.

    Args:
        figure: loses its sliders and menus.

    Returns:
        A list of {"kind": "slider" or "buttons", "prefix", "suffix",
        "active", "steps"}; a step has a label, a method of Plotly and its
        arguments.

    Source: book/figures.md.
    """
    layout = figure.to_plotly_json()["layout"]
    controls = []
    for drawn in [*layout.get("updatemenus", ()), *layout.get("sliders", ())]:
        value = drawn.get("currentvalue", {})
        controls.append(
            {
                "kind": "slider" if "steps" in drawn else "buttons",
                "prefix": value.get("prefix", ""),
                "suffix": value.get("suffix", ""),
                "active": drawn.get("active", 0),
                "steps": drawn.get("steps") or drawn["buttons"],
            }
        )
    figure.update_layout(sliders=[], updatemenus=[], overwrite=True)
    return json.dumps(controls, cls=PlotlyJSONEncoder).replace("</", "<\\/")


def show(figure: go.Figure, alt: str, height: int = 420) -> HTML | go.Figure:
    """Return a plotly figure in the form that this page can display.

    Args:
        figure: the figure; its margins, legend, colours and height are set.
        alt: what is seen, for those who do not see it; as the alternative
            text of a still figure.
        height: in pixels.

    Returns:
        HTML that refers to the site's own plotly.js while the book is being
        built, the figure otherwise.

    Source: book/figures.md.
    """
    figure.update_layout(
        height=height,
        margin={"l": 55, "r": 10, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.12},
        template="plotly_white",
        colorway=list(COLORS.values()),
        font={"size": 13, "color": "black"},
    )
    if not os.environ.get("S4MINI_BOOK_BUILD"):
        return figure
    controls = take_controls(figure)
    clear, faint = "rgba(0,0,0,0)", "rgba(128,128,128,0.25)"  # in both themes
    figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, dragmode=False)
    figure.update_xaxes(
        fixedrange=True, ticks="outside", gridcolor=faint, zerolinecolor=faint
    )
    figure.update_yaxes(
        fixedrange=True, ticks="outside", gridcolor=faint, zerolinecolor=faint
    )
    drawing = figure.to_html(
        full_html=False,
        include_plotlyjs="../_static/plotly.min.js",
        include_mathjax=False,
        auto_play=False,
        config={
            "displayModeBar": False,
            "doubleClick": False,
            "responsive": True,
            "scrollZoom": False,
        },
    )
    picture = f'<div role="img" aria-label="{escape(alt)}">{drawing}</div>'
    data = f'<script type="application/json">{controls}</script>'
    return HTML(f'<div class="interactive">{picture}{data}</div>')


def packed(X: Tensor) -> str:
    """Write a tensor's numbers as base64 of little-endian float32.

    Args:
        X: real, of any shape; the shape itself is not written.

    Returns:
        Sixteen characters for three numbers, the last axis running fastest.

    Raises:
        TypeError: X is not a real floating tensor.
        ValueError: an entry is not finite.

    Source: book/figures.md.
    """
    check_tensors(X=(X, "real ..."))
    numbers = X.detach().cpu().to(torch.float32).numpy()
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def playable(name: str, data: dict, still: Figure, alt: str) -> HTML:
    """Return a still picture that a script of the site brings to life.

    Args:
        name: of the script, book/_static/NAME.js; it fills the element
            whose `data-playable` is this name.
        data: what the script needs, as values that JSON knows.
        still: what is seen without the script; closed afterwards.
        alt: the picture in words.

    Returns:
        HTML with the picture alone outside the book's build.

    Source: book/figures.md.
    """
    file = io.BytesIO()
    still.savefig(file, format="svg", metadata={"Date": None})
    plt.close(still)
    picture = base64.b64encode(file.getvalue()).decode()
    shown = f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{picture}">'
    if not os.environ.get("S4MINI_BOOK_BUILD"):
        return HTML(shown)
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return HTML(
        f'<div class="playable" data-playable="{escape(name)}">{shown}'
        f'<script type="application/json">{text}</script></div>'
        f'<script defer src="../_static/{escape(name)}.js"></script>'
    )


def result_path(name: str) -> Path:
    """Return where a recorded result lies, or would lie.

    Args:
        name: of a file or folder in results/, such as "lra.json".

    Source: book/figures.md.
    """
    return Path(s4mini.__file__).resolve().parents[1] / "results" / name


def recorded(name: str) -> dict | None:
    """Return a measurement kept in results/NAME.json.

    Args:
        name: the file's stem.

    Returns:
        The content, or None where it has not been measured, or where s4mini
        is installed without the book's results/ folder beside it.

    Raises:
        ValueError: the file lacks how it was measured.

    Source: book/figures.md.
    """
    path = result_path(f"{name}.json")
    if not path.exists():
        return None
    content = json.loads(path.read_text("utf8"))
    missing = {"command", "device", "versions", "seed"} - set(content)
    if missing:
        listed = ", ".join(sorted(missing))
        raise ValueError(f"{path}: does not say its {listed}")
    return content
