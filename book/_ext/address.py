"""How a reader gets to a place: the site's address, the search, and each chapter's
.ipynb.

The addresses of repository and site stand in _config.yml; who publishes elsewhere sets
NGD_REPOSITORY and NGD_SITE, as the workflow of the pages does. Then links, social tags,
the page for wrong addresses and the notebooks to download lead there."""

import os
import re
from pathlib import Path
from urllib.parse import urlparse

from companion import is_finding, kept
from docutils import nodes
from sphinx.addnodes import index
from tables import ERRATA, SCOREBOARD

AFTER_TABLES = 600  # of those who listen to the same event
LOST = "<h1>No such page</h1><p>The list of pages and the search know all.</p>"


def published(config):
    """{what _config.yml says: what is true here}, of repository and site."""
    said = config.html_theme_options["repository_url"], config.html_baseurl
    named = os.environ.get("NGD_REPOSITORY"), os.environ.get("NGD_SITE")
    return {a: (b or a).rstrip("/") for a, b in zip(said, named)}


def configure(app, config):
    """Addresses for whoever prints one."""
    app.ngd_addresses = published(config)
    repository, site = app.ngd_addresses.values()
    config.html_theme_options["repository_url"] = repository
    config.html_baseurl = config.ogp_site_url = site + "/"
    config.ogp_site_name = config.html_title
    config.notfound_context = {"title": "No such page", "body": LOST}
    if os.environ.get("NGD_SITE"):
        config.notfound_urls_prefix = urlparse(site).path.rstrip("/") + "/"


def describe_by_words(app, pagename, templatename, context, doctree):
    """A description of a page begins with its text, not with the time it takes."""
    time = r'(content=")\d+ minutes(?: ?deep dive)? '
    context["metatags"] = re.sub(time, r"\1", context.get("metatags") or "")


# --- Search ---------------------------------------------------------------------------


def terms(name, claim):
    """What one may look for: the ID, and a statement by the paper's own words."""
    place = [] if is_finding(claim) else [claim["at"]]
    return [name, *place]


def entries(claims, docname):
    """(word, anchor) of the claims that are told of on a page."""
    for name, claim in claims.items():
        home = ERRATA if is_finding(claim) else SCOREBOARD
        anchor = f"errata-{name.lower()}" if is_finding(claim) else f"claim-{name}"
        if home == docname:
            yield from ((word, anchor) for word in terms(name, claim))


def add_to_search(app, doctree, docname):
    """The search knows what an index has, and takes a word of it to its anchor."""
    found = list(entries(kept(app.env)["claims"], docname))
    if found:
        words = [("single", word, anchor, "main", None) for word, anchor in found]
        doctree += nodes.paragraph("", "", index(entries=words), classes=["ngd-index"])


# --- Names in code --------------------------------------------------------------------


def note_page(app, pagename, templatename, context, doctree):
    """A page that is written in this build."""
    app.ngd_written.add(pagename)


def link_all_written(app, exception):
    """sphinx-codeautolink puts its links into pages that were read again; those that
    were only written again, for their tables, have lost theirs."""
    for listener in app.events.listeners["build-finished"]:
        linker = getattr(listener.handler, "__self__", None)
        if hasattr(linker, "outdated_docs"):
            linker.outdated_docs |= app.ngd_written


# --- Notebooks to download ------------------------------------------------------------


def bring_notebooks(app, exception):
    """The .ipynb that runs elsewhere, in place of the one that this build executed."""
    if exception is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.srcdir, "notebooks").glob("*.ipynb")):
        target = Path(app.outdir, "_sources", "notebooks", path.name)
        if target.exists():
            text = path.read_text(encoding="utf8")
            for said, true in app.ngd_addresses.items():
                text = text.replace(said.rstrip("/"), true)
            target.write_text(text, encoding="utf8")


def setup(app):
    app.setup_extension("companion")
    app.ngd_written = set()
    app.connect("config-inited", configure, priority=900)
    app.connect("html-page-context", note_page)
    app.connect("html-page-context", describe_by_words, priority=900)
    app.connect("build-finished", link_all_written, priority=100)
    app.connect("doctree-resolved", add_to_search, priority=AFTER_TABLES)
    app.connect("build-finished", bring_notebooks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
