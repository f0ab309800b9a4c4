"""Nothing that a run counts, logs or calls is counted, logged or called twice."""

from __future__ import annotations

import csv

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ThroughputMonitor
from pytorch_lightning.callbacks.progress import ProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining, is_second_pass
from tests.helpers import lit

pytestmark = pytest.mark.lightning


class Watcher(Callback):
    """Notes every hook that is called, in order."""

    def __init__(self):
        self.called = []

    def __getattribute__(self, name):
        if name.startswith("on_") and name in dir(Callback):
            called = object.__getattribute__(self, "called")
            return lambda *args, **kwargs: called.append(name)
        return super().__getattribute__(name)


class Counting(lit.Module):
    """Notes every hook of its own; logs through its logger; profiles; leaves the radius to others."""

    def __init__(self):
        super().__init__()
        self.called = []
        self.printed = []
        self.passes = []
        self.meter = {"elsewhere": torch.zeros(())}

    def print(self, *args, **kwargs):
        self.printed.append(args)

    def training_step(self, batch, batch_idx):
        self.passes_of_every_kind.append(is_second_pass(self.trainer))
        self.print("step", batch_idx)
        self.meter["elsewhere"] += 1
        with self.trainer.profiler.profile("inside the step"):
            output = super().training_step(batch, batch_idx)
        for logger in self.loggers:
            logger.log_metrics({"direct": 1.0}, step=self.global_step)
        return output


for hook in ("on_before_backward", "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step"):

    def note(self, *args, name=hook):
        self.called.append(name)

    setattr(Counting, hook, note)


SEEN = []


def run(folder, callback, **options):
    module, watcher = Counting(), Watcher()
    SEEN.clear()
    module.__dict__["passes_of_every_kind"] = Everything()
    trainer = lit.fit(folder, module, callback, callbacks=[watcher], **options)
    return trainer, module, watcher, list(SEEN)


class Everything:
    """Notes in a global variable, which is not put back: it has the second pass, too."""

    def append(self, each):
        SEEN.append(each)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hooks_and_attributes(accumulate, tmp_path):
    ours, module, watcher, passes = run(tmp_path, SharpnessAwareTraining(), accumulate_grad_batches=accumulate)
    theirs, plain, plain_watcher, _ = run(tmp_path, Callback(), accumulate_grad_batches=accumulate)
    assert passes.count(False) == passes.count(True) == 14
    assert watcher.called == plain_watcher.called
    assert module.called == plain.called
    assert module.printed == plain.printed
    for name in ("seen", "steps_by_label", "calls", "meter"):
        assert getattr(module, name) == getattr(plain, name), name
    assert len(module.losses) == 14
    assert not torch.equal(module.net[0].weight, plain.net[0].weight)
    assert ours.global_step == theirs.global_step
    assert (
        ours.fit_loop.epoch_loop.batch_progress.state_dict() == theirs.fit_loop.epoch_loop.batch_progress.state_dict()
    )
    progress = [t.fit_loop.epoch_loop.automatic_optimization.optim_progress.state_dict() for t in (ours, theirs)]
    assert progress[0] == progress[1]


