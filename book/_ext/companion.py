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
import subprocess
import sys
from datetime import date
from html import escape
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
from docutils import nodes
from jupyter_cache import get_cache
from sphinx.util.docutils import SphinxDirective
from tables import TABLES, View

PACKAGES = ("torch", "numpy", "scipy", "matplotlib", "jupyter-book")
KEPT_CACHES = 4
SCHEMA, LONG = 1, 12  # of claims.json; how many numbers it spells out
THREADS = {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")
}  # a kernel's; chapters run several at a time
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


def ledger(root, executed):
    """{ID: what claims.json says of it}, from the rows of {docname: rows} and of
    data/recorded.
    """
    from ngdcore.ledger import registry

    live, pages = {}, {}
    for docname, rows in executed.items():
        for row in rows:
            at = {"device": hardware(row["device"]), "state": "yes"}
            live.setdefault(row["id"], []).append(row | at)
            pages.setdefault(row["id"], []).append(docname)
    claims, kept = registry(), kept_rows(root)
    if unknown := sorted(set(live) - set(claims)):
        raise ValueError(f"recorded, but not in book/claims.yml: {', '.join(unknown)}")
    larger = {doc: scaled(root, doc) for docs in pages.values() for doc in docs}
    return {
        i: entry(claim, live.get(i, []), kept.get(i, []))
        | {"chapter": pages[i][0] if i in pages else None}
        | {"one_scale": i in pages and not any(larger[doc] for doc in pages[i])}
        | ({} if is_finding(claim) else relations(claims, i))
        for i, claim in claims.items()
    }


