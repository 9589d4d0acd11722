"""The ledger: what a chapter measured, against what was predicted and what was printed.

Nothing is kept in the process: a row travels in the metadata of the cell's output, so
that a notebook, executed or cached, carries its own ledger. `harvest` collects the rows
again."""

import difflib
import html
import json
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from .arrays import numbers
from .extras import load
from .opening import Settings, scale

__all__ = ["record", "verdict", "registry", "harvest", "save", "recorded", "glue"]

# The worst first.
VERDICTS = ("open", "not reproduced", "corrected", "derived", "noted", "reproduced")
# The kinds of claim whose steps can be asserted.
STEPS = ("definition", "condition", "lemma", "remark")


class _Row(dict):
    """A ledger row; as a cell's last expression it stays silent, since `record` has
    displayed it already.
    """

    def _ipython_display_(self):
        pass


@cache
def registry() -> dict[str, dict]:
    """Every claim of the three papers by ID: ``id, paper, kind, at, title, grade``.

    Examples
    --------
    >>> registry()["Z-T1"]["at"]
    'Theorem 1'
    """
    path = resources.files("ngdcore") / "claims.yml"
    if not path.is_file():
        path = Path(__file__).parent.parent / "book" / "claims.yml"
    yaml = load("yaml", "the registry of claims")
    papers = yaml.safe_load(path.read_text(encoding="utf8"))
    empty = {"at": "", "grade": None}
    return {
        claim["id"]: {**empty, "paper": paper, **claim}
        for paper, claims in papers.items()
        for claim in claims
    }


def record(
    claim: str,
    measured,
    predicted,
    rel: str = "==",
    rtol: float = 0.0,
    atol: float = 0.0,
    unlike: dict | None = None,
    sharp: str | None = None,
    tolerance_after_look: bool = False,
    printed=None,
    printed_rel: str | None = None,
    derived: bool = False,
    note: str | None = None,
) -> dict:
    r"""Write one row of the ledger: is ``measured rel predicted`` within tolerance,
    could it have been otherwise, and was it so in print?

    With :math:`s = atol + rtol\,|p|`, ``==`` holds where :math:`|m - p| \le s`, ``<=``
    where :math:`m \le p + s`, and ``>=`` where :math:`m \ge p - s`; arrays hold where
    every entry does, and NaN or infinity never does.

    Parameters
    ----------
    claim : str
        An ID of the registry, or ``ID/part`` (three parts at most).
    measured, predicted : number or array
        ``measured`` comes from a run or a dense reference that shares no call with
        ``predicted``.
    rel : {"==", "<=", ">="}
    rtol, atol : float
        From a reason stated in the chapter before the run.
    unlike : dict, optional
        One to three rivals, ``{what it would be: its value}``: plausible wrong
        predictions (the neighbouring exponent, the factor 2, the other norm). Each is
        put in the place of ``predicted`` and must fail at the same tolerance; a row
        with a rival that holds is *blind*: it cannot tell, and does not count as
        reproduced. For ``==`` one of them should be *near*: within 30 % of the
        prediction, or one step where both are whole numbers.
    sharp : str, optional
        For a bound with room to spare: the row, ``ID/part``, that is sharp beside it.
    tolerance_after_look : bool
        The tolerance was widened after a look at the run; the scoreboard says so.
    printed : number or array, optional
        The printed formula, evaluated; a row whose prediction holds while this fails is
        a correction.
    printed_rel : str, optional
        The printed relation where it differs from ``rel``.
    derived : bool
        The row asserts the steps of a definition, condition, lemma or remark rather
        than an experiment.
    note : str, optional
        One sentence for the scoreboard.

    Returns
    -------
    dict
        The row; in a notebook it is also displayed.

    Raises
    ------
    KeyError
        For an ID that the registry does not have.
    ValueError
        For an unknown relation, shapes that do not broadcast, or more than three
        rivals.

    Examples
    --------
    >>> row = record("Z-T1/rate", measured=[0.5, 0.2], predicted=[0.5, 0.25], rel="<=")
    >>> row["holds"], row["slack"]
    (True, 1.0)
    >>> row = record("Z-T1/rate", 0.81, 0.8, rtol=0.02, unlike={"half the rate": 0.9})
    >>> row["holds"], row["blind"], row["near"]
    (True, [], True)
    """
    m, p = numbers(measured), numbers(predicted)
    row = {
        **_place(claim),
        **_judged(m, p, rel, float(rtol), float(atol)),
        **_rivals(m, p, unlike or {}, rel, float(rtol), float(atol)),
        "sharp": sharp,
        "tolerance_after_look": bool(tolerance_after_look),
        **_in_print(m, printed, printed_rel or rel, rtol, atol),
        "derived": bool(derived),
        "note": note,
        **_circumstances(measured, m),
    }
    metadata = {"ngd": json.loads(json.dumps(row, default=str))}
    _display(_row_text(row), _row_html(row), metadata)
    return _Row(row)


