"""Train a timm model with the encoding of your choice to classify pictures, or to solve a position task.

    python -m train.classify --config configs/run/vit_cifar10_small.yaml --encoding rope_axial --seed 0

Run it again to continue after an interruption. The result is that of the last step, averaged weights first; it is never
the best of several looks at the test pictures. `--init` starts from pretrained weights: a timm name, a file,
a directory, or a `train.pretrain_mae` run. The run above takes 31 minutes on one thread of a busy CPU; every run file
says its own time.
"""

from visionpos.training.config.command_line import parse
from visionpos.training.errors import run_script
from visionpos.training.run.classification import train


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(lambda argv: train(parse(argv)))


if __name__ == "__main__":
    main()