def hardware(name):
    """A device that torch names, as a reader knows it."""
    import torch

    if name == "cpu":
        return platform.machine() + " CPU"
    cuda = name.startswith("cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name(name) if cuda else name


def kept_rows(root):
    """{ID: rows} of data/recorded, each with the device of its run, and whether that is
    still what the code gives.
    """
    rows = {}
    for run, known in zip(recorded(root), kept_runs(root)):
        for row in run["rows"]:
            at = {"device": run["device"], "state": known["state"]}
            rows.setdefault(row["id"], []).append(row | at)
    return rows


def scaled(root, docname):
    """Whether a page has settings of its own at the papers' scale."""
    import jupytext

    from ngdcore.__main__ import has_scale

    page = Path(root) / f"{docname}.md"
    return page.exists() and has_scale(jupytext.read(page, fmt="md:myst"), "paper")


def is_finding(claim):
    return claim["kind"] == "finding"


def relations(claims, name):
    """What uses a statement, and the findings about it."""
    return {
        "used_by": [i for i, c in claims.items() if name in c.get("rests_on", [])],
        "findings": [i for i, c in claims.items() if name in c.get("of", [])],
    }


def entry(claim, rows, kept):
    """What claims.json says of one ID, from its rows here and in kept runs, but for
    what other IDs and the chapters say of it.
    """
    key, judge = judgement(claim)
    large = [row for row in kept if row["scale"] == "paper"]
    gpu = [r for r in kept + rows if r["scale"] != "smoke" and "CPU" not in r["device"]]
    return {
        **claim,
        key: judge(claim, rows),
        "rows": [plain(row) for row in rows],
        "paper_scale": elsewhere(claim, large, rows=[plain(row) for row in large]),
        "on_gpu": elsewhere(claim, gpu, scales=distinct(gpu, "scale")),
    }


def judgement(claim):
    """What the rows of an ID decide, and how."""
    from ngdcore.ledger import finding, verdict

    return ("standing", finding) if is_finding(claim) else ("verdict", verdict)


def elsewhere(claim, ran, **more):
    """What rows of kept runs, or of a GPU, say of an ID, on which devices, and whether
    the code still gives it; None without such rows.
    """
    if not ran:
        return None
    key, judge = judgement(claim)
    states = distinct(ran, "state")
    told = sorted(state for state in states if state.startswith("stale"))
    unsure = "not known" if "not known" in states else "yes"
    return {
        key: judge(claim, ran),
        "devices": distinct(ran, "device"),
        "state": "; ".join(told) or unsure,
        **more,
    }


def distinct(rows, key):
    """The values that rows have there, each once, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def plain(row):
    """A row as claims.json has it: without its ID, long arrays by their ends, and what
    was said of it in words.
    """
    from ngdcore.ledger import anchor, outcome, tolerance

    brief = {key: compact(row.get(key)) for key in ("measured", "predicted", "printed")}
    rivals = row.get("unlike") or {}
    kept = ("part", "note", "rel", "rtol", "atol", "holds", "slack", "printed_holds")
    kept += ("derived", "scale", "seeds", "dtype", "device", "near", "sharp")
    return {
        **{key: row.get(key) for key in kept},
        **brief,
        "printed_rel": row.get("printed_rel", row["rel"]),
        "unlike": {label: compact(rival) for label, rival in rivals.items()},
        "blind": row.get("blind") or [],
        "tolerance_after_look": row.get("tolerance_after_look", False),
        "settings": {k: compact(v) for k, v in (row.get("settings") or {}).items()},
        "outcome": outcome(row),
        "allowed": tolerance(row),
        "anchor": anchor(row),
    }


def compact(value):
    """Arrays of more than LONG numbers as {count, least, greatest}; what is not finite
    counts, and is neither least nor greatest.
    """
    if not isinstance(value, list):
        return value
    flat = np.ravel(np.array(value, dtype=object)).tolist()
    if len(flat) <= LONG or any(isinstance(v, (list, dict)) for v in flat):
        return value
    real = [v for v in flat if isinstance(v, (int, float))]
    ends = {"least": min(real, default=None), "greatest": max(real, default=None)}
    return {"count": len(flat), **ends}


def kept_runs(root):
    """What is known of each file of data/recorded, its rows and values apart."""
    pages = {slug(p.stem): p for p in sorted((Path(root) / "notebooks").glob("*.md"))}
    runs = []
    for run in recorded(root):
        known = ("chapter", "scale", "device", "versions", "seconds")
        page = pages.get(slug(run["chapter"]))
        runs.append(
            {key: run[key] for key in known}
            | {"date": run.get("date"), "state": state(root, page, run)}
            | {"script": run.get("script")}
            | {"page": page and f"notebooks/{page.stem}"}
        )
    return runs


def state(root, page, run):
    """Whether a kept run was made with the code cells (or the script) and the package
    of now.
    """
    import jupytext

    from ngdcore.__main__ import changes, hashes

    if page is None or "hashes" not in run:
        return "not known"
    if script := run.get("script"):
        source = (Path(root) / script).read_text(encoding="utf8")
        made_by = {"cells": [{"cell_type": "code", "source": source}]}
    else:
        made_by = jupytext.read(page, fmt="md:myst")
    changed = changes(run["hashes"], hashes(Path(root), made_by))
    return f"stale: {changed}" if changed else "yes"


def slug(name):
    from ngdcore.ledger import slug

    return slug(name)


def revision(root):
    """Commit and its date, in so far as they are known; else no commit, and today."""
    commands = (
        ["describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        ["show", "-s", "--format=%cs"],
    )
    done = [
        subprocess.run(["git", "-C", str(root), *c], capture_output=True, text=True)
        for c in commands
    ]
    if any(d.returncode for d in done):
        return None, date.today().isoformat()
    return tuple(d.stdout.strip() for d in done)


def device():
    from ngdcore.opening import device

    return hardware(str(device()))


def benchmark(root, name):
    """What a script in benchmarks/ found last."""
    path = Path(root) / "benchmarks" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def build_report(app, executed):
    """What this build is: version, commit, scale, machine, seconds."""
    import torch

    import ngdcore
    from ngdcore.ledger import VERDICTS

    commit, day = revision(app.srcdir)
    seconds = {
        doc: data["exec_data"]["runtime"]
        for doc, data in sorted(getattr(app.env, "nb_metadata", {}).items())
        if data.get("exec_data")
    }
    rows = [row for rows in executed.values() for row in rows]
    return {
        "title": app.config.html_title or app.config.project,
        "version": ngdcore.__version__,
        "commit": commit,
        "date": day,
        "scale": scale(),
        "device": device(),
        "threads": torch.get_num_threads(),
        "seeds": sorted({s for row in rows for s in row.get("seeds") or []}),
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in PACKAGES},
        "seconds": seconds,
        "verdicts": [*reversed(VERDICTS)],
    }


def gather(app, env):
    """All pages are read: where anything of the ledger changed, have the pages with
    open tables written again.
    """
    state = kept(env)
    executed = dict(sorted(state["rows"].items()))
    now = {
        "claims": ledger(app.srcdir, executed),
        "report": build_report(app, executed),
        "runs": kept_runs(app.srcdir),
        "peers": benchmark(app.srcdir, "peers"),
        "scaling": benchmark(app.srcdir, "scaling"),
    }
    changed = any(now[key] != state.get(key) for key in now)
    state.update(now)
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
    """claims.json, its schema and the certificates, at the root of the site."""
    if exception is not None or app.builder.format != "html":
        return
    state, out = kept(app.env), Path(app.outdir)
    known = ("version", "commit", "date", "scale", "device")
    head = {"schema": SCHEMA} | {key: state["report"][key] for key in known}
    lines = (json.dumps(c, ensure_ascii=False) for c in state["claims"].values())
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "claims": [\n'
    text += ",\n".join(lines) + "\n]}\n"
    (out / "claims.json").write_text(text, encoding="utf8")
    book = Path(app.srcdir) / "book"
    shutil.copy(book / "claims.schema.json", out)
    shutil.copytree(
        book / "certificates",
        out / "certificates",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )


# --- The tables -----------------------------------------------------------------------


class Deferred(nodes.General, nodes.Element):
    """Stands for a table until all chapters have been read."""


class Table(SphinxDirective):
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self):
        kept(self.env)["tables"].add(self.env.docname)
        return [Deferred(table=self.name, ids=" ".join(self.arguments).split())]


def fill(app, doctree, docname):
    env, state = app.env, kept(app.env)

    def uri(doc):
        known = doc in env.found_docs
        return app.builder.get_relative_uri(docname, doc) if known else None

    def title(doc):
        return escape(env.titles[doc].astext()) if doc in env.titles else doc

    known = (state[key] for key in ("claims", "report", "runs", "peers", "scaling"))
    view = View(*known, docname, uri, title)
    for node in list(doctree.findall(Deferred)):
        html = TABLES[node["table"]](view, node["ids"])
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
    app.add_css_file("css/ledger.css")
    app.add_js_file("ledger.js", loading_method="defer")
    app.add_node(Deferred)
    for name in TABLES:
        app.add_directive(name, Table)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
