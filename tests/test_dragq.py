"""Drag Q: its numbers against ngdcore's, its network against ngdcore's, and the figure
itself under mouse, finger and keyboard. A page of its own is served, so that no chapter
runs.
"""

import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dragq
import numpy as np
import pytest
import torch
from browsing import FLAGS

import ngdcore as ngd

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "book" / "assets"
PAGE = """<!doctype html><html lang="en" data-theme="{theme}"><head>
<meta charset="utf-8"><title>Drag Q</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/css/dragq.css"><script src="/dragq.js" defer></script>
</head><body style="margin: 16px"><main>{body}</main></body></html>"""
FISHERS = {
    "exact": ngd.fisher.Exact(),
    "block-diagonal": ngd.fisher.BlockDiagonal(),
    "block-tridiagonal": ngd.fisher.BlockTridiagonal(),
    "k-fac": ngd.fisher.KFAC(),
}
# method, depth, cosine, damping, step (in units of the best), start, star
SETTINGS = [
    ("gd", 2, 0.9, 0.0, 1.0, [-1.3, 0.2], [0.7, -0.6]),
    ("gd", 4, 0.99, 0.0, 0.5, [0.1, 1.9], [-1.2, 0.3]),
    ("exact", 2, 0.9, 0.0, 0.9, [-1.3, 0.2], [0.7, -0.6]),
    ("exact", 3, 0.3, 0.1, 1.0, [1.0, 1.0], [-1.0, 1.0]),
    ("block-diagonal", 3, 0.7, 0.0, 1.2, [0.5, -1.5], [0.0, 0.4]),
    ("block-diagonal", 5, 0.95, 1.0, 0.8, [-1.0, -1.0], [1.5, 0.5]),
    ("block-tridiagonal", 5, 0.6, 0.0, 0.7, [-0.4, 1.2], [0.9, -0.2]),
    ("block-tridiagonal", 4, 0.8, 10.0, 0.4, [-0.4, 1.2], [0.9, -0.2]),
    ("k-fac", 3, 0.9, 0.0, 1.0, [-1.6, 0.3], [1.1, 1.0]),
    ("k-fac", 4, 0.5, 0.01, 1.5, [0.2, 0.2], [-0.7, 1.8]),
]


class Pages(SimpleHTTPRequestHandler):
    """The book's assets, and /page/<theme>?<attributes of the element>."""

    def do_GET(self):
        if not self.path.startswith("/page/"):
            return super().do_GET()
        theme = self.path.rsplit("/", 1)[-1]
        chosen = {"methods": " ".join(dragq.METHODS), "controls": "method depth"}
        body = dragq.raw({}).astext() + dragq.raw(chosen).astext()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.format(theme=theme, body=body).encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Pages, directory=str(ASSETS))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """visit(theme, width, ...) -> tab with two figures; at the end no error, no request
    elsewhere.
    """
    wrong, contexts = [], []

    def visit(theme="light", width=1280, **options):
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, **options))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("requestfailed", lambda request: wrong.append(request.url))
        tab.on(
            "request",
            lambda r: r.url.startswith((address, "data:")) or wrong.append(r.url),
        )
        tab.goto(f"{address}page/{theme}")
        tab.wait_for_selector(".dq-bars rect")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def numbers(browser, address):
    """numbers(call, argument): what the first figure's element.dragq answers."""
    tab = browser.new_page()
    tab.goto(f"{address}page/light")
    tab.wait_for_selector(".dq-bars rect")
    figure = "document.querySelector('.dragq').dragq"
    yield lambda call, x: tab.evaluate(f"argument => {figure}.{call}", x)
    tab.close()


def settings(method, depth, cosine, damping, step, start, star):
    chosen = dict(method=method, depth=depth, cosine=cosine, damping=damping)
    return chosen | dict(step=step, start=start, star=star, steps=30)


def images(cosine):
    """Two inputs of norm 1 at this cosine, (2, 2)."""
    sine = (1 - cosine**2) ** 0.5
    return torch.tensor([[1, 0], [cosine, sine]], dtype=torch.float64)


def column(pair):
    return torch.tensor(pair, dtype=torch.float64)[:, None]


def coefficient(method, depth, cosine, damping):
    factors = ngd.kernels.analytic(images(cosine), depth)
    if method == "gd":
        return factors.gram() / 2
    return FISHERS[method].coefficient(factors, damping)


