"""The book's own Sphinx extension: when chapters run again, and the ledger of what they
found.

A chapter records a claim in the metadata of a cell's output (`ngdcore.ledger.record`).
Once every page has been read, the rows of all chapters, cached or fresh, are gathered
from the executed notebooks; they go into claims.json and into the tables that the
directives below leave open until then."""

import hashlib
import json
import os
import platform
import shutil
import sys
from html import escape
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
from docutils import nodes
from jupyter_cache import get_cache
from sphinx.util.docutils import SphinxDirective

PACKAGES = ("torch", "numpy", "scipy", "matplotlib", "jupyter-book")
KEPT_CACHES = 4
THREADS = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")
}  # a kernel's; chapters run several at a time
PAPERS = {
    "zhang2019": "Zhang, Martens, Grosse (2019)",
    "karakida2020": "Karakida, Osawa (2020)",
    "bernacchia2018": "Bernacchia, Lengyel, Hennequin (2018)",
}
VERDICTS = ("reproduced", "corrected", "derived", "noted", "not reproduced", "open")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SIGNS = {"==": "=", "<=": "≤", ">=": "≥"}


# --- When chapters run again ----------------------------------------------------------


def scale():
    return os.environ.get("NGD_SCALE", "quick")


def fingerprint(root, data=None):
    """Sixteen hex digits that change with whatever, outside its own cells, a chapter's
    results depend on.
    """
    root = Path(root)
    files = [
        p
        for folder in ("ngdcore", "data")
        for p in sorted((root / folder).rglob("*"))
        if p.is_file()
    ]
    more = (
        sorted(p.name for p in Path(data).iterdir())
        if data and Path(data).is_dir()
        else []
    )
    versions = [version(p) for p in PACKAGES]
    digest = hashlib.sha256(
        f"{scale()} {sys.version_info[:2]} {versions} {more}".encode()
    )
    for path in files:
        name = path.relative_to(root).as_posix()
        if "__pycache__" not in name and not name.startswith("data/recorded/"):
            digest.update(
                name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
            )
    return digest.hexdigest()[:16]


def cache_path(root, data=None):
    """Where the runs of a checkout are kept, given the folder of further data sets that
    chapters see.
    """
    return Path(root) / "_build" / ".jupyter_cache" / fingerprint(root, data)


