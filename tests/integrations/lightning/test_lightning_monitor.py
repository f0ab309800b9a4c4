"""Sharpness in the logs of a Lightning run: the right numbers, wherever they go."""

from __future__ import annotations

import math

import matplotlib.image
import pytest
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samopt import sharpness
from samopt.integrations._logging.history import draw_history
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit
from tests.helpers.lit_monitor import FREE, KeepWeights, Quiet, expected_values, monitor, rows

pytestmark = pytest.mark.lightning


@pytest.mark.parametrize("sam", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_logged_numbers_are_those_of_the_measures(accumulate, sam, tmp_path):
    """On the first eight examples as the training step gets them; rows are counted as the loss's own."""
    keep, logger = KeepWeights(), CSVLogger(tmp_path, name="run", version=0)
    callback = SharpnessAwareTraining() if sam else Callback()
    watch = monitor()
    lit.fit(
        tmp_path,
        Quiet(),
        callback,
        callbacks=[watch, keep],
        logger=logger,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=2,
    )
    steps = 14 if accumulate == 1 else 8
    batches = list(lit.loader())[:2]
    logged = {int(row["step"]) + 1: row for row in rows(tmp_path / "run" / "version_0") if row["sharpness/worst"]}
    assert sorted(logged) == sorted(watch.history) == [step for step in range(1, steps + 1) if step % 3 == 0]
    for step, row in logged.items():
        for key, value in expected_values(keep.nets[step], batches).items():
            assert float(row[key]) == pytest.approx(value, rel=1e-5, abs=1e-7)
            assert watch.history[step][key] == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_free_metrics_at_every_log_step(tmp_path):
    class Steps(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, *args):
            self.seen[trainer.global_step] = trainer.callbacks[0].last_step.to_dict()

    steps, logger = Steps(), CSVLogger(tmp_path, name="run", version=0)
    lit.fit(
        tmp_path,
        lit.Module(),
        callbacks=[monitor(every=100), steps],
        logger=logger,
        log_every_n_steps=4,
    )
    logged = {int(row["step"]) + 1: row for row in rows(tmp_path / "run" / "version_0") if row["sharpness/sam"]}
    assert sorted(logged) == [4, 8, 12, 14]  # and at the end, with the one measurement of a run shorter than `every`
    losses = [int(row["step"]) + 1 for row in rows(tmp_path / "run" / "version_0") if row["loss_step"]]
    assert losses == [4, 8, 12]
    for step, row in logged.items():
        measured = steps.seen[step]
        assert float(row["sharpness/sam"]) == measured["sharpness"]
        assert all(float(row[f"sharpness/{name}"]) == measured[name] for name in FREE - {"sam"})
        assert math.isclose(measured["perturbed_loss"], measured["loss"] + measured["sharpness"], rel_tol=1e-5)


def test_a_plain_run_has_no_free_metrics(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    lit.fit(tmp_path, lit.Module(), Callback(), callbacks=[monitor()], logger=logger)
    columns = {name for row in rows(tmp_path / "run" / "version_0") for name in row if name.startswith("sharpness/")}
    assert columns == {"sharpness/worst", "sharpness/average"}


def test_each_layer_and_the_largest_eigenvalue(tmp_path):
    keep, logger = KeepWeights(), CSVLogger(tmp_path, name="run", version=0)
    watch = monitor(measures={"per_layer": {"rho": 0.2, "steps": 2}, "lambda_max": {}}, every=4)
    lit.fit(tmp_path, Quiet(), callbacks=[watch, keep], logger=logger)
    batches = list(lit.loader())[:2]
    logged = [row for row in rows(tmp_path / "run" / "version_0") if row["sharpness/lambda_max"]]
    assert [int(row["step"]) for row in logged] == [3, 7, 11]
    for row in logged:
        net = keep.nets[int(row["step"]) + 1]
        layers = sharpness.per_layer(net, sharpness.cross_entropy, batches, rho=0.2, adaptive=True, steps=2).layers
        assert len(layers) == 5
        for name, result in layers.items():
            assert float(row[f"sharpness/per_layer/net.{name}"]) == pytest.approx(result.value, rel=1e-4, abs=1e-7)
        assert float(row["sharpness/per_layer"]) == pytest.approx(max(r.value for r in layers.values()), rel=1e-4)
        top = sharpness.hessian_eigenvalues(net, sharpness.cross_entropy, batches).value
        assert float(row["sharpness/lambda_max"]) == pytest.approx(top, rel=1e-3)


def test_tensorboard_gets_values_and_the_picture(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="board", version=0)
    watch = monitor(measures=["worst_case", "per_layer"])
    lit.fit(tmp_path, lit.Module(), callbacks=[watch], logger=logger)
    board = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    board.Reload()
    scalars = {event.step + 1: event.value for event in board.Scalars("sharpness/worst_case")}
    assert scalars == pytest.approx({step: values["sharpness/worst_case"] for step, values in watch.history.items()})
    assert len(board.Scalars("sharpness/sam")) == 14
    assert "sharpness/per_layer/net.0" in board.Tags()["scalars"]
    assert board.Tags()["images"] == ["sharpness"]
    assert matplotlib.image.imread(f"{logger.log_dir}/sharpness.png").std() > 0


def test_the_picture_has_a_panel_for_each_measure_and_a_line_for_each_layer():
    history = {
        step: {"sharpness/sam": 0.1 * step, "sharpness/worst_case": 0.2 * step, "sharpness/per_layer": 5.0}
        | {f"sharpness/per_layer/net.{layer}": float(layer) for layer in range(3)}
        for step in (3, 6)
    }
    history[9] = {"sharpness/sam": 1.0}  # the measures were left out
    panels = draw_history(history, ["sam", "worst_case", "average_case", "per_layer"]).axes
    assert [axes.get_title() for axes in panels] == ["rise in the optimizer's own ascent", "worst case", "per layer"]
    drawn = [{line.get_label(): list(line.get_xydata().ravel()) for line in axes.lines} for axes in panels]
    assert list(drawn[0].values()) == [[3, pytest.approx(0.3), 6, pytest.approx(0.6), 9, 1.0]]
    assert list(drawn[1].values()) == [[3, pytest.approx(0.6), 6, pytest.approx(1.2)]]
    assert drawn[2] == {f"net.{layer}": [3, layer, 6, layer] for layer in range(3)}
    assert [axes.get_ylabel() for axes in panels] == ["rise of the loss"] * 3


def test_the_picture_names_what_its_axes_show():
    history = {step: {f"sharpness/{name}": 1.0 for name in ("lambda_max", "weight_noise", "mine")} for step in (3, 6)}
    panels = draw_history(history, ["lambda_max", "weight_noise", "mine"]).axes
    assert [axes.get_ylabel() for axes in panels] == ["eigenvalue", "rise of the loss", "value"]


def test_the_picture_where_it_was_asked_for(tmp_path):
    lit.fit(tmp_path, lit.Module(), callbacks=[monitor(plot=tmp_path / "new" / "picture.png")])
    assert matplotlib.image.imread(tmp_path / "new" / "picture.png").std() > 0
    assert not (tmp_path / "sharpness.png").exists()
    lit.fit(tmp_path, lit.Module(), callbacks=[monitor(plot=False)])
    lit.fit(tmp_path, lit.Module(), callbacks=[monitor()], fast_dev_run=4)
    assert not (tmp_path / "sharpness.png").exists()
    lit.fit(tmp_path, lit.Module(), callbacks=[monitor()])
    assert (tmp_path / "sharpness.png").exists()


def test_cost_is_bounded_and_what_is_left_out_is_said(tmp_path):
    """Time is counted in calls of a clock that a measure drives."""

    calls = []

    def endless(model, loss_fn, batches, *, progress):
        calls.append(1)
        if len(calls) > 1:
            progress(1.0, 1e9)
            raise AssertionError("the budget should have stopped this")
        return sharpness.worst_case(model, loss_fn, batches, steps=1)

    watch = monitor(measures={"endless": endless}, max_fraction=1e-9)
    with pytest.warns(UserWarning, match="sharpness/endless left out at step 6: takes about .* of a share of 1e-09"):
        trainer = lit.trainer(tmp_path, [watch], max_epochs=1)
        trainer.fit(lit.Module(), lit.loader())
    assert [record["step"] for record in watch.monitor.history] == [3, 6]
    assert sorted(watch.history) == [3]  # the first measurement always happens


@pytest.mark.parametrize("options", [{"every": 100}, {"every": 3}, {"every": None}])
def test_early_stopping_follows_a_measure_between_measurements(tmp_path, options):
    """It reads the value at every validation, also before the first measurement was due."""
    seen = []

    class Stop(EarlyStopping):
        def _evaluate_stopping_criteria(self, current):
            seen.append(float(current))
            return super()._evaluate_stopping_criteria(current)

    class Validated(lit.Module):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def val_dataloader(self):
            return lit.loader(2)

    watch = monitor(examples=64, **options)
    lit.fit(tmp_path, Validated(), callbacks=[watch, Stop("sharpness/worst", patience=100)], max_epochs=2)
    assert len(seen) >= 2
    known = [values["sharpness/worst"] for values in watch.history.values()]
    assert all(any(value == pytest.approx(one, rel=1e-6) for one in known) for value in seen)  # kept in fp32


def test_free_metrics_may_be_averaged_over_the_interval(tmp_path):
    class Steps(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, *args):
            self.seen[trainer.global_step] = trainer.callbacks[0].last_step.to_dict()

    steps, logger = Steps(), CSVLogger(tmp_path, name="run", version=0)
    watch = monitor(every=100, average_metrics=True)
    lit.fit(tmp_path, lit.Module(), callbacks=[watch, steps], logger=logger, log_every_n_steps=4)
    logged = {int(row["step"]) + 1: row for row in rows(tmp_path / "run" / "version_0") if row["sharpness/sam"]}
    for last in (4, 8, 12):
        for key, name in (("sam", "sharpness"), ("grad_norm", "grad_norm")):
            mean = sum(steps.seen[step][name] for step in range(last - 3, last + 1)) / 4
            assert float(logged[last][f"sharpness/{key}"]) == pytest.approx(mean, rel=1e-5)


def test_a_run_that_is_shorter_than_every_is_measured_at_its_end(tmp_path):
    watch = monitor(every=100, examples=1000)
    lit.fit(tmp_path, lit.Module(), callbacks=[watch], max_steps=3)
    assert sorted(watch.history) == [3]
    assert (tmp_path / "sharpness.png").exists() or list(tmp_path.rglob("sharpness.png"))


def test_progress_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samopt.integrations._logging.progress._DELAY", 0.0)
    lit.fit(tmp_path, lit.Module(), callbacks=[monitor()], max_steps=3, enable_progress_bar=True)
    assert "sharpness/worst: " in capsys.readouterr().err
    lit.fit(tmp_path, lit.Module(), callbacks=[monitor()], max_steps=3)
    assert "sharpness/" not in capsys.readouterr().err


def test_validation_data(tmp_path):
    """The sample comes from the sanity check where that is long enough, else from the first validation."""

    class OnTwoSets(Quiet):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", self.loss(batch))

    batches = list(lit.loader(12))
    for sanity, first in ((2, 3), (0, 9)):
        keep, watch = KeepWeights(), monitor(data="validation")
        lit.fit(
            tmp_path,
            OnTwoSets(),
            callbacks=[watch, keep],
            validation=[lit.loader(12), lit.loader(4)],
            num_sanity_val_steps=sanity,
        )
        assert min(watch.history) == first
        for step, values in watch.history.items():
            for key, value in expected_values(keep.nets[step], batches[:2]).items():
                assert values[key] == pytest.approx(value, rel=1e-5, abs=1e-7)
    few = monitor(data="validation", examples=100)
    lit.fit(tmp_path, Quiet(), callbacks=[few], validation=lit.loader(12), num_sanity_val_steps=1)
    assert len(few.monitor.batches) == 3
    with pytest.raises(ValueError, match='validation data, of which the trainer has none.*data="training"'):
        lit.fit(tmp_path, Quiet(), callbacks=[monitor(data="validation")])


def test_a_sample_larger_than_the_training_data_is_all_of_it(tmp_path):
    watch = monitor(examples=1000)
    lit.fit(tmp_path, Quiet(), callbacks=[watch])
    assert len(watch.monitor.batches) == 7
    assert min(watch.history) == 9


def test_batches_and_a_loss_of_ones_own(tmp_path):
    """Also for a module whose training step is no loss: it has manual optimization."""

    class Manual(lit.Manual, Quiet):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    batches = list(lit.loader(8))
    keep = KeepWeights()
    watch = monitor(batches=batches, loss_fn=sharpness.cross_entropy)
    lit.fit(tmp_path, Manual(), Callback(), callbacks=[watch, keep])
    assert sorted(watch.history) == [3, 6, 9, 12]
    for step, values in watch.history.items():
        assert FREE <= {name.removeprefix("sharpness/") for name in values}
        for key, value in expected_values(keep.nets[step], batches).items():
            assert values[key] == pytest.approx(value, rel=1e-5, abs=1e-7)
    with pytest.raises(TypeError, match=r"runs the optimizer \(automatic_optimization=False\); give it loss_fn="):
        lit.fit(tmp_path, Manual(), Callback(), callbacks=[monitor()])


def test_other_callbacks_follow_the_values(tmp_path):
    stop = EarlyStopping("sharpness/worst", mode="max", patience=1, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, monitor="sharpness/worst", every_n_train_steps=3, save_top_k=1)
    watch = monitor()
    lit.fit(tmp_path, lit.Module(), callbacks=[watch, stop, best], enable_checkpointing=True, max_epochs=4)
    assert float(best.best_model_score) == pytest.approx(min(v["sharpness/worst"] for v in watch.history.values()))
    assert float(stop.best_score) in [pytest.approx(v["sharpness/worst"]) for v in watch.history.values()]