def _place(claim: str) -> dict:
    """ID and part of ``ID/part``; an ID that the registry does not have is refused."""
    name, _, part = claim.partition("/")
    if name not in registry():
        close = difflib.get_close_matches(name, registry(), n=3)
        raise KeyError(
            f"{name!r} is not in the registry of claims; did you mean {close}?"
        )
    return {"id": name, "part": part or None}


def _judged(m: np.ndarray, p: np.ndarray, rel: str, rtol: float, atol: float) -> dict:
    """What a row says of measured and predicted: both, how they are compared, whether
    that holds, and how much room a bound leaves.
    """
    return {
        "measured": _plain(m),
        "predicted": _plain(p),
        "rel": rel,
        "rtol": rtol,
        "atol": atol,
        "holds": _holds(m, p, rel, rtol, atol),
        "slack": _slack(m, p, rel),
    }


def _rivals(
    m: np.ndarray, p: np.ndarray, unlike: dict, rel: str, rtol: float, atol: float
) -> dict:
    """What a row says of the wrong predictions beside it: their values, which of them
    hold, and whether one is near the right one (None without any).
    """
    if len(unlike) > 3:
        raise ValueError(f"unlike has {len(unlike)} rivals; give one to three")
    values = {label: numbers(value) for label, value in unlike.items()}
    return {
        "unlike": {label: _plain(value) for label, value in values.items()},
        "blind": [
            label
            for label, value in values.items()
            if _holds(m, value, rel, rtol, atol)
        ],
        "near": any(_near(value, p) for value in values.values()) if values else None,
    }


def _near(rival: np.ndarray, p: np.ndarray) -> bool:
    """Whether a rival is within 30 % of the prediction's largest entry, or, where both
    are whole numbers, one step away.
    """
    rival, p = np.broadcast_arrays(rival, p)
    distance, size = np.abs(rival - p).max(), np.abs(p).max()
    whole = bool((rival == np.round(rival)).all() and (p == np.round(p)).all())
    return bool(distance <= 0.3 * size or (whole and distance <= 1))


def _in_print(m: np.ndarray, printed, rel: str, rtol: float, atol: float) -> dict:
    """What a row says of the printed value: itself, its relation, whether it holds."""
    shown = {"printed": None, "printed_rel": rel, "printed_holds": None}
    if printed is None:
        return shown
    q = numbers(printed)
    return shown | {
        "printed": _plain(q),
        "printed_holds": _holds(m, q, rel, rtol, atol),
    }


def _circumstances(measured, m: np.ndarray) -> dict:
    """How a row was measured: the notebook's settings, scale, seeds, dtype, device."""
    used, tensor = _notebook_settings(), _first_tensor(measured)
    ran_on = used.pop("device", None) or (
        tensor.device if tensor is not None else "cpu"
    )
    one_seed = [used["seed"]] if "seed" in used else []
    return {
        "settings": used,
        "scale": scale(),
        "seeds": used.get("seeds", one_seed),
        "dtype": str((m if tensor is None else tensor).dtype).removeprefix("torch."),
        "device": str(ran_on),
    }


def _first_tensor(value) -> torch.Tensor | None:
    """The first tensor of a measurement, in lists of any depth."""
    if isinstance(value, (list, tuple)):
        found = (_first_tensor(entry) for entry in value)
        return next((entry for entry in found if entry is not None), None)
    return value if isinstance(value, torch.Tensor) else None


def verdict(claim: dict, rows: list[dict]) -> str:
    """The verdict on a claim from its rows: the worst of its parts, ``"open"`` if there
    are none.

    A prediction that fails, or that cannot be told from a rival: *not reproduced*. One
    that holds where the printed form fails: *corrected*. Otherwise *derived* (a
    definition, condition, lemma or remark whose steps are asserted), or *reproduced*.
    Corrections of grade C (readings of a damaged or ambiguous text) are *noted*.

    Examples
    --------
    >>> verdict(registry()["Z-T1"], [])
    'open'
    """

    def of(row):
        if not row["holds"] or row.get("blind"):
            return "not reproduced"
        if row["printed"] is not None and row["printed_holds"] is False:
            return "corrected"
        if claim.get("grade") == "C":
            return "noted"
        if row["derived"] and claim["kind"] in STEPS:
            return "derived"
        return "reproduced"

    return min((of(row) for row in rows), key=VERDICTS.index, default="open")