def test_logged_rows(tmp_path):
    """With a radius of nearly nothing the logged values are the plain run's."""
    rows = {}
    for name, callback in {"sam": SharpnessAwareTraining("sam", rho=1e-12), "plain": Callback()}.items():
        logger = CSVLogger(tmp_path, name=name, version=0)
        run(tmp_path, callback, logger=logger)
        with open(tmp_path / name / "version_0" / "metrics.csv", encoding="utf-8") as file:
            rows[name] = list(csv.DictReader(file))
    assert len(rows["sam"]) == len(rows["plain"]) > 14
    for ours, theirs in zip(rows["sam"], rows["plain"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == value or float(ours[key]) == pytest.approx(float(value), rel=1e-4), key


def test_profiled_actions(tmp_path):
    counts = {}
    for name, callback in {"sam": SharpnessAwareTraining(), "plain": Callback()}.items():
        profiler = SimpleProfiler()
        run(tmp_path, callback, profiler=profiler)
        ours = {key: len(times) for key, times in profiler.recorded_durations.items() if "Callback" not in key}
        counts[name] = ours
        assert ours["inside the step"] == 14
    assert counts["sam"] == counts["plain"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_throughput_counters(accumulate, tmp_path):
    """Batches, examples and floating-point operations are those of the data, not of the passes."""

    class Measured(lit.Module):
        flops_per_batch = 1000

    logged = {}
    for name, callback in {"sam": SharpnessAwareTraining(), "plain": Callback()}.items():
        logger = CSVLogger(tmp_path, name=name, version=0)
        throughput = ThroughputMonitor(lambda batch: len(batch[1]), length_fn=lambda batch: 6, separator="/")
        lit.fit(
            tmp_path,
            Measured(),
            callback,
            callbacks=[throughput],
            data=lit.loader(24),
            logger=logger,
            accumulate_grad_batches=accumulate,
        )
        with open(tmp_path / name / "version_0" / "metrics.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/samples")]
        logged[name] = [(row["step"], row["train/batches"], row["train/samples"], row["train/lengths"]) for row in rows]
        counted = throughput._throughputs["train"]
        logged[name].append((list(counted._batches), list(counted._samples), list(counted._flops)))
    assert logged["sam"] == logged["plain"]
    assert logged["sam"][-2][1:3] == ("12", "48")


def test_the_loss_shown_is_the_first_pass_s(tmp_path):
    class Bar(ProgressBar):
        def __init__(self):
            super().__init__()
            self.shown = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            self.shown.append(float(self.get_metrics(trainer, pl_module)["loss_step"]))

        def disable(self):
            pass

    bar, module = Bar(), lit.Module()
    lit.fit(tmp_path, module, callbacks=[bar], enable_progress_bar=True, max_epochs=1)
    assert bar.shown == pytest.approx(module.losses)


def test_random_streams_end_where_a_run_without_the_callback_ends(tmp_path):
    states = []
    for callback in (SharpnessAwareTraining(), Callback()):
        lit.fit(tmp_path, lit.Module(), callback)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("error", [RuntimeError("in the second pass"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_in_the_second_pass_leaves_everything_as_it_was(error, tmp_path):
    """The weights, buffers and attributes are those after three steps; the trainer is itself again."""

    class Failing(lit.Module):
        def loss(self, batch):
            if self.armed and is_second_pass(self.trainer) and self.global_step == 3:
                super().loss(batch).backward()
                raise error
            return super().loss(batch)

    class OnException(Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.weights = [p.detach().clone() for p in pl_module.parameters()]

    module, expected, seen = Failing(), lit.Module(), OnException()
    module.armed = True
    logger = CSVLogger(tmp_path)
    with pytest.raises((RuntimeError, SystemExit)):
        lit.fit(tmp_path, module, callbacks=[seen], logger=logger)
    lit.train_by_hand(expected, list(lit.loader()), max_steps=3)
    for ours, theirs, kept in zip(module.net.parameters(), expected.net.parameters(), seen.weights, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, kept)
        assert ours.grad is None
    assert module.calls == 4
    assert not {"log", "log_dict", "print"} & set(vars(module))
    trainer = module.trainer
    assert trainer.loggers == [logger]
    assert "training_step" not in vars(trainer.strategy)
    module.armed = False
    lit.fit(tmp_path, module, max_epochs=1)


def test_a_batch_changed_in_place_is_seen_unchanged_by_the_second_pass(tmp_path):
    class Changing(lit.Module):
        def training_step(self, batch, batch_idx):
            x, y = batch
            output = super().training_step([x, y], batch_idx)
            x.zero_()
            batch.clear()
            return output

    module, expected = Changing(), lit.Module()
    lit.fit(tmp_path, module, accumulate_grad_batches=2)
    lit.train_by_hand(expected, list(lit.loader()), accumulate=2)
    lit.assert_same_state(module.net, expected.net)


def test_parameters_that_the_optimizer_does_not_have_keep_their_gradients_apart(tmp_path):
    class Partial(lit.Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[:4].parameters(), lr=0.1)

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(float(torch.stack([p.grad.norm() for p in self.net[4:].parameters()]).norm()))

    module, plain = Partial(), Partial()
    module.norms, plain.norms = [], []
    lit.fit(tmp_path, module, SharpnessAwareTraining("sam", rho=1e-9), max_steps=3)
    lit.fit(tmp_path, plain, Callback(), max_steps=3)
    assert module.norms == pytest.approx(plain.norms, rel=1e-3)


def test_a_skipped_training_step(tmp_path):
    """The window is what is left of it, and one of nothing but skipped steps moves nothing."""

    class Skipping(lit.Module):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 4, 5) else output

    module, expected = Skipping(), lit.Module()
    lit.fit(tmp_path, module, accumulate_grad_batches=2, limit_train_batches=6, max_epochs=1)

    optimizer = samopt.SAM(lit.sgd(expected.net.parameters()), model=expected.net)
    batches = list(lit.loader())
    for window, skipped in (((0,), 1), ((2, 3), None)):
        optimizer.zero_grad()
        starts = []

        def one_pass(window=window, starts=starts):
            for place, index in enumerate(window):
                if len(starts) <= place:
                    expected.noise = lit.draw_noise(index, 0)
                    starts.append((expected.noise, torch.get_rng_state()))
                expected.noise = starts[place][0]
                torch.set_rng_state(starts[place][1])
                (expected.loss(batches[index]) / 2).backward()

        one_pass()
        if skipped is not None:  # its forward moved the statistics
            expected.noise = lit.draw_noise(skipped, 0)
            with torch.no_grad():
                expected.loss(batches[skipped])
        with optimizer.perturbed():
            one_pass()
        optimizer.step()
    for ours, theirs in zip(module.net.parameters(), expected.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
