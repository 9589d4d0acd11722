"""The tables of the ledger, as HTML: scoreboard, findings, the rows of some claims, the
counts of the landing page, kept runs, other libraries, and what this build was.

Each is made from a `View`, when all chapters have been read."""

from html import escape
from typing import Callable, NamedTuple

import numpy as np

PAPERS = {
    "zhang2019": "Zhang, Martens, Grosse (2019)",
    "karakida2020": "Karakida, Osawa (2020)",
    "bernacchia2018": "Bernacchia, Lengyel, Hennequin (2018)",
}
NATURES = {
    "error": ("errors", "printed, and false inside its own hypotheses"),
    "gap": ("gaps", "true, and the printed proof does not give it"),
    "differs": ("differences", "measured otherwise in the paper's own setting"),
    "sharpened": ("sharpened", "true, and more can be said"),
    "extended": ("extended", "what the papers do not say"),
    "reading": ("readings", "the text is damaged or ambiguous there"),
    "misprint": ("misprints", "without consequence"),
}
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SIGNS = {"==": "=", "<=": "≤", ">=": "≥"}
SCOREBOARD, ERRATA = "book/scoreboard", "book/errata"
PENDING = "not yet re-judged"


class View(NamedTuple):
    """What a table is made from, seen from one page."""

    claims: dict[str, dict]  # by ID, as in claims.json
    report: dict  # what this build was
    runs: list[dict]  # the kept runs
    peers: dict  # benchmarks/peers.json
    scaling: dict  # benchmarks/scaling.json
    page: str
    uri: Callable  # of a page of the book; None where it has no such page
    title: Callable  # of a page of the book

    def link(self, doc, text, fragment=""):
        """A link to a place in the book; the text alone where there is no such page."""
        uri = self.uri(doc)
        if uri is None:
            return text
        return f'<a href="{uri}{"#" * bool(fragment)}{fragment}">{text}</a>'

    def at_root(self, path, text):
        """A link to a file at the root of the site."""
        return f'<a href="{"../" * self.page.count("/")}{path}">{text}</a>'

    def place(self, name):
        """A link to where an ID is told of: a finding's entry, a statement's row."""
        claim = self.claims[name]
        if "nature" in claim:
            return self.link(ERRATA, name, f"errata-{name.lower()}")
        return self.link(SCOREBOARD, name, f"claim-{name}")

    def places(self, names):
        return ", ".join(map(self.place, names))


# --- Words and numbers ----------------------------------------------------------------


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
        return f"{x['count']} values, {number(x['least'])} to {number(x['greatest'])}"
    if not isinstance(x, list):
        return number(x)
    flat = np.ravel(np.array(x, dtype=object)).tolist()
    if len(flat) <= 3 or any(isinstance(v, (str, bool, type(None))) for v in flat):
        return ", ".join(map(number, flat[:4])) + (" …" if len(flat) > 4 else "")
    return f"{len(flat)} values, {number(min(flat))} to {number(max(flat))}"


def badge(word, more=""):
    kinds = f"verdict verdict-{word.replace(' ', '-')} {more}".strip()
    return f'<span class="{kinds}">{word}</span>'


def pending(claim):
    """The mark of a claim whose rows have not been gone over."""
    if claim["rejudged"] or claim.get("verdict") in (PENDING, "open"):
        return ""
    return f' <abbr class="ngd-pending" title="{PENDING}">°</abbr>'


def weight(claim):
    """One to three dots."""
    k = claim["weight"]
    return f'<span title="weight {k} of 3">{"●" * k}{"○" * (3 - k)}</span>'


def standing(claim):
    """Nature, and whether the rows show it."""
    word = badge(claim["nature"])
    return word + (
        "" if claim["standing"] == "shown" else " " + badge(claim["standing"])
    )


def table(head, rows, kind):
    """rows of cells that are HTML already, or pairs of a row's attributes and such."""

    def line(cells, tag):
        attributes, cells = (
            cells if isinstance(cells[1], (tuple, list)) else ("", cells)
        )
        inner = "".join(f"<{tag}>{c}</{tag}>" for c in cells)
        return f"<tr{attributes}>{inner}</tr>"

    return (
        f'<div class="ngd-table" tabindex="0"><table class="table {kind}">'
        f"<thead>{line(head, 'th')}</thead>"
        f"<tbody>{''.join(line(r, 'td') for r in rows)}</tbody></table></div>"
    )


