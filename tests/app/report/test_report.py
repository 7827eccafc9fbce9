"""The HTML report: one file, nothing fetched, nothing interpreted, every number there."""

from __future__ import annotations

import html
import re
import shutil
from html.parser import HTMLParser

import pytest

from depthscope.app.readings.readings import read_paths, read_runs
from depthscope.app.report.report import to_html, write_report
from depthscope.diagnostics import save_run
from tests.few_figures import draw_few

EVIL = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture(scope="module")
def page(make_run):
    runs = {"plain": make_run("residual", layers=2, gradients=False), EVIL: make_run("hc", layers=2)}
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch, every=5)
        return to_html(read_runs(runs))


class Elements(HTMLParser):
    """Collect tags with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements(page):
    parser = Elements()
    parser.feed(page)
    return parser.found


def test_nothing_is_fetched_and_nothing_runs(page, elements):
    assert "script-src 'none'" in html.unescape(page)
    assert not [tag for tag, _ in elements if tag in ("script", "link", "iframe", "object", "img")]
    links = [
        value
        for _, attrs in elements
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)", page)
    assert not [attrs for _, attrs in elements if any(name.startswith("on") for name in attrs)]


def test_ids_are_unique_and_links_land(elements):
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for tag, attrs in elements if tag == "a"}
    assert targets <= set(ids)


def test_every_figure_has_a_text_alternative(elements):
    drawings = [attrs for tag, attrs in elements if tag == "svg"]
    assert len(drawings) > 10
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)


def test_findings_provenance_and_sources_are_there(page):
    assert "synthetic-hc" in page
    assert "roy2007effective" in page
    assert "depthscope" in page
    assert page.count("<h2>") == 8  # the verdicts of all runs come first


@pytest.mark.usefixtures("few_figures")
def test_written_whole_or_not_at_all(make_run, tmp_path, monkeypatch):
    runs = {"plain": make_run("residual", layers=2)}
    path = write_report(runs, tmp_path / "deep" / "report.html")
    before = path.read_text()
    with pytest.raises(ValueError, match="HTML"):
        write_report(runs, tmp_path / "report.pdf")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("depthscope.app.report.report.to_html", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(runs, path)
    assert path.read_text() == before


@pytest.mark.usefixtures("few_figures")
def test_only_a_report_is_replaced(make_run, tmp_path, monkeypatch):
    runs = {"plain": make_run("residual", layers=2)}
    path = tmp_path / "index.html"
    path.write_text("<html><title>my home page</title></html>")
    with monkeypatch.context() as patch:
        patch.setattr("depthscope.app.report.report.to_html", lambda *_, **__: pytest.fail("analysed first"))
        with pytest.raises(FileExistsError, match=r"not a report of depthscope.*--force"):
            write_report(runs, path)
    assert "my home page" in path.read_text()
    write_report(runs, path, force=True)
    write_report(runs, path)
    assert "my home page" not in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["index.html"]


@pytest.mark.browser
def test_a_browser_shows_it_without_a_request(page, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    (tmp_path / "r.html").write_text(page)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        tab = browser.new_page()
        asked: list[str] = []
        said: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.goto((tmp_path / "r.html").as_uri())
        assert tab.locator("figure svg").count() > 10
        browser.close()
    assert asked == [(tmp_path / "r.html").as_uri()]
    assert said == []


@pytest.mark.usefixtures("few_figures")
def test_a_report_does_not_say_where_its_runs_are(make_run, tmp_path):
    folder = tmp_path / "a private folder"
    folder.mkdir()
    run = make_run("hc", layers=2)
    run["trace"]["h_res"].load().values[:] *= 4  # the product of the mixing explodes
    save_run(run, folder / "loud run.zarr.zip")
    readings, _ = read_paths([str(folder / "loud run.zarr.zip")])
    page = to_html(readings)
    assert "depthscope" in page
    commands = re.findall(r"<code>(depthscope [^<]*)</code>", html.unescape(page))
    assert any("'loud run.zarr.zip'" in command for command in commands)
    assert str(tmp_path) not in html.unescape(page)
    assert folder.name not in html.unescape(page)
