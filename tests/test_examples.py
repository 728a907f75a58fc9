"""Every public name has an example in its docstring, and the examples run."""

import doctest
import inspect

import pytest
import timm
import torch

import visionpos as vp
from visionpos import registry


@pytest.mark.parametrize("name", vp.__all__)
def test_example_of_a_public_name_runs(name, monkeypatch):
    public, names = getattr(vp, name), {"vp": vp, "torch": torch, "timm": timm}
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # an example registers an encoding
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(public), names, name, inspect.getfile(public), None)
    assert example.examples, f"{name} has no example"
    report = []
    doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not report, "".join(report)
