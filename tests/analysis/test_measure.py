"""`measure` on every encoding, through the public contract alone, and on encodings that a user wrote."""

from __future__ import annotations

import math

import pytest
import torch

import visionpos as vp
from visionpos.analysis import PROPERTIES, NotDefined, kernel, logit_kernel, measure

GRID, TEST_GRID = (3, 5), (4, 7)


@pytest.mark.parametrize("name", vp.list_encodings())
def test_every_property_is_a_finite_number_or_a_reason(name):
    found = measure(name, GRID, TEST_GRID)
    assert list(found) == list(PROPERTIES)
    for key, value in found.items():
        assert str(value) if isinstance(value, NotDefined) else math.isfinite(value), key
    claimed = vp.encoding_info(name)["translation_invariant"]
    if claimed and not isinstance(found["stationarity"], NotDefined) and name not in ("alibi", "rope1d"):
        assert found["stationarity"] < 1e-6
        assert found["translation_step"] < 1e-6


@pytest.mark.parametrize("name", vp.list_encodings())
def test_kernel_shape_and_rows(name):
    encoding, positions = kernel.exact(kernel.build(name, GRID)), kernel.exact_grid(GRID)
    if name == "none":
        with pytest.raises(NotDefined):
            logit_kernel(encoding, positions)
        return
    found = logit_kernel(encoding, positions)
    assert found.shape[1:] == (15, 15)
    assert len(found) == (1 if encoding.place in ("input", "conditional") else encoding.num_heads)
    assert not found.requires_grad
    index = torch.tensor([7, 2])
    torch.testing.assert_close(logit_kernel(encoding, positions, index), found[:, index])


def test_kernel_is_its_definition():
    positions = kernel.exact_grid(GRID)
    table = vp.sincos_2d(GRID, 192, dtype=torch.float64)
    torch.testing.assert_close(logit_kernel(kernel.build("sincos2d", GRID), positions)[0], table @ table.T)
    angles = vp.rope_angles_axial(GRID, 64, dtype=torch.float64)
    cosine = (angles[:, None] - angles[None]).cos().mean(-1)
    torch.testing.assert_close(logit_kernel(kernel.build("rope_axial", GRID), positions)[2], cosine)
    encoding = kernel.build("alibi2d", GRID)
    assert torch.equal(logit_kernel(encoding, positions), encoding.bias(positions))


def test_instance_options_and_mistakes():
    wide = measure("rope_axial", GRID, TEST_GRID, ["phase_coverage"], temperature=10.0)["phase_coverage"]
    assert wide > measure("rope_axial", GRID, TEST_GRID, ["phase_coverage"])["phase_coverage"]
    instance = vp.create_encoding("rope_axial", num_heads=3, head_dim=64, temperature=10.0)
    assert measure(instance, GRID, TEST_GRID, ["phase_coverage"])["phase_coverage"] == wide
    with pytest.raises(ValueError, match="did you mean 'rope_axial'"):
        measure("rope_axal")
    with pytest.raises(ValueError, match="no option 'foo'"):
        measure("rope_axial", foo=1)
    with pytest.raises(ValueError, match="did you mean 'rebound'"):
        measure("rope_axial", only=["rebund"])
    with pytest.raises(ValueError, match="built already"):
        measure(instance, temperature=1.0)


def test_measuring_changes_neither_the_encoding_nor_the_random_state():
    encoding = kernel.build("learned", GRID)
    before, state = encoding.pos_embed.clone(), torch.get_rng_state()
    measure(encoding, GRID, TEST_GRID)
    measure("learned", GRID, TEST_GRID, ["stationarity"])
    assert encoding.pos_embed.dtype == torch.float32
    assert torch.equal(encoding.pos_embed, before)
    assert torch.equal(torch.get_rng_state(), state)


class OneHead(vp.BiasEncoding):
    """Of a user, not registered: looks down only, and hides what is above."""

    name = "mine"
    extrapolation = "error"

    def encode(self, queries, keys):
        below = keys.coords[..., None, :, 0] - queries.coords[..., :, None, 0]
        return below.where(below >= 0, torch.finfo(torch.bfloat16).min).unsqueeze(-3)


def test_an_encoding_of_a_user():
    found = measure(OneHead(num_heads=1), GRID, TEST_GRID)
    assert found["hidden_share"] == pytest.approx(1 / 3)
    assert found["directionality"] > 0
    assert str(found["output_drift"]) == "it knows no other grid"
    assert str(found["rank"]) == "it hides pairs of tokens"
    assert str(found["orthogonality_error"]) == "only for the place rotary"