@pytest.mark.parametrize("case", SETTINGS, ids=lambda c: f"{c[0]}-{c[1]}-{c[3]:g}")
def test_path_ellipse_and_bars_are_those_of_ngdcore(numbers, case):
    method, depth, cosine, damping, step, start, star = case
    found = numbers("compute(argument)", settings(*case))
    Q = coefficient(method, depth, cosine, damping)
    values = torch.linalg.eigvalsh(Q)
    eta = step * 2 / float(values.min() + values.max())
    path = ngd.dynamics.trajectory(Q, column(start), column(star), eta, 30)[..., 0]
    circle = torch.arange(73, dtype=torch.float64) * torch.pi / 36
    ellipse = torch.stack([circle.cos(), circle.sin()], 1) @ Q.T
    bars = (1 - eta * values).abs().sort().values
    for name, expected in {"Q": Q, "path": path, "ellipse": ellipse}.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sorted(found["factors"]), bars, rtol=0, atol=1e-9)
    assert found["eta"] == pytest.approx(eta, rel=1e-9)


def test_steps_to_one_percent_are_counted_on_the_path(numbers):
    for case in SETTINGS:
        found = numbers("compute(argument)", settings(*case) | {"steps": 2000})
        errors = np.linalg.norm(np.array(found["path"]) - case[-1], axis=1)
        small = (errors <= 0.0100001 * errors[0]).nonzero()[0]
        assert found["stepsTo1Percent"] == (small[0] if len(small) else np.inf)


def reference_run(layers, chosen, steps):
    """The same training by ngdcore: an MLP with these weights; its path, (T, 2)."""
    width, depth, x = chosen["width"], chosen["depth"], images(chosen["cosine"])
    net = ngd.models.MLP([2, *[width] * (depth - 1), 1])
    with torch.no_grad():
        for parameter, W in zip(net.parameters(), layers):
            parameter.copy_(torch.tensor(W, dtype=torch.float64).view_as(parameter))
        shift = column(chosen["start"]) - net(x)
    target, path = column(chosen["star"]) - shift, []
    if chosen["method"] == "gd":
        opt = torch.optim.SGD(net.parameters(), lr=chosen["eta"])
    else:
        fisher, damping = FISHERS[chosen["method"]], chosen["damping"]
        opt = ngd.optim.NaturalGradient(net, fisher, lr=chosen["eta"], damping=damping)
    for _ in range(steps + 1):
        f = net(x)
        path.append((f.detach() + shift)[:, 0])
        if chosen["method"] != "gd":
            opt.step(x, target)
            continue
        opt.zero_grad()
        ((f - target).square().sum() / 4).backward()
        opt.step()
    return torch.stack(path)


@pytest.mark.parametrize("depth, damping", [(2, 0.0), (2, 0.1), (3, 0.0), (5, 0.0)])
@pytest.mark.parametrize("method", dragq.METHODS)
def test_the_network_trains_as_ngdcores_does(numbers, method, depth, damping):
    chosen = settings(method, depth, 0.6, damping, 0.3, [-0.5, 0.2], [0.3, 0.1])
    if (method, depth, damping) == ("block-tridiagonal", 2, 0.1):
        chosen["damping"] = 0.5
    chosen |= {"width": 24, "steps": 6}
    chosen["eta"] = numbers("compute(argument)", chosen)["eta"]
    script = "network(24, argument, 0).map(layer => Array.from(layer.W))"
    expected = reference_run(numbers(script, depth), chosen, 6)
    found = numbers("train(argument)", chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["gd", "exact", "block-diagonal", "k-fac"])
def test_a_wide_network_stays_on_the_line_and_a_narrow_one_does_not(numbers, method):
    off = {}
    chosen = settings(method, 2, 0.6, 0.0, 0.5, [-1.3, 0.2], [0.7, -0.6])
    line = np.array(numbers("compute(argument)", chosen)["path"])
    for width in (16, 16384):
        run = numbers("train(argument)", chosen | {"width": width})
        off[width] = np.abs(np.array(run) - line[: len(run)]).max()
    assert off[16384] < 0.05 < 0.15 < off[16]


def look(tab):
    """What is drawn: path, its real dots, ellipse, handles, bars, words."""
    return tab.evaluate("""() => {
      const figure = document.querySelector(".dragq");
      const all = (query, name) =>
        Array.from(figure.querySelectorAll(query), e => e.getAttribute(name));
      return {path: all(".dq-path", "points"), real: all(".dq-real", "points"),
        ellipse: all(".dq-shape", "points"), bars: all(".dq-bars rect", "width"),
        start: all(".dq-start", "aria-valuetext"),
        star: all("g.dq-star", "aria-valuetext"),
        settings: figure.dragq.settings};
    }""")


def settled(tab, before, names):
    """What is drawn, once all of these have changed."""
    for _ in range(40):
        now = look(tab)
        if all(now[name] != before[name] for name in names):
            return now
        tab.wait_for_timeout(25)
    raise AssertionError([name for name in names if now[name] == before[name]])


