"""What opens a chapter: the look of its figures, the numbers' type, the scale, the
device and the settings of its runs.
"""

import os
from types import SimpleNamespace

import torch

__all__ = ["chapter", "scale", "settings", "Settings", "device"]

SCALES = ("quick", "paper", "smoke")


def chapter(
    quick: dict | None = None,
    paper: dict | None = None,
    smoke: dict | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    threads: int | None = None,
) -> "Settings":
    """Open a chapter: set the book's figure style and the default dtype, and give the
    settings of its runs at the scale of this one, with the device they run on.

    Public as ``ngd.chapter``; called once, in a notebook's first cell.

    Parameters
    ----------
    quick, paper, smoke : dict
        Settings by name, as in `settings`.
    dtype : torch.dtype
        Of tensors that are made without one.
    threads : int, optional
        How many threads torch may use on a CPU; as the environment says by default.

    Returns
    -------
    Settings
        The settings as attributes, and ``scale`` and ``device`` beside them.

    Raises
    ------
    ValueError
        For a scale or a device (``NGD_SCALE``, ``NGD_DEVICE``) that is unknown.

    Examples
    --------
    >>> before = torch.get_default_dtype()
    >>> cfg = chapter(dict(n=500, seeds=[0, 1]), paper=dict(n=60000))
    >>> cfg.n, cfg.seeds, torch.get_default_dtype()
    (500, [0, 1], torch.float64)
    >>> torch.set_default_dtype(before)
    """
    from .plotting import style

    cfg = settings(quick or {}, paper, smoke)
    cfg.scale, cfg.device = scale(), device()
    style()
    torch.set_default_dtype(dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    return cfg


def scale() -> str:
    """The scale of this run, from ``NGD_SCALE``: ``"quick"`` (default), ``"paper"``
    (the papers' sizes) or ``"smoke"`` (the least that reaches every line; for tests,
    and its verdicts mean nothing).

    Raises
    ------
    ValueError
        For any other value.

    Examples
    --------
    >>> scale() in SCALES
    True
    """
    name = os.environ.get("NGD_SCALE", "quick")
    if name not in SCALES:
        raise ValueError(f"NGD_SCALE={name!r} is unknown; use one of {SCALES}")
    return name


class Settings(SimpleNamespace):
    """The settings of one experiment at the scale of this run; attributes, nothing
    else. Made by `chapter` and `settings`.
    """


def settings(
    quick: dict, paper: dict | None = None, smoke: dict | None = None
) -> Settings:
    """The settings of one experiment: ``quick``, with what ``paper`` changes when
    ``NGD_SCALE=paper``, and ``smoke`` when ``NGD_SCALE=smoke``.

    Settings that stand in a notebook's variables are written into every ledger row of
    that notebook.

    Examples
    --------
    >>> settings(dict(n=500, seed=0), paper=dict(n=60000)).seed
    0
    """
    changed = {"quick": None, "paper": paper, "smoke": smoke}[scale()]
    return Settings(**{**quick, **(changed or {})})


def device() -> torch.device:
    """The device of this run, from ``NGD_DEVICE``: ``"auto"`` (default: the first GPU
    if there is one, else the CPU) or any device that torch knows by name.

    Raises
    ------
    ValueError
        For a name that torch does not know, or a device that is not there.

    Examples
    --------
    >>> isinstance(device(), torch.device)
    True
    """
    name = os.environ.get("NGD_DEVICE", "auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"NGD_DEVICE={name!r}: torch cannot use this device ({error});"
            " use auto, cpu or cuda"
        ) from error
    return torch.device(name)