def small(*parts):
    """What there is of some remarks, each on a line of its own."""
    return "".join(f"<small>{part}</small>" for part in parts if part)


# --- Scoreboard -----------------------------------------------------------------------


def statements(view):
    return [c for c in view.claims.values() if "nature" not in c]


def findings(view):
    return [c for c in view.claims.values() if "nature" in c]


HEAD = ("Statement", "What it says", "Here", "At paper scale", "On a GPU", "Findings")
NOT_YET, AS_HERE = "not yet", "as here"
STATES = {"yes": "", "not known": "its code is not known"}


def scoreboard(view, ids):
    """One row a statement, with the findings about it."""
    return where(view) + "".join(
        f'<h3 id="scoreboard-{paper}">{name}</h3>'
        + table(
            HEAD,
            [
                scoreboard_row(view, claim)
                for claim in statements(view)
                if claim["paper"] == paper
            ],
            "scoreboard",
        )
        for paper, name in PAPERS.items()
        if any(claim["paper"] == paper for claim in statements(view))
    )


def scoreboard_row(view, claim):
    name, about = claim["id"], [view.claims[i] for i in claim["findings"]]
    rests, used = view.places(claim["rests_on"]), view.places(claim["used_by"])
    runs = chapter_links(view, claim)
    says = escape(claim["title"]) + small(
        f"rests on {rests}" * bool(rests),
        f"used by {used}" * bool(used),
        f"computed in {runs}" * bool(runs),
    )
    here = badge(claim["verdict"]) + pending(claim)
    links = "".join(
        f'<div class="ngd-about">{view.place(c["id"])} {standing(c)}</div>'
        for c in about
    )
    place = f'<a href="#claim-{name}">{name}</a>' + small(escape(claim["at"]))
    cells = (place, says, here, kept(claim, "paper_scale"), kept(claim, "on_gpu"))
    return attributes(view, claim, about), (*cells, links or "–")


def standing_of(claim, key):
    """A statement's verdict at paper scale (``"paper_scale"``) or ``"on_gpu"``; that it
    is the one of this build where its chapters have one scale only; or not yet.
    """
    if claim[key]:
        return claim[key]["verdict"]
    single = key == "paper_scale" and claim["one_scale"]
    return AS_HERE if single else NOT_YET


def kept(claim, key):
    """That verdict as a cell, with device, scale, and what has changed since."""
    word, run = standing_of(claim, key), claim[key]
    if not run:
        return f'<span class="ngd-not-yet">{word}</span>'
    scale = ", ".join(s for s in run.get("scales", []) if s != "paper")
    return badge(word, "verdict-stale" * stale(claim, key)) + small(
        escape(", ".join(run["devices"])),
        f"{scale} scale" * bool(scale),
        escape(STATES.get(run["state"], run["state"])),
    )


def stale(claim, key):
    """Whether that verdict is of earlier code, package or data."""
    return bool(claim[key]) and claim[key]["state"].startswith("stale")


def where(view):
    """What the columns of verdicts speak of, and how many statements have each."""
    told, report = statements(view), view.report
    large, gpu = ([c for c in told if c[k]] for k in ("paper_scale", "on_gpu"))
    old = sum(stale(c, "paper_scale") for c in large)
    unsure = sum(c["paper_scale"]["state"] == "not known" for c in large)
    single = sum(standing_of(c, "paper_scale") == AS_HERE for c in told)
    names = dict.fromkeys(name for c in gpu for name in c["on_gpu"]["devices"])
    gpus = f" ({escape(', '.join(names))})" if names else ""
    return (
        f"<p>Here: {report['scale']} scale, on {escape(report['device'])}."
        f" At paper scale: {len(large)} of {len(told)} statements, {old} of them by"
        f" runs of earlier code and {unsure} by runs whose code is not known;"
        f" {single} more have one scale only. On a GPU: {len(gpu)}{gpus}.</p>"
    )


