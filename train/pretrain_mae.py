"""Pretrain a model by reconstructing hidden patches: MAE for ViT-like models, SimMIM for Swin.

    python -m train.pretrain_mae --config configs/run/mae_vit_cifar10_small.yaml --encoding rope_axial --seed 0
    python -m train.pretrain_mae --config configs/run/mae_vit_cifar10_small.yaml --masked.ratio 0.5 --output runs/half
    python -m train.pretrain_mae --config configs/run/simmim_swin_cifar10.yaml --data.name photos --data.size "[48, 64]"

Then `python -m train.classify --config ... --init RUN` fine-tunes the encoder and `python -m train.probe RUN` looks at
its frozen features. Run it again to continue after an interruption. The run above takes 22 minutes on one thread of a
busy CPU; every run file says its own time.
"""

from collections.abc import Sequence

from visionpos.training.config.command_line import parse
from visionpos.training.config.schema import PretrainConfig
from visionpos.training.errors import run_script


def command(argv: Sequence[str]) -> None:
    """Read the command line, and train."""
    config = parse(argv, PretrainConfig, description=__doc__)
    from visionpos.training.run.pretraining import train

    train(config)


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(command)


if __name__ == "__main__":
    main()