def by_mouse(tab, handle, by):
    box = handle.locator(".dq-mark").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + by[0], y + by[1], steps=4)
    tab.mouse.up()


def by_touch(tab, handle, by):
    """A finger's events as the device sends them; the page must not scroll under it."""
    box = handle.locator(".dq-mark").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    client = tab.context.new_cdp_session(tab)

    def send(kind, *points):
        touches = [{"x": px, "y": py} for px, py in points]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    send("touchStart", (x, y))
    for k in range(1, 5):
        send("touchMove", (x + by[0] * k / 4, y + by[1] * k / 4))
    send("touchEnd")


def by_keyboard(tab, handle, by):
    handle.focus()
    for key in ["ArrowRight", "ArrowUp", "Shift+ArrowUp"]:
        tab.keyboard.press(key)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("hand", [by_mouse, by_touch, by_keyboard])
def test_start_and_target_move(visit, hand, theme, width):
    tab = visit(theme, width, has_touch=hand is by_touch)
    for name, kind in (("start", ".dq-start"), ("star", "g.dq-star")):
        handle = tab.locator(".dragq").first.locator(kind)
        handle.scroll_into_view_if_needed()
        before, scrolled = look(tab), tab.evaluate("scrollY")
        hand(tab, handle, (60, -50))
        tab.wait_for_timeout(100)
        after = settled(tab, before, ["path", name])
        moved = np.subtract(after["settings"][name], before["settings"][name])
        unit = 97 / 440 * tab.locator(".dq-plane").first.bounding_box()["width"]
        by = (0.1, 0.11) if hand is by_keyboard else (60 / unit, 50 / unit)
        np.testing.assert_allclose(moved, by, rtol=0, atol=0.021)
        assert after["ellipse"] == before["ellipse"]  # Q does not know the target
        assert tab.evaluate("scrollY") == scrolled


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_controls_turn_path_and_ellipse_by_keyboard(visit, theme, width):
    tab = visit(theme, width)
    figure = tab.locator(".dragq").first
    for name, key in (
        ("likeness", "ArrowLeft"),
        ("step", "ArrowLeft"),
        ("damping", "End"),
    ):
        before = look(tab)
        figure.locator(f".dq-control-{name} input").press(key)
        settled(tab, before, ["path", "ellipse", "bars"])
    before = look(tab)
    figure.locator("select").select_option("k-fac")
    after = settled(tab, before, ["path", "ellipse"])
    assert after["settings"]["method"] == "k-fac" and not after["real"]
    figure.locator(".dq-control-width input").press("ArrowLeft")
    assert len(settled(tab, after, ["real"])["real"]) == 1


def test_tab_reaches_handles_and_controls_and_shows_the_focus(visit):
    tab, seen = visit(), []
    for _ in range(13):
        tab.keyboard.press("Tab")
        seen.append(
            tab.evaluate("""() => {
          const e = document.activeElement, ring = e.querySelector(".dq-focus");
          const style = getComputedStyle(ring ?? e);
          const name = e.getAttribute("aria-label");
          return [name ?? e.closest("label, button").textContent,
            ring ? style.stroke !== "none" : style.outlineStyle === "solid"];
        }""")
        )
    assert all(ring for _, ring in seen)
    text = " ".join(name for name, _ in seen)
    for word in ("Start", "Target", "Method", "Likeness", "Step", "Damping", "width"):
        assert word in text
    assert seen[-1][0] == "Reset"


def test_buttons_say_what_is_seen_and_reset_undoes(visit):
    tab = visit(reduced_motion="reduce")  # no gliding: the end at once
    figure, start = tab.locator(".dragq").first, look(tab)
    buttons = figure.locator(".dq-try button")
    for k in range(buttons.count() - 1):
        buttons.nth(k).click()
        assert len(figure.locator(".dq-tip").inner_text()) > 30
        assert look(tab) != start
    buttons.last.click()
    tab.wait_for_timeout(100)
    assert look(tab) == start and figure.locator(".dq-tip").inner_text() == ""


def test_a_button_glides_where_motion_is_welcome(visit):
    seen = visit().evaluate("""async () => {
      const figure = document.querySelector(".dragq"), seen = [];
      figure.querySelector(".dq-try button").click();
      while (!figure.querySelector(".dq-tip").textContent) {
        await new Promise(requestAnimationFrame);
        seen.push(figure.dragq.settings.cosine);
      }
      return seen;
    }""")
    assert seen == sorted(seen) and any(0.9 < c < 0.98 for c in seen)
    assert seen[-1] == 0.98


def test_figures_of_a_page_are_apart(visit):
    tab = visit()
    second = tab.locator(".dragq").nth(1)
    assert second.locator("select option").count() == len(dragq.METHODS)
    assert second.locator("input").count() == 1
    before = look(tab)
    second.locator("input").press("End")
    tab.wait_for_timeout(100)
    assert look(tab) == before
    ids = tab.evaluate("Array.from(document.querySelectorAll('[id]'), e => e.id)")
    assert len(ids) == len(set(ids))