def attributes(view, claim, about):
    """What the page's script filters and sorts by."""
    values = {
        "paper": PAPERS.get(claim["paper"], claim["paper"]),
        "kind": claim["kind"],
        "verdict": claim["verdict"],
        "large": standing_of(claim, "paper_scale")
        + "|stale" * stale(claim, "paper_scale"),
        "gpu": standing_of(claim, "on_gpu") + "|stale" * stale(claim, "on_gpu"),
        "nature": "|".join(dict.fromkeys(c["nature"] for c in about)),
        "weight": str(max((c["weight"] for c in about), default="")),
        "device": "|".join(devices(claim)),
    }
    data = "".join(f' data-{k}="{escape(v)}"' for k, v in values.items())
    return f' id="claim-{claim["id"]}"{data}'


def devices(claim):
    """Those that the rows of a claim ran on, here and in kept runs."""
    runs = [claim[key] or {"devices": []} for key in ("paper_scale", "on_gpu")]
    named = [row["device"] for row in claim["rows"]]
    return list(dict.fromkeys(sum((run["devices"] for run in runs), named)))


def chapter_links(view, claim):
    """Links to the rows of a claim in its chapter."""
    return ", ".join(
        view.link(claim["chapter"], escape(row["part"] or claim["id"]), row["anchor"])
        for row in claim["rows"]
    )


# --- Findings -------------------------------------------------------------------------


def overview(view, ids):
    """The findings, natures apart, the weightiest first."""

    def line(claim):
        name = claim["id"]
        what = escape(claim["title"]) + small(
            f"{escape(claim['at'])}; about {view.places(claim['of'])}"
        )
        return f' id="claim-{name}"', (
            view.place(name) + small(weight(claim)),
            what,
            standing(claim) + small(assurance(view, claim)),
        )

    parts = []
    for nature, (plural, meaning) in NATURES.items():
        found = [c for c in findings(view) if c["nature"] == nature]
        if found:
            found.sort(key=lambda c: -c["weight"])
            parts.append(
                f'<h3 id="findings-{nature}">{plural.capitalize()}: {meaning}</h3>'
                + table(("Finding", "What", "How sure"), map(line, found), "findings")
            )
    return "".join(parts)


def assurance(view, claim):
    """How sure a finding is, with its certificate."""
    if not claim["certificate"]:
        return claim["sure"]
    path = f"certificates/{claim['certificate']}"
    return f"{claim['sure']}: {view.at_root(path, 'certificate')}"


def claim_rows(view, ids):
    """What the rows of some claims say."""
    if unknown := set(ids) - set(view.claims):
        raise ValueError(
            f"{view.page}: not in book/claims.yml: {', '.join(sorted(unknown))}"
        )
    return "".join(one_claim(view, view.claims[i]) for i in ids)


def one_claim(view, claim):
    rows = [row_cells(view, claim, row) for row in claim["rows"]]
    body = (
        table(("Row", "What was claimed, and what came out"), rows, "claims")
        if rows
        else "<p>No chapter has recorded it yet.</p>"
    )
    return f'<div class="ngd-claim">{heading(view, claim)}{body}</div>'


def heading(view, claim):
    """ID, verdict or nature, and what an ID is tied to."""
    name, title = claim["id"], escape(claim["title"])
    if "nature" not in claim:
        about = view.places(claim["findings"])
        told = f"findings: {about}" if about else ""
        words = badge(claim["verdict"]) + pending(claim)
        return f"<p>{view.place(name)} {words} {title} {small(told)}</p>"
    told = f"{assurance(view, claim)}; about {view.places(claim['of'])}"
    where = f"{weight(claim)} {told}"
    cited = cite(view, claim) if view.page == ERRATA else small(title)
    return f"<p>{view.place(name)} {standing(claim)} {small(where)}</p>{cited}"


def cite(view, claim):
    """How to cite an entry of the errata."""
    report = view.report
    text = (
        f"“{report['title']}”, version {report['version']}, {report['date']}"
        f" (commit {report['commit'] or 'unknown'}), finding {claim['id']}:"
        f" {claim['title']}. book/errata.html#errata-{claim['id'].lower()}"
    )
    return (
        '<details class="ngd-cite"><summary>Cite this</summary>'
        f"<p>{escape(text)}</p></details>"
    )


