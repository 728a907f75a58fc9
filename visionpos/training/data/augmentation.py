"""What may happen to a training picture, in numbers; `augment` does it. Checked without the import of torch."""

import re
from dataclasses import dataclass

NUM_MAGNITUDES = 31
ACCEPTED_POLICIES = (
    f"null, 'trivial', or 'rand(n, m)' with n operations from 1 and a magnitude m from 0 to {NUM_MAGNITUDES - 1}"
)


@dataclass(frozen=True)
class Augmentation:
    """Set what may happen to a training picture; by default nothing. Names are timm's where timm has one.

    Args:
        crop_padding: Pad by this many reflected pixels and crop at random, per picture; 0 for none.
        flip: Mirror every picture with probability one half.
        auto_augment: trivial (TrivialAugment), rand(n, m) (RandAugment, n operations of magnitude m, 0 to 30), or null.
        re_prob: Share of the pictures in which a box is erased.
        mixup_alpha: Of mixup's Beta distribution; 0 for none.
        cutmix_alpha: Of CutMix's Beta distribution; 0 for none.
        mix_prob: Share of the batches with mixup or CutMix.
        switch_prob: Share of CutMix among these, if both have an alpha.
        label_smoothing: Share of the target spread evenly over the classes.

    Raises:
        ValueError: A value outside its range.
    """

    crop_padding: int = 0
    flip: bool = False
    auto_augment: str | None = None
    re_prob: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        """Raise ValueError for a value outside its range."""
        if self.auto_augment is not None:
            parse_policy(self.auto_augment)
        for name in ("crop_padding", "mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} given; accepted: a number from 0")
        for name in ("re_prob", "mix_prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; accepted: a number from 0 to 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing} given; accepted: a number from 0 to below 1")


def parse_policy(name: str) -> tuple[int, int | None]:
    """Return how many operations a policy has, and their magnitude, None if drawn; ValueError for an unknown one."""
    if name == "trivial":
        return 1, None
    match = re.fullmatch(r"rand\((\d+), *(\d+)\)", str(name))
    if match is None or int(match[1]) < 1 or int(match[2]) >= NUM_MAGNITUDES:
        raise ValueError(f"auto_augment: {name!r} given; accepted: {ACCEPTED_POLICIES}")
    return int(match[1]), int(match[2])
