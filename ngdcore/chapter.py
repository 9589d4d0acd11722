"""The scale, the settings and the device of a chapter's run."""

import os
from types import SimpleNamespace

import torch

__all__ = ["scale", "settings", "Settings", "device"]

SCALES = ("quick", "paper")


def scale() -> str:
    """The scale of this run, from ``NGD_SCALE``: ``"quick"`` (default) or ``"paper"``.

    Raises
    ------
    ValueError
        For any other value.

    Examples
    --------
    >>> scale() in ("quick", "paper")
    True
    """
    name = os.environ.get("NGD_SCALE", "quick")
    if name not in SCALES:
        raise ValueError(f"NGD_SCALE={name!r} is unknown; use one of {SCALES}")
    return name


class Settings(SimpleNamespace):
    """The settings of one experiment at the scale of this run; attributes, nothing
    else. Made by `settings`.
    """


def settings(quick: dict, paper: dict | None = None) -> Settings:
    """The settings of one experiment: ``quick``, with what ``paper`` changes when
    ``NGD_SCALE=paper``.

    Settings that stand in a notebook's variables are written into every ledger row of
    that notebook.

    Examples
    --------
    >>> settings(dict(n=500, seed=0), paper=dict(n=60000)).seed
    0
    """
    name = scale()
    return Settings(**{**quick, **((paper or {}) if name == "paper" else {})})


def device() -> torch.device:
    """The first GPU if there is one, else the CPU.

    Examples
    --------
    >>> device().type in ("cpu", "cuda")
    True
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
