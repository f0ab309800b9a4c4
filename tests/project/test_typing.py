"""What an editor and a type checker tell a user: every option is in the signature, and a typo is an error."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import samopt

ROOT = Path(__file__).parents[2]
SHARED = ["only", "direction", "combination", "norm", "stochastic_rounding", "seed", "sync_perturbation", "backend"]


@pytest.mark.parametrize("name", samopt.available())
def test_a_signature_lists_every_option(name):
    kinds = {kind.__name__: kind for kind in vars(samopt).values() if inspect.isclass(kind)}
    kind = next(k for k in kinds.values() if k.__name__.lower() == name.replace("-", ""))
    shown = inspect.signature(kind).parameters
    assert list(shown)[:2] == ["params", "base_optimizer"]
    assert "options" not in shown
    fixed = getattr(kind, "_fixed_options", ())
    for option in ("model", *SHARED, "measure_grad_norms", "warn_on_stall"):
        assert (option in shown) == (option not in fixed), option


SNIPPET = """
import torch, samopt
model = torch.nn.Linear(2, 1)
base = torch.optim.SGD(model.parameters(), lr=0.1)
samopt.SAM(base, rho=0.05, model=model)
samopt.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, model=[model])
samopt.ASAM(base, eta=0.01, direction="momentum", model=model)
samopt.SAM(base, only="norm", model=model)
samopt.ASAM(base, only=lambda name, parameter: parameter.dim() > 1, model=model)
samopt.SAM(base, only=["norm"], model=model)  # error
samopt.TRAM(base, only=lambda name: True, model=model)  # error
samopt.SAM(base, modle=model)  # error
samopt.SAM(base, direction="momentun", model=model)  # error
samopt.SAM(model, torch.optim.SGD, lr=0.1)  # error
samopt.SAM(base, rho="0.05")  # error
samopt.TRAM(base, model=model, divergens="kl")  # error
optimizer = samopt.SAM(base)
optimizer.backward(3)  # error
"""


@pytest.mark.slow
def test_a_type_checker_finds_the_mistakes_and_nothing_else(tmp_path):
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path), str(path)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"MYPYPATH": str(ROOT), "PATH": ""})
    lines = SNIPPET.splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if line.endswith("# error")}
    reported = {int(line.split(":")[1]) for line in out.stdout.splitlines() if ": error:" in line}
    assert reported == wrong, out.stdout + out.stderr
