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

__all__ = [
    "record",
    "verdict",
    "finding",
    "registry",
    "harvest",
    "save",
    "recorded",
    "glue",
]

# The worst first.
VERDICTS = (
    "open",
    "not reproduced",
    "false as printed",
    "not yet re-judged",
    "derived",
    "reproduced",
)
# What a finding can be, the gravest first, and whether its rows show it.
NATURES = (
    "error",
    "gap",
    "differs",
    "sharpened",
    "extended",
    "reading",
    "misprint",
)
STANDINGS = ("shown", "not yet re-judged", "not shown", "open")
# The kinds of statement whose steps can be asserted.
STEPS = ("definition", "condition", "lemma", "remark")


class _Row(dict):
    """A ledger row; as a cell's last expression it stays silent, since `record` has
    displayed it already.
    """

    def _ipython_display_(self):
        pass


@cache
def registry() -> dict[str, dict]:
    """Every statement of the three papers, and every finding about them, by ID.

    All have ``id, paper, kind, at, title, rejudged``; a statement has ``rests_on``; a
    finding, whose kind is ``"finding"``, has ``of, nature, sure, weight`` and
    ``certificate``. The head of book/claims.yml says what they mean.

    Examples
    --------
    >>> registry()["Z-T1"]["at"]
    'Theorem 1'
    >>> registry()["K-X1"]["of"], registry()["K-X1"]["nature"]
    (['K-L43', 'K-TD', 'K-F1b'], 'error')
    """
    path = resources.files("ngdcore") / "claims.yml"
    if not path.is_file():
        path = Path(__file__).parent.parent / "book" / "claims.yml"
    yaml = load("yaml", "the registry of claims")
    papers = yaml.safe_load(path.read_text(encoding="utf8"))
    return {
        claim["id"]: {"paper": paper, "at": "", "rejudged": False}
        | ({"certificate": None} if is_finding(claim) else {"rests_on": []})
        | claim
        for paper, claims in papers.items()
        for claim in claims
    }


def is_finding(claim: dict) -> bool:
    """Whether an entry of the registry is something this book says about a paper, not
    something a paper says.

    Examples
    --------
    >>> is_finding(registry()["K-X1"]), is_finding(registry()["K-L43"])
    (True, False)
    """
    return claim["kind"] == "finding"


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
    """The verdict on a statement from its rows: the worst of its parts, ``"open"`` if
    there are none.

    A prediction that fails, or that cannot be told from a rival: *not reproduced*. One
    that holds where the printed form fails: *false as printed*, once the rows of the
    claim have been gone over (``rejudged``), *not yet re-judged* before. Otherwise
    *derived* (a definition, condition, lemma or remark whose steps are asserted), or
    *reproduced*.

    Examples
    --------
    >>> claim = registry()["Z-T1"]
    >>> verdict(claim, [])
    'open'
    >>> verdict(claim, [record("Z-T1", 0.81, 0.8, rtol=0.02)])
    'reproduced'
    >>> verdict(claim, [record("Z-T1", 0.81, 0.8, rtol=0.02, unlike={"other": 0.82})])
    'not reproduced'
    >>> verdict(claim | {"rejudged": True}, [record("Z-T1", 2, 2, printed=1)])
    'false as printed'
    """

    def of(row):
        if not _ours(row):
            return "not reproduced"
        if row["printed_holds"] is False:
            return "false as printed" if claim["rejudged"] else "not yet re-judged"
        if row["derived"] and claim["kind"] in STEPS:
            return "derived"
        return "reproduced"

    return min((of(row) for row in rows), key=VERDICTS.index, default="open")


def finding(claim: dict, rows: list[dict]) -> str:
    """Whether the rows of a finding meet the condition of its nature: *shown*, *not
    shown*, *not yet re-judged*, or *open* if there are none.

    Whatever the nature, each prediction of ours holds and can be told from its rivals.
    An *error*: wherever the printed form is evaluated it fails, and it is evaluated.
    *Sharpened*: wherever it is evaluated it holds, and ours is strictly tighter in one
    place at least. *Extended*: nothing printed is contradicted. Until a finding's rows
    have been gone over (``rejudged``), what speaks for it counts as *not yet
    re-judged*; what speaks against it counts at once.

    Examples
    --------
    >>> claim = registry()["K-X1"] | {"rejudged": True}
    >>> claim["nature"]
    'error'
    >>> finding(claim, [record("K-X1", 2, 2, printed=1)])
    'shown'
    >>> finding(claim, [record("K-X1", 2, 2, printed=2)])
    'not shown'
    >>> finding(claim | {"rejudged": False}, [record("K-X1", 2, 2, printed=1)])
    'not yet re-judged'
    """
    if not rows:
        return "open"
    if not all(map(_ours, rows)):
        return "not shown"
    printed = [row["printed_holds"] for row in rows if row["printed"] is not None]
    if claim["nature"] == "error" and any(printed):
        return "not shown"
    if not claim["rejudged"]:
        return "not yet re-judged"
    shown = {
        "error": bool(printed),
        "sharpened": all(printed) and any(map(_tighter, rows)),
        "extended": False not in printed,
    }
    return "shown" if shown.get(claim["nature"], True) else "not shown"


def _ours(row: dict) -> bool:
    """Whether our prediction holds in a row, and no rival of it does."""
    return row["holds"] and not row.get("blind")


