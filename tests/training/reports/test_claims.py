"""Claims beside measurements: rank correlations with known answers, and a table from studies that are made up."""

import numpy as np
import pytest

from visionpos.analysis.measure import PROPERTIES, measure
from visionpos.training.data.tasks import TASKS
from visionpos.training.reports import claims
from visionpos.training.reports.claims import CLAIMS, claims_table, rank_correlation

LABELS = ("none", "alibi2d", "rope_axial", "sincos2d", "lookhere", "learned(init_std=0.2)", "relative_table")


def study(accuracy, name="direction", sizes=()):
    """What `summarize` would return of a study in which each encoding has this accuracy."""
    rows = []
    for label in LABELS:
        spec = {"name": "learned", "init_std": 0.2} if "(" in label else label
        means = {"inside": {"mean": accuracy(label)}}
        rows.append({"setting": {"data.name": name}, "encoding": label, "spec": spec, "accuracy": means})
    place = {"setting": {"data.name": name}, "part": "inside", "coordinates": "extrapolated"}
    evaluated = [
        place | {"size": size, "encoding": label, "accuracy": {"mean": accuracy(label)}}
        for size in sizes
        for label in LABELS
    ]
    return {"rows": rows, "sizes": evaluated, "parts": ["inside"], "data": {"name": name}}


def test_rank_correlations_are_spearman_s():
    x = np.array([1.0, 2, 3, 4, 5, 6])
    assert rank_correlation(x, x**3)[0] == pytest.approx(1)
    assert rank_correlation(x, -x)[0] == pytest.approx(-1)
    assert rank_correlation(x, x)[1] == pytest.approx(2 / 720, abs=2e-3)  # one order of 720, and its mirror
    swapped = np.array([2.0, 1, 3, 4, 5, 6])
    assert rank_correlation(x, swapped)[0] == pytest.approx(1 - 6 * 2 / (6 * 35))
    tied = np.array([1.0, 1, 3, 3, 5, 6])
    ranks = np.array([1.5, 1.5, 3.5, 3.5, 5, 6])
    assert rank_correlation(x, tied)[0] == pytest.approx(np.corrcoef(x, ranks)[0, 1])
    assert rank_correlation(x, np.ones(6)) == (0.0, 1.0)


def test_a_property_that_ranks_as_the_models_do_correlates_by_one():
    directed = {label: measure(label, (6, 6), (12, 12), ["directionality"])["directionality"] for label in LABELS[1:5]}
    directed["relative_table"] = measure("relative_table", (6, 6), (12, 12), ["directionality"])["directionality"]
    directed[LABELS[5]] = measure("learned", (6, 6), (12, 12), ["directionality"], init_std=0.2)["directionality"]
    table = claims_table([study(lambda label: directed.get(label, 0.99))])  # `none` has no such property: left out
    (row,) = table.rows
    assert row[1:3] == ["directionality: much", "direction, inside"]
    assert row[3].startswith("+1.00 over 6 encodings; by chance in ")
    opposite = claims_table([study(lambda label: -directed.get(label, 0))])
    assert opposite.rows[0][3].startswith("-1.00 over 6")


def test_what_differs_by_rounding_alone_is_a_tie(monkeypatch):
    found = []
    for noise in (0, 3e-8, -3e-8):
        values = {"alibi2d": 0.5, "rope_axial": 0.5 + noise, "sincos2d": 0.3 - noise, "lookhere": 0.3}
        monkeypatch.setattr(claims, "measure", lambda name, *_, v=values, **__: {"directionality": v.get(name, 0.1)})
        found.append(claims_table([study(lambda label: LABELS.index(label) / 9)]).rows)
    assert found[0] == found[1] == found[2]


def test_other_sizes_count_for_the_claims_about_them_and_the_first_study_for_what_two_have():
    one, two = study(lambda label: LABELS.index(label) / 9, sizes=[[48, 48]]), study(lambda _: 0.5)
    both = claims_table([one, two])
    assert [row[2] for row in both.rows] == ["direction, inside", "direction, extrapolated 48x48"]
    assert both.rows == claims_table([one]).rows


def test_a_small_study_does_not_stand_in_for_a_large_one():
    small, large = (
        study(lambda _: 0.5, sizes=[[48, 48]]),
        study(lambda label: LABELS.index(label) / 9, sizes=[[48, 48]]),
    )
    small |= {name: [row for row in small[name] if row["encoding"] in LABELS[:3]] for name in ("rows", "sizes")}
    assert claims_table([small, large]).rows == claims_table([large]).rows


def test_studies_of_pictures_say_nothing_of_the_claims():
    assert claims_table([study(lambda _: 0.5, name="cifar10")]) is None


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_claims_name_properties_and_tasks_that_there_are(claim):
    assert claim.key in PROPERTIES
    assert claim.task in TASKS
    assert abs(claim.sign) == 1