def row_cells(view, claim, row):
    """A row's name and outcome; its note, its numbers, and how it is judged."""
    name = claim["id"] + (f"/{row['part']}" if row["part"] else "")
    left = view.link(claim["chapter"], escape(name), row["anchor"])
    note = f"<p>{escape(row['note'])}</p>" if row["note"] else ""
    return left + small(badge(row["outcome"])), note + numbers(row) + judged(row)


def numbers(row):
    """Measured, predicted and printed, each in one piece."""
    relation = SIGNS[row["rel"]]
    parts = [
        f"measured {value(row['measured'])}",
        f"predicted {relation} {value(row['predicted'])}",
    ]
    if row["printed"] is not None:
        stands = "holds" if row["printed_holds"] else "fails"
        sign = SIGNS[row["printed_rel"]]
        parts.append(f"printed {sign} {value(row['printed'])}: {stands}")
    return '<p class="ngd-numbers">' + "; ".join(parts) + "</p>"


def judged(row):
    """Tolerance, slack, rivals and circumstances, folded."""
    facts = [f"Allowed: {row['allowed']}."]
    if row["slack"] is not None:
        facts.append(f"Slack of the bound: {number(row['slack'])}.")
    if row["tolerance_after_look"]:
        facts.append("The tolerance was set after a look at the run.")
    if row["blind"]:
        facts.append(f"It cannot tell from: {', '.join(row['blind'])}.")
    elif row["unlike"]:
        rivals = (f"{label} ({value(v)})" for label, v in row["unlike"].items())
        facts.append(f"It would have caught: {'; '.join(rivals)}.")
    elif loose(row):
        facts.append("Loose: nothing near would have been caught.")
    if row["sharp"]:
        facts.append(f"The sharp row beside it: {row['sharp']}.")
    facts.append(f"{row['scale']} scale, {row['dtype']}, on {row['device']}.")
    return (
        "<details><summary>how it is judged</summary>"
        f"<p>{escape(' '.join(facts))}</p></details>"
    )


def loose(row):
    """A bound with room to spare and no sharp row beside it."""
    room = row["slack"] is None or row["slack"] > 1.3
    return row["rel"] != "==" and room and not row["sharp"]


# --- Counts, runs, this build ---------------------------------------------------------


def tally(view, ids):
    """Statements by verdict and findings by nature, in two lines."""
    verdicts = [c["verdict"] for c in statements(view)]
    natures = [c["nature"] for c in findings(view)]
    standings = [c["standing"] for c in findings(view)]
    counted = ", ".join(
        f"{verdicts.count(v)} {badge(v)}"
        for v in view.report["verdicts"]
        if v in verdicts
    )
    found = ", ".join(f"{natures.count(n)} {badge(n)}" for n in NATURES if n in natures)
    rest = ", ".join(
        f"{standings.count(s)} {s}"
        for s in (PENDING, "not shown", "open")
        if s in standings
    )
    return (
        f'<p class="tally"><strong>{len(verdicts)} statements</strong> of the papers:'
        f" {counted}.</p>"
        f'<p class="tally"><strong>{len(natures)} findings</strong> about them:'
        f" {found}" + (f" (of these, {rest})" if rest else "") + ".</p>"
    )


def kept_runs(view, ids):
    """The long runs that are kept, with what they were made on and with."""

    def line(run):
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        page, script = run["page"], run["script"] or ""
        title = view.link(page, view.title(page)) if page else run["chapter"]
        return (
            title + small(escape(script)),
            escape(run["device"]) + small(escape(versions)),
            f"{run['seconds']:.0f}",
            run["date"] or "not known",
            run["state"],
        )

    head = ("Chapter", "Device", "Seconds", "Date", "Still what the code gives?")
    return table(head, map(line, view.runs), "runs")


def build_report(view, ids):
    report = view.report
    seconds = [
        (view.link(doc, view.title(doc)), f"{s:.1f}")
        for doc, s in report["seconds"].items()
        if s
    ]
    facts = [
        ("Version", f"{report['version']}, {report['date']}"),
        ("Commit", report["commit"] or "not known"),
        ("Scale", report["scale"]),
        ("Device", escape(report["device"])),
        ("Threads", str(report["threads"])),
        ("Seeds", ", ".join(map(str, report["seeds"])) or "–"),
        *report["versions"].items(),
    ]
    total = ("All chapters", f"{sum(s for s in report['seconds'].values() if s):.1f}")
    return table(("Fact", "This build"), facts, "facts") + table(
        ("Chapter", "Seconds"), [*seconds, total], "seconds"
    )


