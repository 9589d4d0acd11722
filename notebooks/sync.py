"""Make the .ipynb beside each chapter from its MyST Markdown, one way, for Colab,
Binder and GitHub.

    python notebooks/sync.py            write them
    python notebooks/sync.py --check    exit 1 where one is missing, stale, or the
    Markdown would be misread

Code cells are kept as they are. In the text, directives and roles become plain
Markdown, references become words, and the macros of _config.yml are written out. What
this file does not know it refuses, so that nothing is lost quietly.

Chapters, figures, theorems and displays carry the numbers that the book gives them: the
chapter's own, which its file begins with, and the place within the chapter."""

import hashlib
import re
import sys
from functools import cache
from pathlib import Path

import jupytext
import nbformat
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
ADDRESS = CONFIG["repository"]["url"]
BLOB = f"{ADDRESS}/blob/{CONFIG['repository']['branch']}/"
RAW = f"{ADDRESS}/raw/{CONFIG['repository']['branch']}/"
PAGES = CONFIG["html"]["baseurl"].rstrip("/")
MACROS = CONFIG["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]

INSTALL = f"""# Made for this notebook alone: where the book's package is missing, as on
# Colab, fetches it with what the chapters use.
from importlib.util import find_spec

if find_spec("ngdcore") is None:
    %pip install -q "ngdcore[notebooks] @ git+{ADDRESS}\""""

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|:{3,}|~{3,})"
    r"(?:\{(?P<name>[\w:.-]+)\})? *(?P<argument>.*)$"
)
ROLE = re.compile(
    r"\{(?P<name>[a-z][\w:.-]*)\}(?P<tick>`+)(?P<text>.+?)(?P=tick)", re.S
)
TARGET = re.compile(r"^\((?P<label>[\w:.-]+)\)= *$")
DOLLARS = re.compile(r"\$\$(?P<tex>.+?)\$\$(?: *\((?P<label>[\w:.-]+)\))?", re.S)
# Whatever holds backticks: fenced code, a role, inline code. Only what lies between is
# text.
TICKS = re.compile(
    r"^ *(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence) *$|" + ROLE.pattern + r"|`[^`\n]+`",
    re.S | re.M,
)
NOTES = set(
    "note tip hint important warning caution attention danger error seealso".split()
)
DROPPED = set("tableofcontents scoreboard tally build-report index raw".split())
FIGURES = r"^[`:]{3,}\{(?:figure|dragq)\}.*\n(?::(?!name)\w+:.*\n)*:name: *(\S+)"
UNCOUNTED = {"proof"}  # every other kind of statement is counted by one counter
REFERRING = {"eq", "ref", "numref", "prf:ref", "math:numref"}
CITING = {"cite:t", "cite:p", "cite", "cite:ts", "cite:ps"}
CODE = {"func", "class", "meth", "mod", "file", "code"}


def chapters():
    return sorted((ROOT / "notebooks").glob("*.md"))


def number_of(path):
    """A chapter's number, with which its file begins; "" for other pages."""
    found = re.match(r"(\d+)_", path.name)
    return str(int(found[1])) if found else ""


def within(path, place):
    """13.4: the fourth of its kind in chapter 13; plain where a page has no number."""
    return ".".join(filter(None, [number_of(path), str(place)]))


def cells_of(path):
    return jupytext.read(path, fmt="md:myst").cells


# --- What is referred to --------------------------------------------------------------


@cache
def labels():
    """{label: (file, what it reads as)} over the chapters and the prose pages."""
    found = {}
    for path in [*chapters(), *sorted((ROOT / "book").glob("*.md"))]:
        text = path.read_text(encoding="utf8")
        for label, heading in re.findall(r"^\(([\w:.-]+)\)= *\n+#+ (.+)$", text, re.M):
            found[label] = path, heading.strip()
        for place, label in enumerate(equation_labels(text), 1):
            found[label] = path, f"({within(path, place)})"
        for place, label in enumerate(figure_names(path), 1):
            found[label] = path, f"Figure {within(path, place)}"
        place = 0
        for kind, options in statements(text):
            numbered = kind not in UNCOUNTED and "nonumber" not in options
            place += numbered
            if "label" in options:
                number = [within(path, place)] if numbered else []
                found[options["label"]] = path, " ".join([kind.capitalize(), *number])
    return found