def _tighter(row: dict) -> bool:
    """Whether a row's prediction says more than its printed form: a bound of the same
    kind that is nowhere beyond the printed one and somewhere within, or a value where
    the printed form is a bound.
    """
    if row["printed"] is None:
        return False
    ours, printed = row["rel"], row["printed_rel"]
    p, q = np.broadcast_arrays(_array(row["predicted"]), _array(row["printed"]))
    within = {"<=": q - p, ">=": p - q}.get(printed)
    if within is None or ours not in ("==", printed):
        return False
    return bool((within >= 0).all() and (within > 0).any())


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
    what a script of benchmarks/ keeps under that name; None if there is none yet. A
    chapter's number does not count: records keep when chapters move.

    Examples
    --------
    >>> recorded("00_no_such_chapter") is None
    True
    """
    name = f"{slug(chapter)}.json"
    packaged = resources.files("ngdcore") / "_data" / "recorded" / name
    checkout = Path(__file__).parent.parent
    homes = checkout / "data" / "recorded", checkout / "benchmarks"
    for path in (*(home / name for home in homes), packaged):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf8"))
    return None


def slug(chapter: str) -> str:
    """A chapter's name without its number.

    Examples
    --------
    >>> slug("04_theorem_3"), slug("theorem_3")
    ('theorem_3', 'theorem_3')
    """
    number, _, rest = chapter.partition("_")
    return rest if number.isdigit() else chapter


def anchor(row: dict) -> str:
    """The fragment of an address that leads to a row in its chapter.

    Examples
    --------
    >>> anchor({"id": "K-L43", "part": "alpha"}), anchor({"id": "Z-T1", "part": None})
    ('claim-K-L43-alpha', 'claim-Z-T1')
    """
    return "-".join(filter(None, ("claim", row["id"], row["part"])))


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


def _array(value) -> np.ndarray:
    """A row's value, as JSON has it, as numbers again."""
    return np.asarray(value, dtype=float)


def _brief(value) -> str:
    """A number, or between which numbers and how many."""
    a = _array(value)
    if a.ndim == 0:
        return f"{float(a):.4g}"
    return f"{a.min():.3g} to {a.max():.3g} ({a.size} values)"


def _name(row: dict) -> str:
    return row["id"] + (f"/{row['part']}" if row["part"] else "")


def outcome(row: dict) -> str:
    """Whether a row holds, fails, or cannot tell from a rival.

    Examples
    --------
    >>> outcome(record("Z-T1", 1.0, 1.0, unlike={"the other": 1.1}))
    'holds'
    """
    if not row["holds"]:
        return "fails"
    return "cannot tell" if row.get("blind") else "holds"


def tolerance(row: dict) -> str:
    """What a row allows, in words.

    Examples
    --------
    >>> tolerance(record("Z-T1", 1.0, 1.0, rtol=0.02))
    '0.02 of the prediction'
    """
    units = (("rtol", " of the prediction"), ("atol", ""))
    allowed = [f"{row[k]:.2g}{unit}" for k, unit in units if row.get(k)]
    return " plus ".join(allowed) or "nothing"


def _distance(row: dict) -> str:
    """How far measured and predicted are apart, and what was allowed, in words."""
    if row["rel"] == "==":
        m, p = np.broadcast_arrays(_array(row["measured"]), _array(row["predicted"]))
        off = f"off by at most {np.abs(m - p).max():.2g}" if m.size else "nothing there"
        return f"{off}, {tolerance(row)} allowed"
    room = f", {tolerance(row)} allowed beyond it" if row["rtol"] or row["atol"] else ""
    if row["slack"] is None:
        return f"on the right side of it{room}" if row["holds"] else "beyond it"
    return f"{row['slack']:.3g} times within it at the tightest{room}"


def _caught(row: dict) -> str:
    """What a row would have caught, in words; what it can't tell is said instead."""
    if row.get("blind"):
        return f" It cannot tell from: {', '.join(row['blind'])}."
    if row.get("unlike"):
        return f" It would have caught: {', '.join(row['unlike'])}."
    return f" The sharp row beside it: {row['sharp']}." if row.get("sharp") else ""


def _row_cells(row: dict) -> tuple[str, str, str, str]:
    """What is said of a row: its name, what was claimed, its outcome, and in numbers
    how far off, what was allowed, what it would have caught, and the printed form.
    """
    relation = {"==": "predicted", "<=": "at most", ">=": "at least"}[row["rel"]]
    numbers_ = (
        f"measured {_brief(row['measured'])}, {relation} {_brief(row['predicted'])};"
        f" {_distance(row)}."
    )
    if row["tolerance_after_look"]:
        numbers_ += " The tolerance was set after a look."
    printed = ""
    if row["printed"] is not None:
        stands = "holds" if row["printed_holds"] else "fails"
        sign = {"==": "", "<=": "at most ", ">=": "at least "}[row["printed_rel"]]
        printed = f" Printed: {sign}{_brief(row['printed'])}, which {stands}."
    said = numbers_ + _caught(row) + printed
    return _name(row), row["note"] or "", outcome(row), said


def _row_text(row: dict) -> str:
    """A row as a sentence."""
    name, note, stands, said = _row_cells(row)
    told = f": {note}." if note else "."
    return f"{name} {stands if stands == 'holds' else stands.upper()}{told} {said}"


def _row_html(row: dict) -> str:
    """A row as a sentence in HTML, at an address of its own."""
    name, note, stands, said = _row_cells(row)
    told = f": {html.escape(note)}." if note else "."
    kind = stands.replace(" ", "-")
    return (
        f'<div class="ngd-row ngd-{kind}" id="{anchor(row)}"><strong>{name}</strong>'
        f" <em>{stands}</em>{told}"
        f" <small>{html.escape(said[0].upper() + said[1:])}</small></div>"
    )
