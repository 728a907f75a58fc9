"""`python -m visionpos`: what it prints, and that mistakes are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import visionpos as vp
from visionpos.__main__ import main
from visionpos.analysis import PROPERTIES, report


def run(capsys, *argv):
    status = main(argv)
    return status, *capsys.readouterr()


def test_list(capsys):
    _, everything, _ = run(capsys, "list")
    assert [line.split()[0] for line in everything.splitlines()[2:]] == vp.list_encodings()
    _, some, _ = run(capsys, "list", "rope*", "--place", "rotary")
    assert [line.split()[0] for line in some.splitlines()[2:]] == vp.list_encodings("rope*")


def test_show(capsys):
    _, text, _ = run(capsys, "show", "rope_axial")
    for part in ("rotary", "2403.13298", "preset='rope_vit'", "translation invariant", "theta_k = temperature"):
        assert part in text


def test_check_prints_properties_beside_the_sinusoid(capsys):
    status, text, _ = run(capsys, "check", "alibi2d", "--grid", "3", "5")
    assert status == 0
    assert "the contract holds: shapes," in text
    assert "grid 3 x 5, test grid 6 x 10" in text
    header = next(line for line in text.splitlines() if line.startswith("grid"))
    assert header.split()[-2:] == ["alibi2d", "sinusoidal"]
    assert all(each.label in text for each in PROPERTIES.values())


def test_compare_with_an_option_that_one_of_them_has(capsys):
    _, text, _ = run(capsys, "compare", "rope_axial", "alibi2d", "--grid", "3", "5", "--option", "temperature=10")
    assert "rope_axial(temperature=10)" in text
    assert "alibi2d: not defined, a bias gives no vector to a token" in text


def test_plot(capsys, tmp_path):
    out = tmp_path / "picture.png"
    assert run(capsys, "plot", "alibi2d", "--grid", "3", "5", "--output", str(out))[0] == 0
    assert out.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["show", "rope_axal"], "did you mean 'rope_axial'"),
        (["check", "rope_axal"], "did you mean 'rope_axial'"),
        (["check", "alibi2d", "--option", "slope=2"], "no option 'slope'"),
        (["compare", "alibi", "alibi2d", "--option", "slope=2"], "none of alibi, alibi2d has an option 'slope'"),
        (["plot", "alibi2d", "--option", "slope"], "key=value"),
        (["plot", "alibi2d", "--grid", "0", "3"], "positive"),
        (["plot", "alibi2d", "--grid", "3", "5", "--out", "/nowhere/x.png"], "/nowhere"),
        (["list", "zzz*"], "no encoding fits"),
        (["list", "--place", "biass"], "did you mean 'bias'"),
        (["--import", "no_such_module", "list"], "no_such_module"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, said):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_options():
    pairs = ["temperature=1e4", "preset=mae", "extrapolate=true", "reference_shape=(3, 5)", "x=none"]
    assert report.parse_options(pairs) == {
        "temperature": 1e4, "preset": "mae", "extrapolate": True, "reference_shape": (3, 5), "x": None
    }  # fmt: skip


def test_numbers():
    found = [report.number(x) for x in (0.0, 1e-9, 0.06406, 184, vp.analysis.NotDefined("why"))]
    assert found == ["0", "<1e-6", "0.0641", "184", "-"]


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "visionpos.analysis.notebook", raising=False)
    assert main(["plot", "sincos2d", "--output", "never.png"]) == 2
    line = capsys.readouterr().err
    assert line == "visionpos: matplotlib draws this and is not installed: pip install 'visionpos[train]'\n"


def test_import_is_light_and_an_own_module_is_found(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import visionpos as vp\n\n@vp.register_encoding('mine')\nclass Mine(vp.BiasEncoding):\n    '''My own.'''\n"
    )
    code = (
        "import sys, visionpos, visionpos.analysis; from visionpos.__main__ import main;"
        "assert 'matplotlib' not in sys.modules; sys.exit(main(['--import', 'mine', 'list', 'mi*']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "My own." in done.stdout


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(vp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
