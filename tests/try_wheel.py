"""What `make dist` does with a wheel, in an environment that has it and no checkout: run with `python -I`, anywhere."""

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

import visionpos as vp
from visionpos.training.config.command_line import parse
from visionpos.training.run.classification import train

COMMAND = shutil.which("visionpos", path=Path(sys.executable).parent)


def command(*arguments: str) -> str:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=True).stdout


def main(out: Path) -> None:
    """Try it all, with files in a new folder `out`."""
    assert "site-packages" in vp.__file__, f"not the installed package: {vp.__file__}"
    assert not any(map(find_spec, ("train", "tests", "benchmarks"))), "only visionpos may be importable"
    assert any(str(file) == "visionpos/py.typed" for file in distribution("visionpos").files)
    assert "rope_axial" in command("list", "rope*")
    command("plot", "alibi2d", "--grid", "5", "7", "--output", str(out / "alibi2d.png"))
    assert (out / "alibi2d.png").stat().st_size > 1000

    command("explore", "alibi2d", "sincos2d", "--output", str(out / "explorer.html"))
    assert "alibi2d" in (out / "explorer.html").read_text()

    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=2, num_classes=3)
    vp.set_encoding(model, "rope_axial")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 48)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    optimizer.step()

    flags = ["--config", "direction_demo", "--encoding", "rope_axial", "--recipe.steps", "2", "--output"]
    result = train(parse([*flags, str(out / "run")]))
    assert (out / "run" / "result.json").exists()
    assert result["encoding_parameters"] == 0
    print("the wheel works alone:", vp.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