def equation_labels(text):
    """In order of appearance, as Sphinx counts them."""
    pattern = re.compile(
        r"\$\$ *\(([\w:.-]+)\)"
        r"|^[`:]{3,}\{math\}.*\n(?::(?!label)\w+:.*\n)*:label: *(\S+)",
        re.M,
    )
    return [a or b for a, b in pattern.findall(text)]


def statements(text):
    """(kind, options) of every theorem, lemma, proof ..., in order."""
    pattern = r"^ *[`:]{3,}\{prf:(\w+)\}.*\n((?: *:[\w-]+:.*\n)*)"
    for kind, options in re.findall(pattern, text, re.M):
        yield kind, dict(re.findall(r"^ *:([\w-]+): *(.*?) *$", options, re.M))


def figure_names(path):
    """Names of figures in order: those of code cells (mystnb metadata) and of
    directives.
    """
    for cell in cells_of(path):
        if cell.cell_type == "code":
            yield from filter(
                None, [cell.metadata.get("mystnb", {}).get("figure", {}).get("name")]
            )
        else:
            yield from re.findall(FIGURES, cell.source, re.M)


@cache
def bibliography():
    return parse_file(str(ROOT / "book" / "references.bib")).entries


def citation(key, parenthesis):
    entry = bibliography()[key]
    names = [
        " ".join(p.prelast_names + p.last_names).strip("{}")
        for p in entry.persons["author"]
    ]
    who = (
        names[0] + " et al."
        if len(names) > 3
        else " and ".join([", ".join(names[:-1]), names[-1]][len(names) == 1 :])
    )
    return (
        f"{who}, {entry.fields['year']}"
        if parenthesis
        else f"{who} ({entry.fields['year']})"
    )


def title(path):
    return re.search(r"^# (.+)$", path.read_text(encoding="utf8"), re.M)[1].strip()


def reference(label, path):
    """What a label reads as; a number with a chapter in it needs no more words."""
    where, text = labels()[label]
    here = where == path or re.search(r"\d\.\d", text)
    return text if here else f"{text} of “{title(where)}”"


# --- Roles ----------------------------------------------------------------------------


def role(match, path):
    name, text = match["name"], match["text"].strip()
    if named := re.fullmatch(r"(.+?)\s*<(.+)>", text, re.S):
        shown, target = named.groups()
        return shown.replace("%s", labels().get(target, (path, target))[1].split()[-1])
    if name in REFERRING:
        return reference(text, path)
    if name == "doc":
        return f"“{title(inside(text, path).with_suffix('.md'))}”"
    if name in CITING:
        brackets = name not in {"cite:t", "cite:ts"}
        cited = [citation(key.strip(), brackets) for key in text.split(",")]
        return f"({'; '.join(cited)})" if brackets else ", ".join(cited)
    if name.startswith("glue"):
        return "(the number printed by the cell)"
    if name == "math":
        return f"${text}$"
    if name.startswith("py:") or name in CODE:
        return f"`{text.lstrip('~')}`"
    if name in {"sub", "sup"}:
        return f"<{name}>{text}</{name}>"
    raise ValueError(
        f"{path.name}: notebooks/sync.py does not know the role {{{name}}}"
    )


# --- Directives -----------------------------------------------------------------------


def split_options(body):
    options = {}
    while body and (match := re.match(r"^:([\w-]+): *(.*)$", body[0])):
        options[match[1]] = match[2].strip()
        body = body[1:]
    return options, body


def quote(lines):
    """A blockquote; displays in it go on one line, for notebooks read the > of a second
    one as part of the formula.
    """
    text = DOLLARS.sub(lambda m: f"$${' '.join(m['tex'].split())}$$", "\n".join(lines))
    text = re.sub(r"\n{3,}", "\n\n", text.strip("\n"))
    return [f"> {line}".rstrip() for line in text.split("\n")]


def details(summary, lines):
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def display(tex, label, path):
    tag = rf" \tag{{{reference(label, path).strip('()')}}}" if label else ""
    return f"$$\n{tex.strip()}{tag}\n$$"


