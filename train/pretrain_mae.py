"""Pretrain a model by reconstructing hidden patches: MAE for ViT-like models, SimMIM for Swin.

    python -m train.pretrain_mae --config configs/run/mae_vit_cifar10_small.yaml --encoding rope_axial --seed 0

Then `python -m train.classify --config ... --init RUN` fine-tunes the encoder and `python -m train.probe RUN` looks at
its frozen features. Run it again to continue after an interruption. The run above takes 22 minutes on one thread of a
busy CPU; every run file says its own time.
"""

from visionpos.training.config.command_line import parse
from visionpos.training.config.schema import PretrainConfig
from visionpos.training.errors import run_script
from visionpos.training.run.pretraining import train


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(lambda argv: train(parse(argv, PretrainConfig)))


if __name__ == "__main__":
    main()
