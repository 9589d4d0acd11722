"""One look for every figure: a colour an optimizer, theory as lines, runs as dots,
spread as bands.
"""

import html
import os

import numpy as np

from .arrays import numbers
from .extras import load

plt = load("matplotlib.pyplot", "ngdcore.plotting")
sns = load("seaborn", "ngdcore.plotting")

__all__ = [
    "COLORS",
    "style",
    "theory",
    "runs",
    "band",
    "heatmap",
    "css_color",
    "interactive",
]

_base = sns.color_palette("colorblind")
COLORS = {
    "gd": _base[7],  # grey: the method everything is compared with
    "ngd": _base[0],
    "block-diagonal": _base[2],
    "block-tridiagonal": _base[4],
    "k-fac": _base[1],
    # The palette's yellow, darker: it must show on white.
    "unit-wise": (0.62, 0.5, 0.0),
    "adam": _base[9],
    "theory": (0.15, 0.15, 0.15),
    "target": _base[3],
    "bound": _base[5],
}


def style() -> None:
    """Set the book's figure style for this notebook (call once, after the imports).

    Examples
    --------
    >>> style()
    """
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "font.size": 11,
        }
    )


def theory(ax, x, y, key: str = "theory", label: str | None = None, **kwargs):
    """Draw a predicted curve: a line in the colour of ``key``.

    Examples
    --------
    >>> line = theory(plt.figure().gca(), [0, 1, 2], [1.0, 0.5, 0.25], "ngd")
    """
    return ax.plot(
        numbers(x), numbers(y), "-", color=COLORS[key], label=label, zorder=1, **kwargs
    )


def runs(ax, x, y, key: str, label: str | None = None, **kwargs):
    """Draw a measured run: dots in the colour of ``key``.

    Examples
    --------
    >>> dots = runs(plt.figure().gca(), [0, 1, 2], [1.0, 0.6, 0.3], "ngd")
    """
    return ax.plot(
        numbers(x),
        numbers(y),
        "o",
        color=COLORS[key],
        label=label,
        ms=4.5,
        mec="white",
        mew=0.5,
        **kwargs,
    )


def band(ax, x, ys, key: str, label: str | None = None):
    """Draw several runs, (seeds, points): the median as dots on a thin line, smallest
    to largest as a band.

    Examples
    --------
    >>> dots = band(plt.figure().gca(), [0, 1], [[1.0, 0.6], [1.1, 0.5]], "gd")
    """
    x, ys = numbers(x), numbers(ys)
    ax.fill_between(x, ys.min(0), ys.max(0), color=COLORS[key], alpha=0.2, lw=0)
    return ax.plot(
        x,
        np.median(ys, 0),
        "o-",
        color=COLORS[key],
        label=label,
        ms=4.5,
        lw=0.9,
        mec="white",
        mew=0.5,
    )


def heatmap(ax, matrix, label: str, **kwargs):
    """Draw a matrix with a diverging map centred at zero and a labelled colour bar.

    Examples
    --------
    >>> heatmap(plt.figure().gca(), [[1.0, -0.2], [-0.2, 1.0]], "Q")
    """
    matrix = numbers(matrix)
    top = np.abs(matrix).max()
    sns.heatmap(
        matrix,
        ax=ax,
        cmap="vlag",
        vmin=-top,
        vmax=top,
        square=True,
        xticklabels=False,
        yticklabels=False,
        cbar_kws={"label": label, "shrink": 0.8},
        **kwargs,
    )


def css_color(key: str, alpha: float = 1.0) -> str:
    """The colour of ``key`` as plotly wants it.

    Examples
    --------
    >>> css_color("theory")
    'rgba(38,38,38,1.0)'
    """
    return "rgba({},{},{},{})".format(*(round(255 * v) for v in COLORS[key]), alpha)


def interactive(figure, alt: str):
    """A plotly figure that answers to a hand, without a kernel and without the network.

    In the book (``NGD_BOOK`` set) it becomes HTML that loads plotly.js from the site's
    own ``_static`` folder; anywhere else the figure itself is returned. Put everything
    the reader may choose into frames, sliders or buttons.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
    alt : str
        What a reader who cannot see it should know: both axes, and what changes.

    Examples
    --------
    >>> import plotly.graph_objects as go
    >>> figure = go.Figure(go.Scatter(y=[1, 2]))
    >>> shown = interactive(figure, "A line: value (vertical axis) against step.")
    """
    figure.update_layout(
        template="simple_white",
        height=440,
        margin=dict(l=60, r=15, t=40, b=50),
        font=dict(size=13),
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    return _Offline(figure, alt) if os.environ.get("NGD_BOOK") else figure


class _Offline:
    """A figure, and what a reader who cannot see it should know."""

    def __init__(self, figure, alt):
        self.figure, self.alt = figure, alt

    def __repr__(self) -> str:
        return f"interactive figure: {self.alt}"

    def _repr_html_(self) -> str:
        """What a notebook shows; plotly.js comes from the site."""
        config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
        drawn = self.figure.to_html(
            full_html=False, include_plotlyjs="../_static/plotly.min.js", config=config
        )
        alt = html.escape(self.alt)
        return (
            f'<div class="ngd-interactive" role="img" aria-label="{alt}">{drawn}</div>'
        )
