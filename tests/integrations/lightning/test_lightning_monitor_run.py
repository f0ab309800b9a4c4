"""What a monitor leaves alone, where it comes from, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib
import json

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy

from samopt import sharpness
from samopt.integrations.lightning import SharpnessAwareTraining, SharpnessCallback
from tests.helpers import lit
from tests.helpers.lit_monitor import monitor

pytestmark = pytest.mark.lightning


VARIED = {
    "plain": {},
    "accumulating, clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "validation inside an epoch": {"val_check_interval": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


def observed(folder, name, callback, watch):
    options = dict(VARIED[name])
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    torch.manual_seed(5)
    module, keep = lit.Module(scheduler="step"), []

    class Loss(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            keep.append(float(outputs["loss"]))

    trainer = lit.fit(
        folder,
        module,
        callback,
        data=lit.loader(dtype=dtype),
        validation=lit.loader(8, dtype),
        callbacks=[Loss(), *watch],
        **options,
    )
    return trainer, keep, torch.get_rng_state()


@pytest.mark.parametrize(
    ("name", "sam", "data"),
    [
        ("plain", True, "training"),
        pytest.param("plain", False, "validation", marks=pytest.mark.slow),
        ("accumulating, clipped", True, "validation"),
        ("validation inside an epoch", True, "training"),
        pytest.param("bf16-mixed", False, "training", marks=pytest.mark.slow),
        ("bf16-true", True, "validation"),
    ],
)
def test_a_monitored_run_is_the_unmonitored_one(name, sam, data, tmp_path):
    """Weights, buffers, optimizer, metrics, attributes, losses and random numbers."""

    def callback():
        return SharpnessAwareTraining("asam") if sam else Callback()

    measures = {"worst_case": {"steps": 2}, "average_case": {}, "per_layer": {"steps": 1}, "lambda_max": {}}
    watch = monitor(measures=measures, every=3, data=data)
    ours, losses, stream = observed(tmp_path, name, callback(), [watch])
    theirs, expected_losses, expected_stream = observed(tmp_path, name, callback(), [])
    assert len(watch.history) >= 2
    for collected in (ours.callback_metrics, ours.logged_metrics):
        for key in [key for key in collected if key.startswith("sharpness/")]:
            del collected[key]
    lit.assert_same_run(ours, theirs)
    assert losses == expected_losses
    assert torch.equal(stream, expected_stream)


def test_compiled_modules_are_not_compiled_again(tmp_path):
    """Measuring runs what is compiled as Python; another compilation would be counted."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    counts, nets = [], []
    for watch in ([monitor(measures=["worst_case", "lambda_max"])], []):
        module = lit.Module()
        module.net[5].momentum = 0.1
        net = module.net
        module.net = torch.compile(net, backend=backend)
        compiled.clear()
        lit.fit(tmp_path, module, callbacks=watch, data=lit.loader(24))
        counts.append(len(compiled))
        nets.append(net)
        torch._dynamo.reset()
    assert counts[0] == counts[1] > 0
    lit.assert_same_state(*nets)


