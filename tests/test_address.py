"""How a reader gets to a place: addresses, search, names in code, notebooks to take
away; and what the page on speed shows."""

import json
import re
from types import SimpleNamespace

import address
import pytest
import tables
from conftest import CHAPTERS, ROOT

PEERS = json.loads((ROOT / "benchmarks" / "peers.json").read_text(encoding="utf8"))

OTHERWISE = {  # conjugate gradients that stop; least squares that cut off
    ("step-1024", "curvlinops"),
    ("step-1024-double", "curvlinops"),
    ("kfac-2048", "nngeometry"),
}


# --- Without a build ------------------------------------------------------------------


def test_the_environment_says_where_the_book_stands(monkeypatch):
    theme = {"repository_url": "https://github.com/a/b"}
    config = SimpleNamespace(html_theme_options=theme, html_baseurl="https://a.io/b/")
    for name in ("NGD_REPOSITORY", "NGD_SITE"):
        monkeypatch.delenv(name, raising=False)
    assert [*address.published(config).values()] == [
        "https://github.com/a/b",
        "https://a.io/b",
    ]
    monkeypatch.setenv("NGD_SITE", "https://c.org/book/")
    app, config.html_title = SimpleNamespace(), "A book"
    address.configure(app, config)
    assert config.html_baseurl == config.ogp_site_url == "https://c.org/book/"
    assert config.notfound_urls_prefix == "/book/"
    assert app.ngd_addresses["https://a.io/b/"] == "https://c.org/book"


def test_each_library_agrees_with_the_dense_result():
    """Those that compute the same, do; what is left is rounding."""
    for name, work in PEERS["workloads"].items():
        for library, found in work["libraries"].items():
            if "error" in found and (name, library) not in OTHERWISE:
                assert found["error"] < 2e-3, (name, library)


def test_ngdcore_is_ahead_or_close():
    for name, work in PEERS["workloads"].items():
        seconds = {
            k: f["seconds"] for k, f in work["libraries"].items() if "error" in f
        }
        assert seconds["ngdcore"] < 1.1 * min(seconds.values()), name


def test_the_page_tells_who_is_not_measured_and_why():
    view = SimpleNamespace(peers=PEERS)
    html = tables.peers(view, [])
    for work in PEERS["workloads"].values():
        assert all(f.get("why", "") in html for f in work["libraries"].values())


# --- In the built book ----------------------------------------------------------------


@pytest.fixture(scope="module")
def search(built):
    text = (built[0] / "searchindex.js").read_text(encoding="utf8")
    return json.loads(text.removeprefix("Search.setIndex(").rstrip(";\n").rstrip(")"))


@pytest.mark.parametrize(
    "words, page, anchor",
    [
        ("K-X1", "book/errata", "errata-k-x1"),
        ("Z-T1", "book/scoreboard", "claim-Z-T1"),
        ("Theorem 5", "book/scoreboard", "claim-Z-T5"),
    ],
)
def test_the_search_takes_claims_to_their_place(built, search, words, page, anchor):
    places = search["indexentries"][words.lower()]
    assert [search["docnames"].index(page), anchor, True] in places
    assert f'id="{anchor}"' in (built[0] / f"{page}.html").read_text(encoding="utf8")


def test_names_in_code_lead_to_the_api(built):
    api = (built[0] / "book/api.html").read_text(encoding="utf8")
    for stem in CHAPTERS:
        html = (built[0] / f"notebooks/{stem}.html").read_text(encoding="utf8")
        links = re.findall(r'<a class="sphinx-codeautolink-a"[^>]*href="([^"]+)"', html)
        ours = [link.split("#")[1] for link in links if "book/api.html#" in link]
        assert len(ours) >= 5, stem
        assert all(f'id="{name}"' in api for name in ours), stem


def test_the_button_gives_the_notebook_that_runs_elsewhere(built):
    for stem in CHAPTERS:
        given = built[0] / "_sources" / "notebooks" / f"{stem}.ipynb"
        assert given.read_bytes() == (ROOT / "notebooks" / given.name).read_bytes()


def test_pages_say_what_they_are_to_others(built):
    html = (built[0] / "notebooks/01_quickstart.html").read_text(encoding="utf8")
    for tag in ("og:title", "og:description", "og:url", 'rel="icon"', "description"):
        assert tag in html, tag
    assert "favicon.svg" in html and (built[0] / "404.html").exists()