def luminance(colour):
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts
    ]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_in_both_themes(visit, theme):
    tab = visit(theme)
    for method in dragq.METHODS:
        tab.locator("select").nth(1).select_option(method)
        words = tab.evaluate("""() => {
          const of = e => getComputedStyle(e);
          const back = of(document.querySelector(".dq")).backgroundColor;
          const words = ".dragq p, .dq-word, .dq-say, .dq text, .dq button";
          return Array.from(document.querySelectorAll(words), e =>
            [e.textContent, e.tagName === "text" ? of(e).fill : of(e).color, back]);
        }""")
        for text, colour, back in words:
            light, dark = sorted([luminance(colour), luminance(back)], reverse=True)
            # the page's own text colours come with its theme, which is not here
            if theme == "dark" and colour in ("rgb(34, 40, 50)", "rgb(72, 86, 107)"):
                continue
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (method, text, colour)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_everything_has_a_name(visit, width):
    tab = visit("light", width)
    facts = tab.evaluate("""() => ({
      wide: [document.documentElement.scrollWidth, innerWidth],
      unnamed: Array.from(document.querySelectorAll(
          ".dragq, svg, input, select, button, [role=slider]"), e =>
        e.getAttribute("aria-label") || e.labels?.[0]?.textContent ||
        e.textContent.trim()).filter(name => !name).length,
      short: Array.from(document.querySelectorAll("svg text"), e =>
        e.getBoundingClientRect().height).filter(height => height < 11).length,
    })""")
    assert facts["wide"][0] <= facts["wide"][1]
    assert facts["unnamed"] == 0 and facts["short"] == 0


def test_print_has_the_figure_without_its_controls(visit):
    tab = visit()
    tab.emulate_media(media="print")
    assert tab.locator(".dq-plane").first.is_visible()
    for part in (".dq-controls", ".dq-try", ".dq-tip"):
        assert not tab.locator(part).first.is_visible()


def test_without_script_a_paragraph_tells_what_is_shown(browser, address):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{address}page/light")
    assert "natural gradient goes straight" in tab.locator(".dragq").first.inner_text()
    context.close()


def test_the_digits_are_mnists():
    data = ngd.data.mnist(classes=(4, 9), n_train=2000, n_test=1, norm=None)
    art = re.findall(
        r'"([.0-9a-f]{20}) ([.0-9a-f]{20})"', (ASSETS / "dragq.js").read_text()
    )
    for k, (digit, which) in enumerate(((4, 82), (9, 974))):
        image = data.x[data.labels == digit][which].view(28, 28)[4:26, 4:24]
        drawn = [[int(x.replace(".", "0"), 16) for x in rows[k]] for rows in art]
        assert drawn == (15 * image).round().int().tolist()


def build(folder, text):
    """A Sphinx project of one page; its HTML and what was complained of."""
    from io import StringIO

    from sphinx.application import Sphinx

    (folder / "conf.py").write_text(
        "extensions = ['myst_parser', 'dragq']\nnumfig = True\n"
    )
    (folder / "index.md").write_text(text)
    (folder / "other.md").write_text("---\norphan: true\n---\n# Other\n")
    out, complaints = folder / "out", StringIO()
    app = Sphinx(
        folder, folder, out, out / "trees", "html", status=None, warning=complaints
    )
    app.build()
    pages = [(out / f"{name}.html").read_text() for name in ("index", "other")]
    return *pages, complaints.getvalue()


def test_the_directive_makes_a_figure_that_is_numbered_and_loads_its_script(tmp_path):
    page, other, complaints = build(
        tmp_path,
        """# Page

```{dragq}
:name: fig-dragq
:methods: gd exact k-fac
:depth: 3
:start: -1 0.5

A caption with $x$.
```

See {numref}`fig-dragq`.
""",
    )
    assert complaints == ""
    assert (
        'class="dragq" data-depth="3" data-methods="gd exact k-fac" data-start="-1 0.5"'
        in page
    )
    assert "A caption with" in page and 'href="#fig-dragq"' in page and "Fig. 1" in page
    assert "dragq.js" in page and "css/dragq.css" in page and "dragq" not in other


@pytest.mark.parametrize(
    "option", [":methods: adam", ":depth: 0", ":start: 1", ":colour: red"]
)
def test_a_wrong_option_is_refused(tmp_path, option):
    complaints = build(tmp_path, f"# Page\n\n```{{dragq}}\n{option}\n```\n")[2]
    assert option.split()[0].strip(":") in complaints