def prune(caches):
    """Keep the newest few: going back to an earlier state of the code then costs
    nothing, and the rest is garbage.
    """
    by_age = sorted(
        (p for p in caches.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime
    )
    for old in by_age[:-KEPT_CACHES]:
        shutil.rmtree(old)


def configure(app, config):
    # Kernels inherit the environment: they import this checkout, whichever copy may be
    # installed.
    os.environ.update(NGD_BOOK="1", PYTHONPATH=str(app.srcdir), **THREADS)
    sys.path.insert(0, str(app.srcdir))
    cache = cache_path(app.srcdir, os.environ.get("NGD_DATA_DIR"))
    cache.mkdir(parents=True, exist_ok=True)
    os.utime(cache)
    prune(cache.parent)
    config.nb_execution_cache_path = str(cache)


def drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book adds thebe's script twice, which is an error on every page; nothing
    here uses it.
    """
    context["script_files"] = [
        s
        for s in context.get("script_files", [])
        if "thebe" not in str(s.filename)
        and "THEBE" not in str(s.attributes.get("body"))
    ]


# --- The ledger -----------------------------------------------------------------------


def keep_rows(app, doctree):
    """Keep the rows of a page just read with the environment. They come from the cache:
    it has the outputs, whether the page ran now or long ago, while
    _build/jupyter_execute has them only if it ran now."""
    from ngdcore.ledger import harvest

    env = app.env
    if "exec_data" not in getattr(env, "nb_metadata", {}).get(env.docname, {}):
        return
    page = Path(app.outdir).parent / "jupyter_execute" / f"{env.docname}.ipynb"
    executed = get_cache(app.config.nb_execution_cache_path).merge_match_into_notebook(
        nbformat.read(page, 4)
    )[1]
    kept(env)["rows"][env.docname] = harvest(executed)[0]


def kept(env):
    """What pages leave with the environment: their ledger rows, and which of them hold
    open tables.
    """
    if not hasattr(env, "ngd"):
        env.ngd = {"rows": {}, "tables": set()}
    return env.ngd


def forget(app, env, docname):
    kept(env)["rows"].pop(docname, None)
    kept(env)["tables"].discard(docname)


def recorded(root):
    files = sorted((Path(root) / "data" / "recorded").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf8")) for path in files]


def tolerance(row):
    return {k: row[k] for k in ("rtol", "atol") if row.get(k)} or None


def entry(claim, rows, chapter, paper_rows):
    """What claims.json says of one ID: with one row its values, with several lists of
    them.
    """
    from ngdcore.ledger import verdict

    def of(key):
        values = [
            tolerance(row) if key == "tolerance" else row.get(key) for row in rows
        ]
        return values[0] if len(values) == 1 else values or None

    keys = ("predicted", "measured", "printed", "rel", "tolerance", "settings")
    return {
        **claim,
        "chapter": chapter,
        "verdict": verdict(claim, rows),
        "verdict_paper": verdict(claim, paper_rows) if paper_rows else None,
        **{key: of(key) for key in keys},
        "rows": [{**row, "verdict": verdict(claim, [row])} for row in rows],
    }


def ledger(root, executed):
    """One entry an ID of the registry, from the rows of {docname: rows} and of
    data/recorded.
    """
    from ngdcore.ledger import registry

    live, chapters, paper = {}, {}, {}
    for docname, rows in executed.items():
        for row in rows:
            live.setdefault(row["id"], []).append(row)
            chapters.setdefault(row["id"], docname)
    for run in recorded(root):
        for row in run["rows"] if run["scale"] == "paper" else []:
            paper.setdefault(row["id"], []).append(row)
    claims = registry()
    if unknown := sorted(set(live) - set(claims)):
        raise ValueError(f"recorded, but not in book/claims.yml: {', '.join(unknown)}")
    return [
        entry(claims[i], live.get(i, []), chapters.get(i), paper.get(i, []))
        for i in claims
    ]


def build_report(env, executed):
    seconds = {
        doc: data["exec_data"]["runtime"]
        for doc, data in sorted(getattr(env, "nb_metadata", {}).items())
        if data.get("exec_data")
    }
    rows = [row for rows in executed.values() for row in rows]
    import torch

    device = (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else platform.machine() + " CPU"
    )
    seeds = sorted({s for row in rows for s in row.get("seeds") or []})
    return {
        "scale": scale(),
        "device": device,
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in PACKAGES},
        "seconds": seconds,
    }


def gather(app, env):
    """All pages are read: where anything of the ledger changed, have the pages with
    open tables written again.
    """
    state = kept(env)
    executed = dict(sorted(state["rows"].items()))
    claims, report = ledger(app.srcdir, executed), build_report(env, executed)
    changed = (claims, report) != (state.get("claims"), state.get("report"))
    state.update(claims=claims, report=report)
    return sorted(state["tables"]) if changed else []


def bring_plotly(app, exception):
    """The one script that interactive figures load, from the installed package."""
    if exception is None and app.builder.format == "html":
        import plotly

        shutil.copy(
            Path(plotly.__file__).parent / "package_data" / "plotly.min.js",
            Path(app.outdir, "_static"),
        )


def write_claims(app, exception):
    if exception is None and app.builder.format == "html":
        text = json.dumps(kept(app.env)["claims"], indent=1, ensure_ascii=False)
        Path(app.outdir, "claims.json").write_text(text, encoding="utf8")


# --- The tables -----------------------------------------------------------------------


def number(x):
    """Four significant digits; powers of ten in plain text, so that nothing needs
    MathJax.
    """
    if x is None or isinstance(x, (bool, str)):
        return {None: "–", True: "yes", False: "no"}.get(x, x)
    mantissa, _, exponent = f"{x:.4g}".partition("e")
    return (
        f"{mantissa} × 10{str(int(exponent)).translate(RAISED)}"
        if exponent
        else mantissa
    )


def value(x):
    """A number, or how many and between which."""
    if isinstance(x, dict):
        return ", ".join(f"{k} {value(v)}" for k, v in x.items())
    if not isinstance(x, list):
        return number(x)
    flat = np.ravel(np.array(x, dtype=object)).tolist()
    if len(flat) <= 3 or any(isinstance(v, (str, bool, type(None))) for v in flat):
        return ", ".join(map(number, flat[:4])) + (" …" if len(flat) > 4 else "")
    return f"{len(flat)} values, {number(min(flat))} to {number(max(flat))}"


def table(head, rows, kind):
    """rows of cells that are HTML already."""

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"

    return (
        f'<div class="ngd-table"><table class="table {kind}">'
        f"<thead>{line(head, 'th')}</thead>"
        f"<tbody>{''.join(line(r, 'td') for r in rows)}</tbody></table></div>"
    )


def badge(verdict):
    return f'<span class="verdict verdict-{verdict.replace(" ", "-")}">{verdict}</span>'


def link(app, page, doc, text):
    if doc is None:
        return text
    return f'<a href="{app.builder.get_relative_uri(page, doc)}">{text}</a>'


def title_of(env, doc):
    return escape(env.titles[doc].astext()) if doc in env.titles else doc


def scoreboard(app, page, claims, ids):
    def line(c):
        return (
            link(app, page, c["chapter"], c["id"]),
            escape(c["at"] or "–"),
            escape(c["title"]),
            badge(c["verdict"]),
            badge(c["verdict_paper"]) if c["verdict_paper"] else "not yet",
        )

    head = ("ID", "Place", "Claim", f"Here ({scale()} scale)", "Paper scale")
    return "".join(
        f"<h3>{PAPERS.get(paper, paper)}</h3>"
        + table(head, [line(c) for c in claims if c["paper"] == paper], "scoreboard")
        for paper in dict.fromkeys(c["paper"] for c in claims)
    )


def claim_rows(app, page, claims, ids):
    def line(c, row):
        name = c["id"] + (f"/{row['part']}" if row.get("part") else "")
        return (
            link(app, page, c["chapter"], escape(name)),
            value(row["measured"]),
            SIGNS[row["rel"]],
            value(row["predicted"]),
            value(row.get("printed")),
            value(tolerance(row)),
            value(row.get("slack")),
            badge(row["verdict"]),
        )

    found = {c["id"]: c for c in claims}
    if unknown := set(ids) - set(found):
        raise ValueError(
            f"{page}: not in book/claims.yml: {', '.join(sorted(unknown))}"
        )
    rows = [line(found[i], row) for i in ids for row in found[i]["rows"]]
    rows += [
        (i, "–", "", "–", "–", "–", "–", badge("open"))
        for i in ids
        if not found[i]["rows"]
    ]
    return table(
        ("ID", "Measured", "", "Predicted", "Printed", "Tolerance", "Slack", "Verdict"),
        rows,
        "claims",
    )


def tally(app, page, claims, ids):
    def line(paper):
        verdicts = [c["verdict"] for c in claims if c["paper"] == paper]
        return [
            PAPERS.get(paper, paper),
            *(str(verdicts.count(v) or "–") for v in VERDICTS),
            str(len(verdicts)),
        ]

    papers = dict.fromkeys(c["paper"] for c in claims)
    return table(("Paper", *map(badge, VERDICTS), "all"), map(line, papers), "tally")


def report_table(app, page, claims, ids):
    report = kept(app.env)["report"]
    seconds = [
        (link(app, page, doc, title_of(app.env, doc)), f"{s:.1f}")
        for doc, s in report["seconds"].items()
        if s
    ]
    facts = [
        ("Scale", report["scale"]),
        ("Device", escape(report["device"])),
        ("Threads", str(report["threads"])),
        ("Seeds", ", ".join(map(str, report["seeds"])) or "–"),
        *report["versions"].items(),
    ]
    total = ("All chapters", f"{sum(s for s in report['seconds'].values() if s):.1f}")
    return table(("", "This build"), facts, "facts") + table(
        ("Chapter", "Seconds"), [*seconds, total], "seconds"
    )


TABLES = {
    "scoreboard": scoreboard,
    "claims": claim_rows,
    "tally": tally,
    "build-report": report_table,
}


class Deferred(nodes.General, nodes.Element):
    """Stands for a table until all chapters have been read."""


class Table(SphinxDirective):
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self):
        kept(self.env)["tables"].add(self.env.docname)
        return [Deferred(table=self.name, ids=" ".join(self.arguments).split())]


def fill(app, doctree, docname):
    for node in list(doctree.findall(Deferred)):
        html = TABLES[node["table"]](app, docname, kept(app.env)["claims"], node["ids"])
        node.replace_self(nodes.raw("", html, format="html"))


def setup(app):
    app.connect("config-inited", configure)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("env-purge-doc", forget)
    app.connect("doctree-read", keep_rows)
    app.connect("env-updated", gather)
    app.connect("doctree-resolved", fill)
    app.connect("build-finished", write_claims)
    app.connect("build-finished", bring_plotly)
    app.add_node(Deferred)
    for name in TABLES:
        app.add_directive(name, Table)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