def directive(name, argument, body, path):
    """A directive as lines of plain Markdown."""
    options, body = split_options(body)
    if name == "math":
        tex = "\n".join([argument, *body])
        return display(tex, options.get("label"), path).split("\n")
    if name in {"code", "code-block", "literalinclude"}:
        return [f"```{argument}", *body, "```"]
    if name in {"figure", "image"}:
        image = [f"![{options.get('alt', '')}]({address(argument, path, RAW)})"]
        if name == "image":
            return image
        number = [reference(options["name"], path) + ". "] if "name" in options else []
        return [*image, "", "*" + " ".join(number + body) + "*"]
    if name == "dragq":
        return moving(options, body, path)
    if name == "claims":
        rows = ", ".join(argument.split())
        return [f"*(The built book shows the ledger rows of {rows} here.)*"]
    if name in DROPPED:
        return []
    return wrapped(name, argument, options, lower_lines(body, path), path)


def moving(options, body, path):
    """A figure that answers to a hand has its place in the built book only."""
    number = [reference(options["name"], path) + "."] if "name" in options else []
    words = " ".join([*number, *body]).strip()
    where = f"[In the built book]({page(path)}) this figure answers to a hand."
    return [*([f"*{words}*", ""] if words else []), where]


def wrapped(name, argument, options, inner, path):
    """A directive around text that is plain Markdown already."""
    folded = name == "admonition" and "dropdown" in options.get("class", "")
    if name == "dropdown" or folded:
        return details(argument, inner)
    if name.startswith("prf:"):
        kind = name[4:].capitalize()
        head = reference(options["label"], path) if "label" in options else kind
        ending = [] if kind != "Proof" else ["", "∎"]
        who = f" ({argument})" if argument else ""
        return quote([f"**{head}{who}.**", "", *inner, *ending])
    if name in NOTES:
        kind = name.capitalize().replace("Seealso", "See also")
        return quote([f"**{kind}.** {argument}".rstrip(), "", *inner])
    if name in {"admonition", "tab-item", "card"}:
        return quote([f"**{argument}**", "", *inner])
    if name in {"margin", "sidebar", "epigraph"}:
        return quote([*([f"**{argument}**", ""] if argument else []), *inner])
    if name in {"tab-set", "grid", "div", "list-table"}:
        return inner
    raise ValueError(
        f"{path.name}: notebooks/sync.py does not know the directive {{{name}}}"
    )


def lower_lines(lines, path):
    """Directives become plain Markdown, from the outside in; the rest passes."""
    out, i = [], 0
    while i < len(lines):
        line, match = lines[i], FENCE.match(lines[i])
        i += 1
        if TARGET.match(line) or line.startswith("% "):
            continue
        if not match or (match["fence"][0] == ":" and not match["name"]):
            out.append(line)
            continue
        closing = re.compile(rf" *{match['fence']}{match['fence'][0]}* *")
        end = next(
            (j for j in range(i, len(lines)) if closing.fullmatch(lines[j])),
            len(lines) - 1,
        )
        body, i = lines[i:end], end + 1
        if match["name"]:
            body = [b.removeprefix(match["indent"]) for b in body]
            plain = directive(match["name"], match["argument"].strip(), body, path)
            out += [match["indent"] + p if p else p for p in plain]
        else:
            out += [line, *body, lines[end]]
    return out


# --- The rest of the text -------------------------------------------------------------


def inside(target, path):
    """The file that a page means: from the root where it begins with a slash."""
    home = ROOT if target[0] == "/" else path.parent
    return (home / target.lstrip("/")).resolve()


def address(target, path, base):
    return base + inside(target, path).relative_to(ROOT).as_posix()


def page(path):
    """Where the built page stands."""
    return f"{PAGES}/{path.relative_to(ROOT).with_suffix('.html').as_posix()}"


def links(text, path):
    """Links to our own pages: whole addresses, to the .ipynb of a chapter."""

    def point(match):
        target, anchor = match[2], match[3] or ""
        name = address(target, path, BLOB)
        if "/notebooks/" in name:
            name = name.replace(".md", ".ipynb")
        return f"[{match[1]}]({name}{anchor})"

    text = re.sub(
        r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+\.md)(#[^)]*)?\)", point, text
    )
    return re.sub(
        r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)",
        lambda m: f"![{m[1]}]({address(m[2], path, RAW)})",
        text,
    )


def write_out(text):
    """Macros by their definition. \\operatorname too: GitHub does not allow it."""
    for name, tex in MACROS.items():
        text = re.sub(rf"\\{name}(?![A-Za-z])", lambda m, tex=tex: tex, text)
    return re.sub(r"\\operatorname\*?\{([^}]*)\}", r"\\mathop{\\mathrm{\1}}", text)


def words(text, path):
    return write_out(links(re.sub(r"\{[.#][\w .#-]+\}", "", text), path))