# --- Other libraries ------------------------------------------------------------------

TASKS = {
    "gram": "Gram matrix of the tangent kernel",
    "step": "A step of exact natural gradient",
    "kfac": "A step of K-FAC, with exact factors",
    "analytic": "Infinitely wide ReLU network of three layers",
}


def peers(view, ids):
    """A table a workload: each library's seconds, their ratio, error, memory."""
    measured = view.peers
    told = ", ".join(f"{k} {v}" for k, v in measured["versions"].items())
    parts = [workload(name, w) for name, w in measured["workloads"].items()]
    where = f"{measured['machine']}, one thread, {measured['date']}. {told}."
    return f"<p>{escape(where)}</p>" + "".join(parts)


def workload(name, work):
    """One workload: what it is, who does it, who does not."""
    found = work["libraries"]
    ran = {lib: f for lib, f in found.items() if "seconds" in f}
    ours = ran["ngdcore"]["seconds"]
    rows = [
        (
            lib,
            number(float(f"{f['seconds']:.3g}")),
            number(float(f"{f['seconds'] / ours:.2g}")),
            number(float(f"{f['error']:.1e}")),
            f"{f['extra_mb']:.0f}",
        )
        for lib, f in sorted(ran.items(), key=lambda item: item[1]["seconds"])
    ]
    head = ("Library", "Seconds", "Times ngdcore's", "Error", "MB more")
    size = "-".join(map(str, work.get("widths", []))) or "784 inputs"
    dtype = work.get("dtype", "float32")
    task, what = TASKS[work["kind"]], f"N = {work['n']}, {size}, {dtype}"
    without = (f"{lib}: {escape(f['why'])}" for lib, f in found.items() if "why" in f)
    return (
        f'<h3 id="bench-{name}">{task}</h3><p>{what}</p>'
        + table(head, rows, "peers")
        + small(f"Not among them: {'; '.join(without)}.")
    )


AXES = {"N": "samples", "M": "width", "L": "layers", "C": "outputs"}


def scaling(view, ids):
    """Measured exponents beside those of the operation counts."""
    measured = view.scaling
    head = ("", "From", "To", "Exponent", "Counted", "Seconds", "GFLOP/s", "MB more")
    rows = [
        (
            f"{TASKS[row['task']]}, in {AXES[row['axis']]}",
            *(f"{row[end]:,.0f}" for end in ("from", "to")),
            f"{row['seconds']:.2f}",
            f"{row['operations']:.2f}",
            number(float(f"{row['largest_s']:.3g}")),
            f"{row['gflops']:.0f}",
            "" if row["largest_mb"] is None else f"{row['largest_mb']:,.0f}",
        )
        for row in measured["exponents"]
    ]
    where = measured["where"]
    told = (
        f"{where['machine']}, one thread, {where['dtype']}, torch {where['torch']},"
        f" {where['date']}; a product of two matrices ran at"
        f" {max(p['rate'] for p in measured['points'].values()) / 1e9:.0f} GFLOP/s."
    )
    return f"<p>{escape(told)}</p>" + table(head, rows, "scaling")


def precision(view, ids):
    """Condition numbers, and what the two precisions make of them."""
    head = ("Distance", "Condition", "float64, residual", "float32, residual")
    head += ("float32, error",)
    keys = ("double_residual", "single_residual", "single_error")
    rows = [
        (
            *(number(float(f"{row[key]:.1e}")) for key in ("distance", "condition")),
            *(
                "no Cholesky factor"
                if row[key] is None
                else number(float(f"{row[key]:.0e}"))
                for key in keys
            ),
        )
        for row in view.scaling["precision"]
    ]
    return table(head, rows, "precision")


TABLES = {
    "peers": peers,
    "scaling": scaling,
    "precision": precision,
    "scoreboard": scoreboard,
    "findings": overview,
    "claims": claim_rows,
    "tally": tally,
    "kept-runs": kept_runs,
    "build-report": build_report,
}
