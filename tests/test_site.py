"""The built pages in a real browser: every page, at desk and phone width."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import CHAPTERS

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
WIDTHS = {"desk": 1280, "phone": 390}

FACTS = r"""async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const all = (q, f) => Array.from(document.querySelectorAll(q)).map(f).filter(Boolean);
  const shown = el => el.getClientRects().length > 0;
  const brief = el => (el.outerHTML || "").replace(/\s+/g, " ").slice(0, 160);

  // Text outside code and math that still looks like TeX.
  const walker = document.createTreeWalker(
    document.querySelector("main"), NodeFilter.SHOW_TEXT);
  const raw = [];
  for (let node; node = walker.nextNode();)
    if (!node.parentElement.closest("pre, code, script, style, mjx-container") &&
        /\\\(|\\\[|\$|\\[A-Za-z]{2,}/.test(node.data))
      raw.push(node.data.trim().slice(0, 120));

  // Formulas that MathJax could not read (undefined names come out red), or whose
  // macros print their own names.
  const wrong = all(
    "mjx-merror, [data-mjx-error], mjx-container [style*='red']", brief);
  for (const item of window.MathJax?.startup?.document?.math ?? []) {
    let text = "";
    item.root.walkTree(n => { if (n.kind === "text") text += n.getText(); });
    if (/operatorname|mathrm|mathbb|mathsf|lambda/.test(text)) wrong.push(text);
  }
  const untypeset = all("span.math, div.math",
    el => !el.querySelector("mjx-container") && brief(el));

  // Whatever sticks out must lie in a box that scrolls.
  const scrolls = el => /auto|scroll/.test(getComputedStyle(el).overflowX);
  const right = el => el.getBoundingClientRect().right;
  const boxed = el => {
    for (; el && el !== document.body; el = el.parentElement)
      if (scrolls(el) && right(el) <= innerWidth + 1) return true;
    return false;
  };
  const cut = el => el.scrollWidth > el.clientWidth + 1 && el.clientWidth > 0
    && el.matches("mjx-container[display=true], pre");
  const kinds = ["mjx-container", "pre", "table", "img", "svg"];
  const out = all(kinds.map(kind => "article " + kind).join(), el => shown(el)
    && (right(el) > innerWidth + 1 || cut(el)) && !boxed(el) && brief(el));

  return {raw, wrong, untypeset, out,
    page: [document.documentElement.scrollWidth, innerWidth],
    math: document.querySelectorAll("mjx-container").length,
    images: all("img", el => [el.getAttribute("alt") ?? "",
      !!el.closest(".cell_output"), el.complete && el.naturalWidth > 0])};
}"""


@pytest.fixture(scope="module")
def address(built):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(built[0]))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def visits(built, address, chromium):
    """{(page, width): facts}: what the browser found on every page of the site."""
    from playwright.sync_api import sync_playwright

    pages = sorted(
        p.relative_to(built[0]).as_posix()
        for p in built[0].rglob("*.html")
        if "_static" not in p.parts
    )
    assert pages
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, width in WIDTHS.items():
            context = browser.new_context(viewport={"width": width, "height": 900})
            for page in pages:
                found[page, name] = visit(context.new_page(), address, page)
            context.close()
        browser.close()
    return found


def visit(tab, address, page):
    errors, outside = [], []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    tab.on(
        "request",
        lambda r: (
            r.url.startswith((address, "data:", "blob:")) or outside.append(r.url)
        ),
    )
    tab.goto(address + page, wait_until="load")
    if page == "index.html":
        tab.wait_for_url("**/book/*.html")
    facts = tab.evaluate(FACTS) | {"errors": errors, "outside": outside}
    tab.close()
    return facts


def offenders(visits, key):
    return {place: facts[key] for place, facts in visits.items() if facts[key]}


@pytest.mark.parametrize(
    "fault", ["raw", "wrong", "untypeset", "errors", "outside", "out"]
)
def test_no_page_has(visits, fault):
    """raw TeX, formulas that failed, formulas left alone, script errors, requests
    elsewhere, things that stick out.
    """
    assert offenders(visits, fault) == {}


def test_math_is_there_at_all(visits):
    assert not [
        stem
        for stem in CHAPTERS
        if not visits[f"notebooks/{stem}.html", "desk"]["math"]
    ]


def test_no_page_is_wider_than_the_screen(visits):
    assert not [
        place for place, facts in visits.items() if facts["page"][0] > facts["page"][1]
    ]


def test_every_image_loads_and_has_an_alternative(visits):
    assert not [
        (place, alt)
        for place, facts in visits.items()
        for alt, _, loaded in facts["images"]
        if not alt.strip() or not loaded
    ]


def figures(visits):
    return [
        (page, alt)
        for (page, width), facts in visits.items()
        if width == "desk"
        for alt, computed, _ in facts["images"]
        if computed
    ]


def test_figures_say_their_axes_and_what_is_seen(visits):
    def says(alt):
        return len(alt) >= 40 and any(
            word in alt.lower() for word in ("axis", "axes", "against", "versus")
        )

    assert not [figure for figure in figures(visits) if not says(figure[1])]


def test_no_two_figures_read_alike(visits):
    alts = [alt for _, alt in figures(visits)]
    assert not {alt for alt in alts if alts.count(alt) > 1}


def test_nothing_was_executed_again(built):
    assert "Executing notebook" not in built[1]
    assert built[1].count("Using cached notebook") == len(CHAPTERS)
