"""Sharpness in the logs of a Trainer: the right numbers, wherever they are reported, and no other change to the run."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

import samopt
from samopt import sharpness
from samopt.integrations.transformers import SAMTrainer, SharpnessCallback, make_sharpness_aware
from tests.helpers import cases, hf

pytestmark = pytest.mark.hf

PLAIN = {"kind": transformers.Trainer, "arguments": transformers.TrainingArguments}
MEASURES = {
    "worst": functools.partial(sharpness.worst_case, rho=0.1, steps=3),
    "average": functools.partial(sharpness.average_case, rho=0.1, samples=3),
}


def evaluated(**options):
    """Options of a Trainer that evaluates every second step."""
    data = {"eval_dataset": hf.points(20, seed=2)}
    return {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": data} | options


def make_callback(**options):
    return SharpnessCallback(**{"measures": MEASURES, "every": None, "examples": 12, "max_fraction": None} | options)


class KeepWeights(TrainerCallback):
    """Keeps a copy of the model after every step."""

    def __init__(self):
        self.models = {}

    def on_step_end(self, args, state, control, **kwargs):
        copy = hf.norms()
        copy.load_state_dict(kwargs["model"].state_dict())
        self.models[state.global_step] = copy


@pytest.mark.parametrize("every", [None, 3])
def test_the_logged_numbers_are_those_of_the_measures(every, tmp_path):
    keep = KeepWeights()
    trainer = hf.make_trainer(
        tmp_path, hf.norms(), hf.points(), callbacks=[keep, make_callback(every=every)], **evaluated()
    )
    trainer.train()
    rows = hf.points(20, seed=2)
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12].tolist()
    batches = [transformers.default_data_collator([rows[i] for i in chosen[start : start + 8]]) for start in (0, 8)]
    steps = [step for step in range(1, 15) if step % (every or 2) == 0]
    for name, measure in MEASURES.items():
        entries = [entry for entry in trainer.state.log_history if f"sharpness/{name}" in entry]
        assert [entry["step"] for entry in entries] == steps
        for entry in entries:
            expected = measure(keep.models[entry["step"]], sharpness.hf_loss, batches).value
            assert entry[f"sharpness/{name}"] == pytest.approx(expected, rel=1e-6)


def test_measures_by_name_and_the_layers_of_one(tmp_path):
    keep = KeepWeights()
    callback = make_callback(measures={"per_layer": {"steps": 1, "rho": 0.1}, "worst_case": {"steps": 1}}, every=7)
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[keep, callback], **evaluated())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "sharpness/per_layer" in entry]
    assert [entry["step"] for entry in entries] == [7, 14]
    for entry in entries:
        measured = callback.monitor.batches
        expected = sharpness.per_layer(
            keep.models[entry["step"]], sharpness.hf_loss, measured, rho=0.1, adaptive=True, steps=1
        ).layers
        for name, result in expected.items():
            assert entry[f"sharpness/per_layer/{name}"] == pytest.approx(result.value, rel=1e-5, abs=1e-8)
        assert entry["sharpness/worst_case"] >= 0
    with pytest.raises(ValueError, match="must be one of worst_case, .*'sharpest'"):
        SharpnessCallback(["sharpest"])


def test_free_metrics_stand_beside_the_training_loss(tmp_path):
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), logging_steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"sam", "perturbed_loss", "grad_norm", "perturbed_grad_norm", "radius", "applied_radius"}
    assert all({f"sharpness/{name}" for name in names} <= set(entry) for entry in entries)
    last = trainer.sam_optimizer.last_step.to_dict()
    final = hf.make_trainer(tmp_path, hf.norms(), hf.points(), logging_steps=1)
    final.train()
    assert final.state.log_history[-2]["sharpness/sam"] == last["sharpness"]
    tram = hf.make_trainer(tmp_path, hf.norms(), hf.points(), sam="tram")
    tram.train()
    assert len(hf.logged(tram, "sharpness/distance")) == 14


@pytest.mark.parametrize("plain", [False, True])
def test_free_metrics_may_be_averaged_over_the_interval(plain, tmp_path):
    class Steps(TrainerCallback):
        def __init__(self):
            self.seen = {}

        def on_step_end(self, args, state, control, **kwargs):
            optimizer = kwargs["optimizer"].optimizer if plain else trainer.sam_optimizer
            self.seen[state.global_step] = optimizer.last_step.to_dict()

    steps = Steps()
    options = {"logging_steps": 4, "callbacks": [steps]} | evaluated()
    if plain:
        options |= PLAIN | {"base": lambda model: samopt.SAM(hf.momentum_sgd(model), direction="momentum", model=model)}
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), **options)
    make_callback(average_metrics=True).attach(trainer).train()
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "sharpness/radius" in entry}
    for last in (4, 8, 12):
        for name in ("grad_norm", "radius"):
            values = [steps.seen[step].get(name) for step in range(last - 3, last + 1)]
            if None not in values:
                assert entries[last][f"sharpness/{name}"] == pytest.approx(sum(values) / 4, rel=1e-5)
        assert f"sharpness/{'radius' if plain else 'grad_norm'}" in entries[last]


def run(tmp_path, callbacks, **options):
    model = hf.bert()
    options = {"eval_strategy": "epoch", "trainer_options": {"eval_dataset": hf.classification(12, seed=2)}} | options
    trainer = hf.make_trainer(tmp_path, model, hf.classification(), callbacks=callbacks, seeded=False, **options)
    trainer.train()
    return model, hf.logged(trainer, "loss"), hf.logged(trainer, "eval_loss"), torch.get_rng_state()


@pytest.mark.parametrize("options", [{}, {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2}])
def test_a_measured_run_is_the_unmeasured_one(options, tmp_path):
    measured = run(tmp_path, [make_callback(every=1)], **options)
    alone = run(tmp_path, [], **options)
    assert cases.same_bits(measured[0], cases.bits(alone[0]))
    assert measured[1:3] == alone[1:3]
    assert torch.equal(measured[3], alone[3])


def test_a_trainer_without_sam(tmp_path):
    callback = make_callback()
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), **PLAIN, **evaluated())
    assert callback.attach(trainer) is trainer
    trainer.train()
    assert len(hf.logged(trainer, "sharpness/worst")) == 7
    assert all(value >= 0 for value in hf.logged(trainer, "sharpness/worst"))
    assert hf.logged(trainer, "sharpness/sam") == []
    none = hf.make_trainer(tmp_path, hf.norms(), hf.points(), sam="none", callbacks=[make_callback()], **evaluated())
    none.train()
    assert hf.logged(none, "sharpness/worst") == hf.logged(trainer, "sharpness/worst")


def test_an_optimizer_of_ours_in_a_plain_trainer(tmp_path):
    """The one-pass form needs no SAMTrainer; its free metrics are logged all the same."""
    model = hf.norms()
    trainer = hf.make_trainer(
        tmp_path,
        model,
        hf.points(),
        base=lambda model: samopt.SAM(hf.momentum_sgd(model), direction="momentum", model=model),
        **PLAIN,
        **evaluated(),
    )
    make_callback().attach(trainer).train()
    radii = [entry["sharpness/radius"] for entry in trainer.state.log_history if "sharpness/radius" in entry]
    assert len(radii) == 14
    assert radii[-1] == pytest.approx(0.05)


def test_callbacks_added_later_and_trainers_made_sharpness_aware_later(tmp_path):
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), num_train_epochs=1, **evaluated())
    trainer.add_callback(make_callback())
    trainer.train()
    assert len(hf.logged(trainer, "sharpness/worst")) == 4
    other = hf.make_trainer(
        tmp_path, hf.norms(), hf.points(), num_train_epochs=1, callbacks=[make_callback()], **PLAIN, **evaluated()
    )
    make_sharpness_aware(other, sam="sam").train()
    assert len(hf.logged(other, "sharpness/worst")) == 4


def test_tensorboard_gets_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = hf.make_trainer(
        tmp_path, hf.norms(), hf.points(), callbacks=[make_callback()], **evaluated(report_to=["tensorboard"])
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for name in ("sam", "radius", "worst", "average"):
        values = hf.logged(trainer, f"sharpness/{name}")
        assert [event.value for event in board.Scalars(f"train/sharpness/{name}")] == pytest.approx(values, rel=1e-6)


def test_a_measure_that_costs_too_much_is_left_out_and_said_so(tmp_path, caplog):
    calls = []

    def endless(model, loss_fn, batches, *, progress):
        calls.append(1)
        if len(calls) == 1:
            return sharpness.worst_case(model, loss_fn, batches, steps=1)
        done = 0.0
        while True:
            loss_fn(model, batches[0])
            done += 1 / 3
            progress(done, 1e9)

    callback = make_callback(measures={"endless": endless}, every=2, max_fraction=0.5)
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[callback], **evaluated())
    trainer.train()
    assert len(hf.logged(trainer, "sharpness/endless")) == 1  # the first measurement always happens
    assert "sharpness/endless left out at step 4: takes about" in caplog.text
    assert "raise max_fraction" in caplog.text
    assert [sorted(record.get("skipped", {})) for record in callback.monitor.history] == [[]] + [["endless"]] * 6


def test_a_default_callback_measures_a_short_run_at_its_end(tmp_path):
    callback = SharpnessCallback()
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[callback], **evaluated())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "sharpness/worst_case" in entry]
    assert [entry["step"] for entry in entries] == [14]
    assert "sharpness/average_case" in entries[0]


def test_a_measure_may_choose_the_best_model(tmp_path):
    options = evaluated(save_strategy="steps", save_steps=2, load_best_model_at_end=True, num_train_epochs=1)
    options |= {"metric_for_best_model": "eval_sharpness/worst", "greater_is_better": False}
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback(every=None)], **options)
    trainer.train()
    values = [entry["sharpness/worst"] for entry in trainer.state.log_history if "sharpness/worst" in entry]
    assert trainer.state.best_metric == min(values)


def test_a_measure_is_there_for_an_evaluation_that_comes_before_the_first_measurement(tmp_path):
    """Also after a checkpoint, and for the callback's second run, which starts without the first one's values."""
    options = evaluated(save_strategy="steps", save_steps=2, load_best_model_at_end=True, num_train_epochs=1)
    options |= {"metric_for_best_model": "sharpness/worst", "greater_is_better": False}
    callback = make_callback(every=100)
    values = []
    for checkpoint in (None, tmp_path / "checkpoint-4", None):
        trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[callback], **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        rows = [row for row in trainer.state.log_history if "sharpness/worst" in row]
        values.append({row["step"]: row["sharpness/worst"] for row in rows})
    assert [list(steps) for steps in values] == [[2], [2, 6], [2]]
    assert values[2] == values[0]


@pytest.mark.parametrize("silent", [False, True])
def test_progress_is_shown_where_the_trainer_shows_its_own(silent, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samopt.integrations._logging.progress._DELAY", 0.0)
    options = evaluated(disable_tqdm=silent, max_steps=2)
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback()], **options)
    trainer.train()
    shown = re.findall(r"sharpness/(worst|average): +(\d+)%\|", capsys.readouterr().err)
    assert {name for name, _ in shown} == (set() if silent else {"worst", "average"})


def test_a_custom_loss_is_what_is_measured(tmp_path):
    class Doubled(SAMTrainer):
        def compute_loss(self, model, inputs, **options):
            labels = inputs.pop("labels")
            return 2 * torch.nn.functional.cross_entropy(model(**inputs)["logits"], labels)

    base = functools.partial(torch.optim.SGD, lr=0.0)
    still = {
        "base": lambda model: base(model.parameters()),
        "max_steps": 1,
        "trainer_options": {"eval_dataset": hf.points(20, seed=2)},
    }
    one = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback(every=1)], **still)
    one.train()
    two = hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=Doubled, callbacks=[make_callback(every=1)], **still)
    two.train()
    ratio = hf.logged(two, "sharpness/average")[0] / hf.logged(one, "sharpness/average")[0]
    assert ratio == pytest.approx(2, rel=1e-4)


def test_records_go_to_a_file(tmp_path):
    path = tmp_path / "records.jsonl"
    trainer = hf.make_trainer(
        tmp_path, hf.norms(), hf.points(), num_train_epochs=1, callbacks=[make_callback(path=path)], **evaluated()
    )
    trainer.train()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 7]  # and at the end
    assert records[0]["measures"]["worst"]["cost"] > 0


def test_an_evaluation_on_two_data_sets_measures_once(tmp_path):
    data = {"first": hf.points(20, seed=2), "second": hf.points(4, seed=3)}
    options = evaluated(trainer_options={"eval_dataset": data}) | {"max_steps": 4}
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback()], **options)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "sharpness/worst" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]


def test_what_a_sample_can_come_from(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(hf.points(20, seed=2))

    for data in ({"first": hf.points(20, seed=2), "second": hf.points(4, seed=3)}, Stream()):
        callback = make_callback(every=2)
        trainer = hf.make_trainer(
            tmp_path, hf.norms(), hf.points(), max_steps=2, callbacks=[callback], trainer_options={"eval_dataset": data}
        )
        trainer.train()
        assert sum(len(batch["labels"]) for batch in callback.monitor.batches) == 12


def test_misuse_is_explained(tmp_path):
    for name in ("every", "examples"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            SharpnessCallback(**{name: 0})
    with pytest.raises(RuntimeError, match=r"write SharpnessCallback\(\).attach\(trainer\) instead"):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback()], **PLAIN, **evaluated()).train()
    with pytest.raises(ValueError, match="the Trainer has no eval_dataset"):
        hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback()]).train()
    sharded = hf.make_trainer(tmp_path, hf.norms(), hf.points(), callbacks=[make_callback()], **evaluated())
    sharded.callback_handler.pop_callback(hf.SeedEachStep)
    sharded.is_fsdp_enabled = True
    with pytest.raises(RuntimeError, match="measures in one process, but the model of this SAMTrainer is sharded"):
        sharded.callback_handler.on_train_begin(sharded.args, sharded.state, sharded.control)
