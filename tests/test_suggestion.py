"""What somebody meant who wrote another word."""

import pytest

import visionpos as vp
from visionpos.suggestion import closest

FIELDS = ["recipe.epochs", "recipe.min_lr", "recipe.lr", "recipe.weight_decay", "seed"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("RoPE", "rope_axial"),
        ("ROPE_MIXED", "rope_mixed"),
        ("rope-golden", "rope_golden"),
        ("sincos", "sincos2d"),
        ("alibi3d", "alibi2d"),
        ("relative", "relative_table"),
        ("xyzzy", None),
        ("", None),
    ],
)
def test_an_encoding(given, meant):
    assert closest(given, vp.list_encodings()) == meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("recipe.learning_rate", "recipe.lr"),
        ("recipe.weight-decay", "recipe.weight_decay"),
        ("recipe.epoch", "recipe.epochs"),
        ("Seed", "seed"),
    ],
)
def test_a_field_with_dots(given, meant):
    assert closest(given, FIELDS) == meant


def test_an_error_asks_what_was_meant():
    with pytest.raises(ValueError, match=r"unknown encoding 'RoPE'; did you mean 'rope_axial'\? Valid: "):
        vp.create_encoding("RoPE")
