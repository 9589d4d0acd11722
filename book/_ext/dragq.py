"""The directive that puts Drag Q on a page: one figure for the one idea of the book.

    ```{dragq}
    :name: fig-dragq
    :methods: gd exact block-diagonal k-fac
    :depth: 3

    The caption.
    ```

The figure itself is book/assets/dragq.js with css/dragq.css. Each option becomes the
data attribute of that name, and what is left out has the default of OPTIONS there; a
page that has no figure loads neither file."""

from html import escape

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

METHODS = ("gd", "exact", "block-diagonal", "block-tridiagonal", "k-fac")
CONTROLS = ("method", "likeness", "step", "damping", "width", "depth")
STILL = (
    "This figure answers to a hand, by a script that is not running here. It shows two"
    " paths in the plane of a network's outputs on two images, from a start to a"
    " target. The natural gradient goes straight; gradient descent zig-zags and creeps,"
    " the more so the more the two images are alike."
)


def words_of(allowed):
    """A check of an option: words, each of which is allowed."""

    def check(argument):
        words = (argument or "").split()
        if not words or set(words) - set(allowed):
            raise ValueError(f"takes words of: {' '.join(allowed)}")
        return " ".join(words)

    return check


def numbers(count, least=float("-inf"), most=float("inf")):
    """A check of an option: so many numbers, each within the limits."""

    def check(argument):
        found = [float(word) for word in (argument or "").split()]
        if len(found) != count or not all(least <= x <= most for x in found):
            raise ValueError(f"takes {count} number(s) from {least:g} to {most:g}")
        return " ".join(f"{x:g}" for x in found)

    return check


class DragQ(SphinxDirective):
    """A figure with the element, and the content as its caption."""

    has_content = True
    option_spec = {
        "name": directives.unchanged,
        "methods": words_of(METHODS),
        "controls": words_of(CONTROLS),
        "method": lambda argument: directives.choice(argument, METHODS),
        "compare": lambda argument: directives.choice(argument, ("gd", "none")),
        "unit": lambda argument: directives.choice(argument, ("best", "eta")),
        "depth": numbers(1, 1, 8),
        "likeness": numbers(1, 0.05, 0.99),
        "step": numbers(1, 0.05, 2),
        "damping": numbers(1, 0, 10),
        "width": numbers(1, 8, 16384),
        "start": numbers(2, -1.95, 1.95),
        "star": numbers(2, -1.95, 1.95),
    }

    def run(self):
        chosen = {k: v for k, v in self.options.items() if k != "name"}
        figure = nodes.figure("", raw(chosen), classes=["dragq-figure"])
        figure["dragq"] = True
        if self.content:
            caption = self.parse_content_to_nodes()
            figure += nodes.caption("", "", *caption[0].children)
            figure += nodes.legend("", *caption[1:]) if caption[1:] else []
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure]


def raw(chosen):
    """The element, as HTML; without the script it is a paragraph."""
    data = "".join(f' data-{k}="{escape(v)}"' for k, v in sorted(chosen.items()))
    still = f'<p class="dragq-static">{STILL}</p>'
    return nodes.raw("", f'<div class="dragq"{data}>{still}</div>', format="html")


def load(app, pagename, templatename, context, doctree):
    """Script and style for the pages that have the figure, and for no others."""
    figures = doctree.findall(nodes.figure) if doctree else ()
    if any(figure.get("dragq") for figure in figures):
        app.add_js_file("dragq.js", loading_method="defer")
        app.add_css_file("css/dragq.css")


def setup(app):
    app.add_directive("dragq", DragQ)
    app.connect("html-page-context", load)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
