"""The report in one HTML file: it needs nothing else, and its tables are sorted by a click, tried in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.training.scripts.test_report import write_evaluation, write_run
from train.report import report
from visionpos.training.reports.html import html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three encodings and two seeds, with two sizes."""
    folder = tmp_path_factory.mktemp("report")
    for encoding, right in (("none", 160), ("rope_axial", 240), ({"name": "learned", "init_std": 0.5}, 200)):
        for seed in (0, 1):
            write_evaluation(write_run(folder, encoding, seed), [("scale", [16, 24], right)])
    report([folder / "runs"], None, [], None)
    return (folder / "runs" / "report" / "report.html").read_text()


class Checker(HTMLParser):
    """Collects what a page would fetch, and holds every element to be closed."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.count = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [value for key, value in attributes if key in ("src", "href", "xlink:href", "data", "action")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(reference.startswith("#") for reference in checker.fetched)  # within the page: parts of its figures
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp|<link", page)
    assert checker.count["svg"] == 2
    assert checker.count["table"] == 4
    assert "<td>learned(init_std=0.5)</td>" in page


def test_names_are_escaped():
    row = {"setting": {}, "encoding": "<b>", "options": "a|b & c", "tuned": {}, "seeds": [0], "difference": {}}
    accuracy = {"mean": 0.5, "low": None, "high": None, "per_seed": {0: 0.5}}
    content = {
        "rows": [row | {"accuracy": {"test": accuracy}, "parameters": 5, "encoding_parameters": 0}],
        **{"sizes": [], "parts": ["test"], "varied": [], "tuned": [], "baseline": None, "compared": 0, "runs": 1},
        **{"fewest_seeds": 1, "chance": 0.1, "weights": "raw", "hardware": ["CPU"], "versions": [], "unfinished": []},
        "data": {"name": "<script>", "test_size": 3, "note": ""},
    }
    page = html(content)
    assert "<td>&lt;b&gt;</td>" in page
    assert "a|b &amp; c" in page
    assert page.count("<script>") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page's script is not run")
@pytest.mark.parametrize(
    ("clicks", "order"),
    [
        ([], ["rope_axial", "learned(init_std=0.5)", "none"]),
        (["encoding"], ["rope_axial", "none", "learned(init_std=0.5)"]),
        (["encoding", "encoding"], ["learned(init_std=0.5)", "none", "rope_axial"]),
        (["accuracy, %", "accuracy, %"], ["none", "learned(init_std=0.5)", "rope_axial"]),
        (["above none"], ["rope_axial", "learned(init_std=0.5)", "none"]),
        (["above none", "above none"], ["learned(init_std=0.5)", "rope_axial", "none"]),
    ],
    ids=lambda value: ", ".join(value) or "as it is",
)
def test_a_click_on_a_head_sorts_its_table(clicks, order, page, tmp_path):
    press = "".join(
        f'[...document.querySelectorAll("th button")].find(b => b.textContent === "{name}").click();' for name in clicks
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{press}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    rows = re.search(r"<tbody>(.*?)</tbody>", done.stdout, re.S)[1]
    assert re.findall(r"<tr><td>(.*?)</td>", rows) == order
