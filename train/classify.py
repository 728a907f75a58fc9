"""Train a timm model with the encoding of your choice to classify pictures, or to solve a position task.

    python -m train.classify --config configs/run/vit_cifar10_small.yaml --encoding rope_axial --seed 0
    python -m train.classify --config configs/run/direction_8x8.yaml --encoding "{name: rope_axial, temperature: 10}"
    python -m train.classify --config configs/run/vit_cifar10.yaml --data.name photos --data.size "[48, 64]"

Run it again to continue after an interruption. The result is that of the last step, averaged weights first; it is never
the best of several looks at the test pictures. `--init` starts from pretrained weights: a timm name, a file,
a directory, or a `train.pretrain_mae` run. The run above takes 31 minutes on one thread of a busy CPU; every run file
says its own time.
"""

from collections.abc import Sequence

from visionpos.training.config.command_line import parse
from visionpos.training.errors import run_script


def command(argv: Sequence[str]) -> None:
    """Read the command line, and train."""
    config = parse(argv, description=__doc__)
    from visionpos.training.run.classification import train

    train(config)


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(command)


if __name__ == "__main__":
    main()
