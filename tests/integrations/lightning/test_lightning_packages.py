"""Both Lightnings, and every way to hand a callback to one."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

import pytest
import torch
from pytorch_lightning import Callback

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit

pytestmark = pytest.mark.lightning

PACKAGES = ["pytorch_lightning", "lightning.pytorch"]


@functools.cache
def module_class(package):
    """The test module for a package, and its equivalent that names its own callbacks."""
    return type("Module", (lit.Shared, importlib.import_module(package).LightningModule), {})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_trainer_and_a_module_of_either_package(package, tmp_path):
    pl = importlib.import_module(package)
    module, expected = module_class(package)(), lit.Module()
    callback = SharpnessAwareTraining("asam")
    assert isinstance(callback, pl.Callback)
    lit.fit(tmp_path, module, callback, package=pl, accumulate_grad_batches=2)
    lit.train_by_hand(expected, list(lit.loader()), sam=samopt.ASAM, accumulate=2)
    lit.assert_same_state(module.net, expected.net)


@pytest.mark.parametrize("package", PACKAGES)
def test_configure_callbacks(package, tmp_path):
    pl = importlib.import_module(package)

    class Module(module_class(package)):
        def configure_callbacks(self):
            return [SharpnessAwareTraining("asam")]

    module, expected = Module(), lit.Module()
    lit.fit(tmp_path, module, pl.Callback(), package=pl)
    lit.train_by_hand(expected, list(lit.loader()), sam=samopt.ASAM)
    lit.assert_same_state(module.net, expected.net)


CALLBACKS = """  callbacks:
    - class_path: samopt.integrations.lightning.SharpnessAwareTraining
      init_args:
        variant: tram
        eta: 0.1
      dict_kwargs:
        trust_region: ema
        scale: 20.0
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_yaml(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lit.run_cli(tmp_path, package, CALLBACKS)
    expected = lit.Module()
    sam = functools.partial(samopt.TRAM, eta=0.1, trust_region="ema", scale=20.0)
    lit.train_by_hand(expected, list(lit.loader()), sam=sam, epochs=1)
    lit.assert_same_state(run.model.net, expected.net)


def test_without_lightning_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['pytorch_lightning'] = None; import samopt.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert 'needs pytorch_lightning, which is not installed; install it with: pip install "samopt[lightning]"' in (
        done.stderr
    )


def test_without_the_lightning_package_the_other_one_serves(tmp_path):
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'lightning' else find(name, *rest)\n"
        "import samopt.integrations.lightning as ours, pytorch_lightning\n"
        "assert isinstance(ours.SharpnessAwareTraining(), pytorch_lightning.Callback)\n"
        "assert 'lightning.pytorch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


class Unlogged(lit.Module):
    """A training step that can be compiled whole: torch cannot compile Lightning's ``log``."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("what", ["module", "network"])
def test_compiled_code_is_compiled_once_for_each_pass(what, accumulate, tmp_path):
    """After the first window nothing is compiled again; this backend computes what Python would."""
    compiled, by_then = [], []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    class Progress(Callback):
        def on_train_batch_start(self, *args):
            by_then.append(len(compiled))

    module, expected = (Unlogged() if what == "module" else lit.Module()), lit.Module()
    for made in (module, expected):
        made.net[5].momentum = 0.1  # without one, torch leaves the whole network uncompiled
    net = module.net
    if what == "network":
        module.net = torch.compile(net, backend=backend)
    trained = torch.compile(module, backend=backend) if what == "module" else module
    data = lit.loader(24)
    lit.fit(tmp_path, trained, data=data, callbacks=[Progress()], accumulate_grad_batches=accumulate)
    lit.train_by_hand(expected, list(data), accumulate=accumulate)
    lit.assert_same_state(net, expected.net)
    assert by_then[accumulate] == by_then[-1] > 0
