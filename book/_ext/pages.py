"""What every page gets without its author: the time it takes to read, the ledger of a
chapter folded at its end, printed words that wrap.

Reading time counts what is open: words of text and captions, lines of code that nobody
has to unfold. A chapter over the limit, or in the part of that name, is marked as a
deep dive."""

import re
from math import ceil
from pathlib import Path

import yaml
from companion import Deferred, kept
from docutils import nodes

WORDS, LINES, LIMIT = 200, 20, 20  # a minute; and minutes of an ordinary chapter
DEEP = "Deep dives"
HIDDEN = {"dropdown", "toggle"}
LEAVES = (nodes.paragraph, nodes.title, nodes.caption, nodes.term)
READ, FILLED = 400, 600  # before and after the rows of a page are known


def is_chapter(env):
    """Whether the page in hand is one: a notebook of the folder of chapters."""
    ran = "exec_data" in getattr(env, "nb_metadata", {}).get(env.docname, {})
    return env.docname.startswith("notebooks/") and ran


def deep_dives(root):
    """Pages of the part that one may skip."""
    toc = yaml.safe_load(Path(root, "_toc.yml").read_text(encoding="utf8"))
    parts = [p for p in toc.get("parts", []) if p.get("caption") == DEEP]
    return {item["file"] for part in parts for item in part["chapters"]}


# --- Reading time ---------------------------------------------------------------------


def folded(node):
    """Whether a reader has to open something to see a node."""
    while node is not None:
        if isinstance(node, nodes.Element):
            classes = set(node.get("classes", ()))
            if classes & HIDDEN or node.get("design_component") == "dropdown":
                return True
            if "remove-cell" in classes or "remove-input" in classes:
                return True
        node = node.parent
    return False


def words(doctree):
    """Words of text that is not folded; a formula within a line is one."""
    count = 0
    for leaf in doctree.findall(lambda n: isinstance(n, LEAVES)):
        if not folded(leaf):
            inline = list(leaf.findall(nodes.math))
            count += len(leaf.astext().split()) + len(inline)
            count -= sum(len(math.astext().split()) for math in inline)
    return count


def code_lines(doctree):
    """Lines of code that stand open."""

    def shut(block):
        cell = block.parent
        while cell is not None and "cell" not in cell.get("classes", ()):
            cell = cell.parent
        return cell is not None and cell.get("hide_mode") in {"all", "input"}

    blocks = [b for b in doctree.findall(nodes.literal_block) if not folded(b)]
    return sum(
        bool(line.strip())
        for block in blocks
        if not shut(block) and "output" not in block["classes"]
        for line in block.astext().split("\n")
    )


def say_time(app, doctree):
    """A line below the title."""
    if not is_chapter(app.env):
        return
    minutes = ceil(words(doctree) / WORDS + code_lines(doctree) / LINES)
    line = nodes.paragraph("", f"{minutes} minutes", classes=["ngd-reading"])
    if minutes > LIMIT or app.env.docname in deep_dives(app.srcdir):
        line += nodes.inline("", "deep dive", classes=["ngd-deep"])
    title = next(doctree.findall(nodes.title))
    title.parent.insert(title.parent.index(title) + 1, line)


# --- The ledger of a chapter ----------------------------------------------------------


def claims_of(doctree):
    return [n for n in doctree.findall(Deferred) if n["table"] == "claims"]


def ledger_section(doctree):
    """The page's own section of that name, or a new one at its end."""
    home = next(doctree.findall(nodes.section))
    sections = [n for n in home.children if isinstance(n, nodes.section)]
    for section in sections:
        if re.fullmatch(r"(the )?ledger", section[0].astext(), re.I):
            return section
    section = nodes.section("", nodes.title("", "Ledger"), ids=["ledger"])
    home += section
    return section


def add_ledger(app, doctree):
    """A table of the chapter's rows, where its author left none."""
    if is_chapter(app.env) and not claims_of(doctree):
        section = ledger_section(doctree)
        section += Deferred(table="claims", ids=[])
        kept(app.env)["tables"].add(app.env.docname)


def fold_ledger(app, doctree):
    """The last table of rows is closed, and has all IDs that no other one has."""
    tables = claims_of(doctree)
    if not is_chapter(app.env) or not tables:
        return
    *others, last = tables
    rows = kept(app.env)["rows"].get(app.env.docname, [])
    found = dict.fromkeys(row["id"] for row in rows)
    shown = {i for table in others for i in table["ids"]}
    last["ids"] = [i for i in dict.fromkeys([*last["ids"], *found]) if i not in shown]
    if not last["ids"]:
        last.parent.remove(last)
        return
    summary = f"Every number of this chapter beside its prediction ({len(rows)})"
    fold = f'<details class="ngd-ledger"><summary>{summary}</summary>'
    around = [nodes.raw("", html, format="html") for html in (fold, "</details>")]
    last.replace_self([around[0], last.deepcopy(), around[1]])


# --- What cells print -----------------------------------------------------------------


def let_words_wrap(app, doctree, docname):
    """Printed text wraps at any width, unless its columns are aligned: that scrolls."""
    for block in doctree.findall(nodes.literal_block):
        if "output" in block["classes"]:
            aligned = re.search(r"\S {2,}\S", block.astext())
            block["classes"].append("ngd-columns" if aligned else "ngd-words")


def drop_list_role(app, pagename, templatename, context, doctree):
    """Docutils calls the bibliography a list, of which no entry is an item."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )


def setup(app):
    app.setup_extension("companion")
    app.connect("html-page-context", drop_list_role)
    app.connect("doctree-read", add_ledger, priority=READ)
    app.connect("doctree-read", say_time, priority=READ)
    app.connect("doctree-read", fold_ledger, priority=FILLED)
    app.connect("doctree-resolved", let_words_wrap)
    app.add_js_file("pages.js", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
