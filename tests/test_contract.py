"""Every encoding, held to the contract and to what it claims; and the contract, shown to notice broken promises."""

import pytest
import torch

import visionpos as vp
from tests.small import needs_newer_timm
from visionpos import registry
from visionpos.testing import CHECKS

ENCODINGS = [name for name in vp.list_encodings() if name != "none"]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_contract(name, check):
    CHECKS[check](registry.get_encoding_class(name))


def test_check_encoding_reports_what_it_ran():
    assert vp.check_encoding("alibi2d") == list(CHECKS)
    assert vp.check_encoding(type(vp.create_encoding("alibi2d", num_heads=1))) == list(CHECKS)
    assert vp.check_encoding("none") == []
    with pytest.raises(ValueError, match="unknown encoding"):
        vp.check_encoding("nothing")


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class Distance(vp.BiasEncoding):
    """Negative distance: a sound little encoding for the liars below to spoil."""

    place = "bias"
    translation_invariant = True

    def encode(self, queries, keys):
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
        return -torch.linalg.vector_norm(delta, dim=-1).unsqueeze(-3).expand(*delta.shape[:-3], self.num_heads, -1, -1)


class ClaimsToBeRelative(Distance):
    def encode(self, queries, keys):
        return super().encode(queries, keys) * (1 + queries.coords[..., 0])[..., None, :, None]


class ClaimsToBeAbsolute(Distance):
    translation_invariant = False


class Nothing(Distance):
    def encode(self, queries, keys):
        return super().encode(queries, keys) * 0


class GuessesTheGrid(Distance):
    def encode(self, queries, keys):
        return super().encode(queries, keys) / queries.coords.amax()


class ForgetsBatches(Distance):
    def encode(self, queries, keys):
        bias = super().encode(queries, keys)
        return bias[:1].expand_as(bias) if queries.is_batched else bias


class SaysAnotherFormula(Distance):
    def formula(self, positions):
        return lambda head, dy, dx: -torch.sqrt(dy * dy + 1.1 * dx * dx)


class HidesAParameter(Distance):
    def __init__(self, num_heads, **grid_options):
        super().__init__(num_heads, **grid_options)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode(self, queries, keys):
        return super().encode(queries, keys) * self.scale


class SavesItsBuffer(Distance):
    def __init__(self, num_heads, **grid_options):
        super().__init__(num_heads, **grid_options)
        self.register_buffer("one", torch.ones(()))


class HalvesItsFrequencies(Distance):
    def __init__(self, num_heads, **grid_options):
        super().__init__(num_heads, **grid_options)
        self.register_buffer("slope", torch.tensor(0.3), persistent=False)

    def reinit_buffers(self):
        self.slope.fill_(0.3)

    def encode(self, queries, keys):
        return super().encode(queries, keys) * self.slope.float()


class ForgetsItsBuffer(HalvesItsFrequencies):
    def reinit_buffers(self):
        pass


class ForgetsItsBufferWhenDrawnAgain(HalvesItsFrequencies):
    def reset_parameters(self):
        pass


class DoublesItsOption(Distance):
    def __init__(self, num_heads, slope: float = 1.0):
        super().__init__(num_heads)
        self.slope = 2 * slope


class TakesItselfForAnother(Distance):
    """Its own heads are not those that it was built with: a model would refuse what it has itself."""

    def __init__(self, num_heads, **grid_options):
        super().__init__(num_heads, **grid_options)
        self.heads, self.num_heads = num_heads, num_heads - 1

    def encode(self, queries, keys):
        self.num_heads += 1
        bias = super().encode(queries, keys)
        self.num_heads -= 1
        return bias


class KeepsAValueToItself(Distance):
    """What no parameter and no option says is lost when a model is saved."""

    built = 0

    def __init__(self, num_heads, **grid_options):
        super().__init__(num_heads, **grid_options)
        type(self).built += 1
        self.slope = 1 + 0.1 * type(self).built

    def encode(self, queries, keys):
        return super().encode(queries, keys) * self.slope


class StaleCache(HidesAParameter):
    learnable = True
    cache = None

    def encode(self, queries, keys):
        if self.cache is None or self.cache[0] != queries.num_patches:
            self.cache = queries.num_patches, super().encode(queries, keys)
        return self.cache[1]


LIARS = [
    (ClaimsToBeRelative, "translation"),
    (ClaimsToBeAbsolute, "translation"),
    (Nothing, "positions_matter"),
    (GuessesTheGrid, "kept_tokens"),
    (ForgetsBatches, "batched_coordinates"),
    (SaysAnotherFormula, "formula"),
    (HidesAParameter, "gradients"),
    (SavesItsBuffer, "state"),
    (HalvesItsFrequencies, "dtypes"),
    (ForgetsItsBuffer, "meta_device"),
    (ForgetsItsBufferWhenDrawnAgain, "meta_device"),
    (StaleCache, "state"),
    (DoublesItsOption, "layers"),
    (TakesItselfForAnother, "layers"),
    pytest.param(KeepsAValueToItself, "round_trips", marks=needs_newer_timm),
]


@pytest.mark.parametrize(("cls", "check"), LIARS, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_promise_is_found(scratch_registry, cls, check):
    vp.register_encoding("liar")(cls)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[check](cls)
    with pytest.raises(AssertionError, match="^liar: [a-z_]+: "):
        vp.check_encoding(cls)


def test_a_sound_encoding_of_ones_own_passes(scratch_registry):
    vp.register_encoding("distance")(Distance)
    assert vp.check_encoding("distance") == list(CHECKS)