def lower(text, path):
    text = DOLLARS.sub(
        lambda m: display(m["tex"], m["label"], path) if m["label"] else m[0], text
    )
    text = "\n".join(lower_lines(text.split("\n"), path))
    out, at = [], 0
    for match in TICKS.finditer(text):
        out += [
            words(text[at : match.start()], path),
            write_out(role(match, path)) if match["name"] else match[0],
        ]
        at = match.end()
    return "".join([*out, words(text[at:], path)]).strip("\n")


def caption(cell, path):
    """The figure caption that the book takes from the cell's metadata, as a cell of
    text.
    """
    figure = cell.metadata.get("mystnb", {}).get("figure", {})
    if "caption" not in figure:
        return []
    number = reference(figure["name"], path) + ". " if "name" in figure else ""
    return [
        nbformat.v4.new_markdown_cell(
            lower(f"*{number}{figure['caption'].strip()}*", path)
        )
    ]


# --- The notebook ---------------------------------------------------------------------


def headed(text, path):
    """The first cell, with the chapter's number, and the way to the built page."""
    lead = f"*[The built page]({page(path)}) has every number, figure and verdict.*"
    head = rf"# {number_of(path)} \1\n\n{lead}"
    return re.sub(r"^# (.+)$", head, text, count=1, flags=re.M)


def convert(path):
    nb = jupytext.read(path, fmt="md:myst")
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = lower(cell.source, path)
            if not cells:
                cell.source = headed(cell.source, path)
        if cell.source or cell.cell_type == "code":
            cells.append(cell)
        cells += caption(cell, path)
    first = next(i for i, cell in enumerate(cells) if cell.cell_type == "code")
    cells.insert(
        first, nbformat.v4.new_code_cell(INSTALL, metadata={"tags": ["install"]})
    )
    for i, cell in enumerate(cells):
        cell.id = hashlib.sha1(f"{path.stem}:{i}".encode()).hexdigest()[:8]
    nb.cells = cells
    nb.metadata.pop("jupytext", None)
    nb.nbformat_minor = 5
    nbformat.validate(nb)
    return nbformat.writes(nb, indent=1) + "\n"


def faults(path):
    """What MyST misreads without a warning, and statements that cannot be counted."""

    def blank(match):  # code may say what it likes
        return "\n" * match[0].count("\n")

    text = path.read_text(encoding="utf8")
    text = re.sub(
        r"^ *(`{3,})(?!\{(?!code)).*?^ *\1 *$|`[^`\n]+`", blank, text, flags=re.S | re.M
    )
    inside, above = False, ""
    for i, line in enumerate(text.split("\n"), 1):
        line = line.strip(" >")
        if (
            line.startswith("$$")
            and not inside
            and above
            and not above.startswith((":", "`", "("))
        ):
            yield f"{path.name}:{i}: a display needs a blank line before it"
        if not inside and not line.startswith("$$") and "$$" in line:
            yield f"{path.name}:{i}: a display begins its line"
        if re.match(r"\\begin\{(align|equation|gather)\}", line) and not inside:
            yield (
                f"{path.name}:{i}: number displays by $$ ... $$ (label), with aligned"
                " inside"
            )
        inside ^= line.count("$$") % 2 == 1
        above = line
    yield from uncounted(path, text)


def uncounted(path, text):
    """The book numbers these; without a label the .ipynb cannot."""
    for kind, options in statements(text):
        if kind not in UNCOUNTED and "label" not in options:
            yield f"{path.name}: a {kind} without a label"
    for cell in cells_of(path) if path.parent.name == "notebooks" else ():
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if "caption" in figure and "name" not in figure:
            yield f"{path.name}: a figure without a name: {figure['caption'][:40]}"


def main(check):
    wrong = [
        fault
        for path in [*chapters(), *(ROOT / "book").glob("*.md")]
        for fault in faults(path)
    ]
    for path in chapters():
        made, target = convert(path), path.with_suffix(".ipynb")
        same = target.exists() and target.read_text(encoding="utf8") == made
        if check and not same:
            wrong.append(f"stale: {target.relative_to(ROOT)}; run `make sync`")
        elif not same:
            target.write_text(made, encoding="utf8")
    sources = {p.stem for p in chapters()}
    wrong += [
        f"no source: {p.name}"
        for p in (ROOT / "notebooks").glob("*.ipynb")
        if p.stem not in sources
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