@pytest.mark.parametrize("error", [RuntimeError("while measuring"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_while_measuring_leaves_everything_as_it_was(error, tmp_path):
    """In the middle of a worst case, where the weights are elsewhere."""
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise error
        return sharpness.cross_entropy(model, batch)

    module, expected = lit.Module(), lit.Module()
    watch = monitor(measures={"worst_case": {"rho": 5.0}}, loss_fn=loss)
    with pytest.raises(type(error)) if isinstance(error, RuntimeError) else contextlib.suppress(SystemExit):
        lit.fit(tmp_path, module, callbacks=[watch])
    lit.fit(tmp_path, expected, max_steps=3)
    assert len(calls) == 3
    lit.assert_same_state(module, expected)


def test_history_goes_on_after_a_checkpoint(tmp_path):
    path = tmp_path / "records.jsonl"
    first = monitor(path=path)
    saving = ModelCheckpoint(tmp_path, filename="saved", every_n_epochs=1)
    lit.fit(tmp_path, lit.Module(), callbacks=[first, saving], enable_checkpointing=True, max_epochs=1)
    second = monitor(path=path)
    assert second.state_dict() == {}
    second.load_state_dict(state := first.state_dict())
    assert second.state_dict() == state
    lit.fit(tmp_path, lit.Module(), callbacks=[second], ckpt_path=tmp_path / "saved.ckpt")
    assert sorted(second.history) == [3, 6, 9, 12]
    assert second.history[3] == first.history[3]
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == [3, 6, 9, 12]


PACKAGES = ["pytorch_lightning", "lightning.pytorch"]
CALLBACKS = """  callbacks:
    - class_path: samopt.integrations.lightning.SharpnessAwareTraining
    - class_path: samopt.integrations.lightning.SharpnessCallback
      init_args:
        measures: {measures}
        every: 3
        examples: 8
        max_fraction: null
        plot: false
"""


@pytest.mark.parametrize("measures", ["[worst_case, per_layer]", "{worst_case: {rho: 0.1, steps: 2}, per_layer: {}}"])
@pytest.mark.parametrize("package", PACKAGES)
def test_yaml(package, measures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lit.run_cli(tmp_path, package, CALLBACKS.replace("{measures}", measures))
    callback = run.trainer.callbacks[1]
    assert isinstance(callback, SharpnessCallback)
    assert sorted(callback.history) == [3, 6]
    settings = callback.monitor.history[0]["measures"]["worst_case"]["settings"]
    assert settings["rho"] == (0.1 if "0.1" in measures else 0.5)
    assert settings["adaptive"] in (True, "True")
    assert "sharpness/per_layer/net.0" in callback.history[3]


@pytest.mark.parametrize(
    "measures",
    [
        pytest.param("[worst_case, lambda_max]", marks=pytest.mark.slow),
        "{worst_case: {rho: 0.1, steps: 1}, lambda_max: {}}",
    ],
)
def test_a_saved_configuration_loads_again(measures, tmp_path):
    cli = importlib.import_module("pytorch_lightning.cli")

    class Module(lit.Module):
        def train_dataloader(self):
            return lit.loader()

    def run(config):
        return cli.LightningCLI(
            Module,
            args=["fit", "--config", str(config)],
            save_config_callback=cli.SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=None,
        )

    (tmp_path / "run.yaml").write_text(
        f"""
trainer:
  max_steps: 3
  accelerator: cpu
  enable_progress_bar: false
  enable_checkpointing: false
  logger: {{class_path: pytorch_lightning.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, name: a, version: 0}}}}
  callbacks:
    - class_path: samopt.integrations.lightning.SharpnessCallback
      init_args: {{every: 3, examples: 8, max_fraction: null, measures: {measures}}}
""",
        encoding="utf-8",
    )
    first = run(tmp_path / "run.yaml").trainer.callbacks
    saved = tmp_path / "a" / "version_0" / "config.yaml"
    again = run(saved).trainer.callbacks
    histories = [next(c.history for c in each if isinstance(c, SharpnessCallback)) for each in (first, again)]
    assert histories[0].keys() == histories[1].keys() == {3}
    assert histories[0][3].keys() == histories[1][3].keys() == {"sharpness/worst_case", "sharpness/lambda_max"}


@pytest.mark.parametrize("package", PACKAGES)
def test_configure_callbacks(package, tmp_path):
    pl = importlib.import_module(package)
    watch = monitor()

    class Module(lit.Shared, pl.LightningModule):
        def configure_callbacks(self):
            return [watch]

    lit.fit(tmp_path, Module(), pl.Callback(), package=pl)
    assert sorted(watch.history) == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"examples": 0}, ValueError, "examples must be at least 1, got 0"),
        ({"data": "test"}, ValueError, 'data must be "training" or "validation", got \'test\'; give other data'),
        ({"max_fraction": 2.0}, ValueError, r"max_fraction must be in \(0, 1\], got 2.0"),
        ({"measures": "worst_case"}, TypeError, r"got the string 'worst_case'; write \['worst_case'\]"),
        ({"measures": ["sharpest"]}, ValueError, "must be one of worst_case, .*got 'sharpest'"),
        ({"measures": {"sharpest": {"rho": 1.0}}}, ValueError, "must be one of worst_case.*got 'sharpest'"),
        ({"measures": [3]}, TypeError, "must be a name, or a function such as .*got 3; bind"),
        ({"measures": ["per_layer", sharpness.per_layer]}, ValueError, "two measures are called 'per_layer'; give"),
        ({"measures": []}, ValueError, "measures is empty; name some of worst_case"),
    ],
)
def test_options_are_checked_where_they_are_given(options, error, message):
    with pytest.raises(error, match=message):
        SharpnessCallback(**options)


def test_a_training_step_without_a_loss(tmp_path):
    class Odd(lit.Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.training else None

    with pytest.raises(TypeError, match="training_step returned NoneType for a batch.*give it loss_fn="):
        lit.fit(tmp_path, Odd(), callbacks=[monitor()])


def test_sharded_models_are_refused(tmp_path):
    trainer = lit.trainer(tmp_path)
    trainer.strategy.__class__ = type("Sharding", (type(trainer.strategy), ModelParallelStrategy), {"__init__": None})
    with pytest.raises(ValueError, match="needs the whole model in each process, but Sharding shards it"):
        monitor().setup(trainer, lit.Module(), "fit")