def harvest(notebook: dict) -> tuple[list[dict], dict]:
    """Ledger rows, and what `save` kept, from the outputs of an executed notebook (as
    parsed JSON).

    Examples
    --------
    >>> output = {"metadata": {"ngd_saved": {"loss": [1.0]}}}
    >>> harvest({"cells": [{"outputs": [output]}]})
    ([], {'loss': [1.0]})
    """
    rows, saved = [], {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            metadata = output.get("metadata", {})
            rows += [metadata["ngd"]] if "ngd" in metadata else []
            saved |= metadata.get("ngd_saved", {})
    return rows, saved


def save(**values) -> None:
    """Keep numbers or arrays of a run with the notebook; ``python -m ngdcore record``
    writes them to data/recorded/.

    Examples
    --------
    >>> save(loss=[1.0, 0.5])
    """
    kept = {name: numbers(value).tolist() for name, value in values.items()}
    _display(f"saved: {', '.join(kept)}", None, {"ngd_saved": kept})


def recorded(chapter: str) -> dict | None:
    """The recorded run of a chapter (rows, saved values, device, versions, seconds), or
    None if there is none yet.

    Examples
    --------
    >>> recorded("00_no_such_chapter") is None
    True
    """
    packaged = resources.files("ngdcore") / "_data" / "recorded" / f"{chapter}.json"
    checkout = Path(__file__).parent.parent / "data" / "recorded" / f"{chapter}.json"
    for path in (checkout, packaged):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf8"))
    return None


def glue(name: str, value) -> None:
    """Make ``value`` available to the prose as ``{glue:text}`name```; outside the book
    it does nothing visible.

    Examples
    --------
    >>> glue("speed", f"{1.234:.2f}")
    """
    prefix = "application/papermill.record/"
    _publish(
        {f"{prefix}text/plain": str(value)},
        {"scrapbook": {"name": name, "mime_prefix": prefix}},
    )


def _plain(a: np.ndarray):
    """As JSON has it: nested lists, what is not finite by name."""
    return json.loads(json.dumps(a.tolist()), parse_constant=str)


def _holds(m: np.ndarray, p: np.ndarray, rel: str, rtol: float, atol: float) -> bool:
    """Whether every entry of m stands in the relation to that of p, within atol +
    rtol |p|.
    """
    if rel not in ("==", "<=", ">="):
        raise ValueError(f"rel={rel!r} is unknown; use '==', '<=' or '>='")
    m, p = np.broadcast_arrays(m, p)
    if not (np.isfinite(m).all() and np.isfinite(p).all()):
        return False
    slack = atol + rtol * np.abs(p)
    excess = {"==": np.abs(m - p), "<=": m - p, ">=": p - m}[rel]
    return bool((excess <= slack).all())


def _slack(m: np.ndarray, p: np.ndarray, rel: str) -> float | None:
    """How far a bound is from being met with equality, at its tightest entry, as a
    ratio.
    """
    if rel == "==":
        return None
    large, small = (p, m) if rel == "<=" else (m, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(
            np.broadcast_arrays(large, small)[1] > 0, large / small, np.inf
        )
    tightest = float(np.min(ratio))
    return tightest if np.isfinite(tightest) else None


def _notebook_settings() -> dict:
    """All `Settings` among the notebook's variables, merged."""
    shell = _shell()
    merged = {}
    for name, value in sorted(shell.user_ns.items()) if shell else ():
        if isinstance(value, Settings) and not name.startswith("_"):
            merged |= vars(value)
    merged.pop("scale", None)
    return merged


def _shell():
    """The IPython shell that runs this, or None."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _display(text, markup, metadata) -> None:
    _publish({"text/plain": text} | ({"text/html": markup} if markup else {}), metadata)


def _publish(data, metadata) -> None:
    if _shell() is not None:
        from IPython.display import display

        display(data, raw=True, metadata=metadata)


def _brief(value) -> str:
    a = np.asarray(value, dtype=float)
    if a.ndim == 0:
        return f"{float(a):.4g}"
    return f"{a.min():.3g} to {a.max():.3g} ({a.size} values)"


def _row_cells(row: dict) -> tuple[list[str], str]:
    """What is shown of a row: name, measured, relation, predicted, tolerance and, where
    there is one, the printed value; and whether it holds.
    """
    name = row["id"] + (f"/{row['part']}" if row["part"] else "")
    units = (("rtol", " rel."), ("atol", " abs."))
    tolerance = " + ".join(f"{row[k]:.1g}{unit}" for k, unit in units if row[k])
    cells = [
        name,
        _brief(row["measured"]),
        row["rel"],
        _brief(row["predicted"]),
        tolerance or "exact",
    ]
    if row["printed"] is not None:
        outcome = "holds" if row["printed_holds"] else "fails"
        cells.append(
            f"printed: {row['printed_rel']} {_brief(row['printed'])} {outcome}"
        )
    if row["holds"] and row["blind"]:
        return cells, f"CANNOT TELL from {', '.join(row['blind'])}"
    return cells, "holds" if row["holds"] else "FAILS"


def _row_text(row: dict) -> str:
    """A row as one line of text."""
    (name, m, rel, p, tolerance, *printed), outcome = _row_cells(row)
    rest = "".join(f"; {x}" for x in printed)
    return (
        f"{name}: measured {m} {rel} {p} predicted"
        f" (tolerance {tolerance}): {outcome}{rest}"
    )


def _row_html(row: dict) -> str:
    """A row as one line of HTML."""
    (name, m, rel, p, tolerance, *printed), outcome = _row_cells(row)
    rest = "".join(f" · {html.escape(x)}" for x in printed)
    return (
        f'<div class="ngd-row ngd-{outcome.split()[0].lower()}"><strong>{name}</strong>'
        f" measured {m} {html.escape(rel)} {p} predicted"
        f" (tolerance {tolerance}): <em>{outcome}</em>{rest}</div>"
    )
