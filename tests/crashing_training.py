"""examples/train_distributed.py, whose process 1 dies in step 7 of the first attempt under torchrun."""

import importlib.util
import os
from pathlib import Path

path = Path(__file__).parents[1] / "examples" / "train_distributed.py"
spec = importlib.util.spec_from_file_location("train_distributed", path)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def die(step):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if step == 7 and first and os.environ["RANK"] == "1":
        os._exit(5)


if __name__ == "__main__":
    example.main(on_step=die)
