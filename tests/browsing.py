"""One pass of a real browser over the built pages, for whoever asks: every page, at
desk and phone width, how it looks, how it is made up, and what axe says of it."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
WIDTHS = {"desk": 1280, "phone": 390}
TABS = 2  # pages that load at a time

FACTS = r"""async () => {
  if (document.readyState !== "complete")
    await new Promise(done => addEventListener("load", done));
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await new Promise(done => setTimeout(done));  // what waits for the formulas
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

  // The shape of the page: what comes first, what is code, what it ends with.
  const top = el => Math.round(el.getBoundingClientRect().top + scrollY);
  const visible = el => shown(el) && !el.closest("details:not([open])") &&
    !el.closest(".toggle-hidden");
  const lines = el =>
    (el.querySelector("pre") ?? el).textContent.replace(/\n+$/, "").split("\n");
  const shape = () => {
    const picture = Array.from(document.querySelectorAll(
      "article :is(figure, .cell_output img, .ngd-interactive, .dragq)"))
      .find(visible);
    const code = Array.from(document.querySelectorAll("article div.highlight"))
      .filter(el => !el.closest(".cell_output"));
    const open = code.filter(visible);
    const cells = open.filter(el => el.closest(".cell_input"));
    const tall = list => list.reduce((sum, el) => sum + el.offsetHeight, 0);
    const time = document.querySelector(".ngd-reading");
    return {picture: picture ? top(picture) : null,
      before: picture ? open.filter(el => el.compareDocumentPosition(picture) & 4)
        .map(brief) : [],
      share: tall(open) / (document.querySelector("article")?.offsetHeight || 1),
      cells: cells.map(el => lines(el).length),
      columns: Math.max(0, ...code.filter(el => el.closest(".cell_input"))
        .flatMap(lines).map(line => line.length)),
      sideways: all("article div.highlight pre",
        el => visible(el) && el.scrollWidth > el.clientWidth + 1 && brief(el)),
      headings: all("article h2", el => el.firstChild.textContent.trim()),
      minutes: time && parseInt(time.textContent),
      deep: !!document.querySelector(".ngd-deep")};
  };

  return {raw, wrong, untypeset, out,
    page: [document.documentElement.scrollWidth, innerWidth],
    math: document.querySelectorAll("mjx-container").length,
    tabs: all("mjx-container[tabindex]",
      el => el.scrollWidth <= el.clientWidth + 1 && brief(el)),
    hands: all(".js-plotly-plot", el => !!el.querySelector(".slider-group")),
    keys: all(".ngd-keys", el => el.querySelectorAll("input, select").length),
    ...shape(), images: all("img", el => [el.getAttribute("alt") ?? "",
      !!el.closest(".cell_output"), el.complete && el.naturalWidth > 0])};
}"""

# Axe looks at what a page says. Formulas are MathJax's, and of highlighted code two
# blocks stand for all: without them it takes a tenth of the time.
AXE = r"""async dark => {
  const set = theme => Object.assign(document.documentElement.dataset,
    {theme, mode: theme});
  if (!dark) {
    document.querySelectorAll("mjx-container").forEach(el => el.remove());
    Array.from(document.querySelectorAll("div.highlight pre")).slice(2)
      .forEach(el => { el.textContent = el.textContent; });
  }
  set(dark ? "dark" : "light");
  // A colour that is still fading into the other theme is neither's.
  document.documentElement.offsetHeight;
  document.getAnimations().filter(a => a instanceof CSSTransition)
    .forEach(a => a.finish());
  const options = dark ? {runOnly: ["color-contrast"]} : {};
  const found = await axe.run({...options, resultTypes: ["violations"]});
  return found.violations
    .filter(v => ["serious", "critical"].includes(v.impact))
    .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 160)]);
}"""


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
            context = browser.new_context(viewport={"width": width, "height": 800})
            for start in range(0, len(pages), TABS):
                some = pages[start : start + TABS]
                tabs = [Tab(context.new_page(), address, page) for page in some]
                found |= {(tab.page, name): tab.facts() for tab in tabs}
            context.close()
        browser.close()
    return found


class Tab:
    """A page that begins to load at once, and is asked later."""

    def __init__(self, tab, address, page):
        self.tab, self.page, self.errors, self.outside = tab, page, [], []
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.on("requestfailed", lambda r: self.errors.append(f"failed: {r.url}"))
        tab.on(
            "request",
            lambda r: (
                r.url.startswith((address, "data:", "blob:"))
                or self.outside.append(r.url)
            ),
        )
        tab.goto(address + page, wait_until="commit")
        if page == "index.html":
            tab.wait_for_url("**/book/*.html")

    def facts(self):
        facts = self.tab.evaluate(FACTS)
        self.tab.evaluate(axe())
        facts |= {"axe": self.tab.evaluate(AXE, False)}
        facts |= {"axe_dark": self.tab.evaluate(AXE, True)}
        self.tab.close()
        return facts | {"errors": self.errors, "outside": self.outside}


@functools.cache
def axe():
    path = files("axe_playwright_python").joinpath("axe.min.js")
    return path.read_text(encoding="utf8")
