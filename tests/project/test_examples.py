"""The scripts in ``docs/examples`` run on tiny data, learn, and say so in their last line."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.pages import REPOSITORY

EXAMPLES = REPOSITORY / "docs" / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The script, what is written before its path, its options, and how its result is read and judged.
CASES = [
    ("image_classifier.py", [], ["--epochs", "3", "--label-noise", "0.4"], r"test accuracy ([\d.]+)$", 0.85),
    ("gan.py", [], ["--steps", "400"], r"modes (\d) of 8", 6),
    ("language_model.py", [], ["--steps", "60"], r"validation loss ([\d.]+)", -3.2),
    ("sharpness_curve.py", [], ["--epochs", "8"], r"as a share of SGD's: ([\d.]+)", -0.8),
    ("head_only.py", [], ["--rounds", "5", "--size", "32"], r"run once: .* step: ([\d.]+)$", -1.5),
    ("hf_classifier.py", [], ["--output_dir", "out", "--use_cpu", "true"], r"test accuracy ([\d.]+)", 0.8),
    ("lightning_cli.py", [], ["fit", "--config", EXAMPLES / "lightning_cli.yaml"], r"test accuracy ([\d.]+)", 0.9),
    ("with_accelerate.py", [], ["--cpu"], r"test accuracy ([\d.]+)", 0.8),
    ("ddp.py", TORCHRUN, [], r"test accuracy ([\d.]+)", 0.8),
    ("fsdp2.py", TORCHRUN, [], r"test accuracy ([\d.]+)", 0.8),
]


def test_every_example_is_run():
    assert sorted(case[0] for case in CASES) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "launcher", "options", "pattern", "least"), CASES, ids=[case[0] for case in CASES])
def test_an_example_learns(script, launcher, options, pattern, least, tmp_path):
    """``least`` is far above chance; a negative one bounds the value from above."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, EXAMPLES / script, *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = re.findall(pattern, done.stdout, flags=re.MULTILINE)
    assert found, done.stdout
    value = float(found[-1])
    assert value >= least if least > 0 else value <= -least, done.stdout
