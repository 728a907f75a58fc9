"""The explorer asks nothing of any address, and shows the kernel's own numbers, tried by clicks in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
import torch

import visionpos as vp
from visionpos.__main__ import main
from visionpos.analysis import explorer, kernel

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
GRID = (3, 5)
NAMES = ["sincos2d", "rope_axial", "alibi2d", "lookhere"]


@pytest.fixture(scope="module")
def page():
    return explorer.explorer(NAMES, GRID)


def content(page):
    return json.loads(re.search(r"^const CONTENT = (.*);$", page, re.M)[1])


def test_the_page_fetches_nothing(page):
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|fetch\(|XMLHttp|<link", page)
    assert list(content(page)) == NAMES


def test_every_encoding_is_on_a_page_of_less_than_6_mb(tmp_path, capsys):
    assert main(["explore", "--output", str(tmp_path / "all.html")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert set(content(page)) == set(vp.list_encodings()) - {"none"}
    assert len(page) < 6_000_000
    assert main(["explore", "none", "--output", str(tmp_path / "none.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_of_offsets_is_kept_only_where_it_is_the_whole_kernel():
    positions = kernel.exact_grid(GRID)
    found = {}
    for name in NAMES:
        whole = kernel.logit_kernel(kernel.exact(kernel.build(name, GRID)), positions)
        table = found[name] = explorer.by_offset(whole, GRID)
        for query, key in ((0, 14), (7, 7), (11, 3)) if table is not None else ():
            dy, dx = (positions.coords[key] - positions.coords[query]).long().tolist()
            torch.testing.assert_close(table[:, dy + 2, dx + 4], whole[:, query, key])
    assert {name for name in NAMES if found[name] is not None} == {"sincos2d", "rope_axial", "alibi2d", "lookhere"}
    learned = kernel.logit_kernel(kernel.exact(kernel.build("learned", GRID)), positions)
    assert explorer.by_offset(learned, GRID) is None


PICK = """
const pick = (side, select, text) => {
  const found = document.querySelectorAll("section")[side].querySelector("." + select);
  found.selectedIndex = [...found.options].findIndex(option => option.text.startsWith(text));
  found.dispatchEvent(new Event("change"));
};
const click = (side, y, x, h, w) => {
  const canvas = document.querySelectorAll("canvas")[side], box = canvas.getBoundingClientRect();
  const at = { clientX: box.left + (x + 0.5) * box.width / w, clientY: box.top + (y + 0.5) * box.height / h };
  canvas.dispatchEvent(new MouseEvent("click", at));
};
const press = (side, key) =>
  document.querySelectorAll("canvas")[side].dispatchEvent(new KeyboardEvent("keydown", { key }));
"""


def said(page, folder, script):
    """What both sides say after a script of clicks."""
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{PICK}{script}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return re.findall(r"<output>(.*?)</output>", done.stdout)


def row(name, token, heads=slice(None), grid=GRID, extrapolate=None, **options):
    """K of a token: of itself, of the first and of the last token, mean of the heads that see them; and the range."""
    encoding = kernel.exact(kernel.build(name, GRID, **options))
    if extrapolate:
        encoding.extrapolate = True
    whole = kernel.logit_kernel(encoding, kernel.exact_grid(grid))[heads]
    at = token[0] * grid[1] + token[1]
    return [whole[:, at, key].where(whole[:, at, key].isfinite(), torch.nan).nanmean().item() for key in (at, 0, -1)]


CASES = [
    ("", 0, (1, 2), GRID, {"name": "sincos2d"}),
    ("", 1, (1, 2), GRID, {"name": "rope_axial"}),
    ("click(0, 2, 1, 3, 5);", 0, (2, 1), GRID, {"name": "sincos2d"}),
    ("click(0, 2, 1, 3, 5);", 1, (2, 1), GRID, {"name": "rope_axial"}),
    ("press(1, 'ArrowLeft'); press(1, 'ArrowUp');", 0, (0, 1), GRID, {"name": "sincos2d"}),
    ("pick(1, 'name', 'alibi2d'); pick(1, 'head', '1');", 1, (1, 2), GRID, {"name": "alibi2d", "heads": slice(1, 2)}),
    ("pick(1, 'name', 'alibi2d'); pick(1, 'head', 'mean');", 1, (1, 2), GRID, {"name": "alibi2d"}),
    ("pick(1, 'temperature', '10');", 1, (1, 2), GRID, {"name": "rope_axial", "temperature": 10.0}),
    ("pick(0, 'view', 'twice, inter');", 0, (1, 2), (6, 10), {"name": "sincos2d"}),
    ("pick(0, 'view', 'twice, run');", 0, (1, 2), (6, 10), {"name": "sincos2d", "extrapolate": True}),
    ("pick(0, 'name', 'lookhere');click(0, 2, 4, 3, 5);", 0, (2, 4), GRID, {"name": "lookhere"}),
]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page's script is not run")
@pytest.mark.parametrize(("script", "side", "token", "grid", "wanted"), CASES, ids=lambda value: str(value)[:40])
def test_what_is_clicked_is_what_the_kernel_says(script, side, token, grid, wanted, page, tmp_path):
    text = said(page, tmp_path, script)[side]
    assert f"Token ({token[0]}, {token[1]}) of {grid[0]} x {grid[1]}" in text
    shown = [float(number) for number in re.search(r"itself (\S+), first (\S+), last (\S+)\.$", text).groups()]
    table = content(page)[wanted["name"]]["views"]
    step = max((view["high"] - view["low"]) / 254 for view in table[0])
    for got, want in zip(shown, row(wanted.pop("name"), token, grid=grid, **wanted), strict=True):
        assert abs(got - want) <= step + 0.006 * abs(want)
