"""What a Trainer logs, counts and saves is that of a run without SAM, or of the first pass; weights are SAM's."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import types

import pytest
import torch
import transformers
from torch import nn

import samopt
from samopt.integrations.transformers import SAMTrainer, SharpnessCallback, make_sharpness_aware
from tests.helpers import hf

pytestmark = pytest.mark.hf

STEPS = 4
OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
CHANGING = ("runtime", "per_second", "grad_norm")  # the norm is that of the gradients stepped with


def logged(entries):
    """Log entries without times, the norm of the gradients stepped with, and what the optimizer measured."""
    return [
        {
            key: value
            for key, value in entry.items()
            if not key.startswith("sharpness/") and not any(name in key for name in CHANGING)
        }
        for entry in entries
    ]


def saved(folder):
    states = []
    for path in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        state = json.loads(path.read_text())
        state["log_history"] = logged(state["log_history"])
        states.append(state)
    assert len(states) == 2
    return states


def sft(folder, rate):
    trl, words = pytest.importorskip("trl"), pytest.importorskip("tests.helpers.words")
    arguments = trl.SFTConfig(str(folder), learning_rate=rate, bf16=False, **OPTIONS)
    return trl.SFTTrainer(
        words.language_model(), args=arguments, train_dataset=words.texts(), processing_class=words.tokenizer()
    )


def sft_lora(folder, rate):
    trl, words = pytest.importorskip("trl"), pytest.importorskip("tests.helpers.words")
    peft = pytest.importorskip("peft")
    arguments = trl.SFTConfig(
        str(folder), learning_rate=rate, bf16=False, include_num_input_tokens_seen="all", **OPTIONS
    )
    return trl.SFTTrainer(
        words.language_model(),
        args=arguments,
        train_dataset=words.texts(),
        processing_class=words.tokenizer(),
        peft_config=peft.LoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM"),
    )


def dpo(folder, rate):
    trl, words = pytest.importorskip("trl"), pytest.importorskip("tests.helpers.words")
    arguments = trl.DPOConfig(str(folder), learning_rate=rate, bf16=False, **OPTIONS)
    return trl.DPOTrainer(
        words.language_model(),
        ref_model=words.language_model(),
        args=arguments,
        train_dataset=words.preferences(),
        processing_class=words.tokenizer(),
    )


def reward(folder, rate):
    trl, words = pytest.importorskip("trl"), pytest.importorskip("tests.helpers.words")
    arguments = trl.RewardConfig(str(folder), learning_rate=rate, bf16=False, **OPTIONS)
    return trl.RewardTrainer(
        words.reward_model(),
        args=arguments,
        train_dataset=words.preferences().remove_columns("prompt"),
        processing_class=words.tokenizer(),
    )


def sentences(folder, rate):
    st = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    words = pytest.importorskip("tests.helpers.words")
    torch.manual_seed(0)

    class Encoder(nn.Module):
        """Means of word vectors, with dropout."""

        def __init__(self):
            super().__init__()
            self.vectors = nn.Embedding(len(words.WORDS), 8)
            self.dropout = nn.Dropout(0.1)
            self.tokenizer = words.tokenizer()

        def preprocess(self, texts, **options):
            return dict(self.tokenizer(list(texts), padding=True, return_tensors="pt"))

        tokenize = preprocess

        def forward(self, features, **options):
            mask = features["attention_mask"].unsqueeze(-1).float()
            means = (self.vectors(features["input_ids"]) * mask).sum(1) / mask.sum(1)
            return features | {"sentence_embedding": self.dropout(means)}

        def get_embedding_dimension(self):
            return 8

        get_sentence_embedding_dimension = get_embedding_dimension

        def save(self, *args, **options):
            pass

    class Components(nn.Module):
        """Two losses, which the trainer adds up and logs."""

        def __init__(self, model):
            super().__init__()
            self.model = model
            self.head = nn.Linear(16, 1)
            self.calls = 0

        def forward(self, features, labels):
            self.calls += 1
            both = torch.cat([self.model(each)["sentence_embedding"] for each in features], 1)
            error = self.head(both).squeeze(1) - labels
            return {"square": error.square().mean(), "absolute": error.abs().mean()}

    data = datasets.Dataset.from_dict(
        {
            "first": [words.text(index, 3) for index in range(16)],
            "second": [words.text(index + 1, 4) for index in range(16)],
            "label": [float(index % 3) for index in range(16)],
        }
    )
    model = st.SentenceTransformer(modules=[Encoder()], device="cpu")
    arguments = st.SentenceTransformerTrainingArguments(str(folder), learning_rate=rate, **OPTIONS)
    return st.SentenceTransformerTrainer(model, arguments, data, loss=Components(model))


@dataclasses.dataclass
class Statistics:
    """Of a user's own class."""

    batches: int = 0
    by_label: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Meter:
    """Of a user's own class, with a slot for another."""

    def __init__(self):
        self.total = torch.zeros((), dtype=torch.float64)
        self.inner = types.SimpleNamespace(calls=0)

    def update(self, value):
        self.total += value
        self.inner.calls += 1


class Counting(transformers.Trainer):
    """Keeps numbers in every way that a compute_loss may."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.examples = 0
        self.losses = []
        self.running = torch.zeros(3)
        self.averages = collections.defaultdict(list)
        self.statistics = Statistics()
        self.meters = {"loss": Meter()}
        self.recent = collections.deque(maxlen=3)
        self.noise = torch.Generator().manual_seed(7)
        self.centre = nn.BatchNorm1d(3, affine=False)

    def compute_loss(self, model, inputs, **options):
        labels = inputs["labels"]
        outputs = model(**inputs)
        logits = self.centre(outputs["logits"]) + 0.1 * torch.rand(3, generator=self.noise)
        loss = nn.functional.cross_entropy(logits, labels)
        self.examples += len(labels)
        self.losses.append(loss.item())
        self.running = 0.9 * self.running + 0.1 * logits.detach().mean(0)
        self.averages["loss"].append(loss.item())
        self.statistics.batches += 1
        self.statistics.by_label.update(labels.tolist())
        self.meters["loss"].update(loss.item())
        self.recent.append(loss.item())
        self.state.seen = getattr(self.state, "seen", 0) + len(labels)
        self.newly = self.examples
        if self.examples % 4 == 0:
            self.log({"inside": loss.item(), "examples": self.examples})
        return (loss, outputs) if options.get("return_outputs") else loss

    def log(self, logs, *args, **options):
        if "inside" not in logs:
            logs["average"] = sum(self.averages["loss"]) / max(1, len(self.averages["loss"]))
            self.averages.clear()
        super().log(logs, *args, **options)

    @property
    def numbers(self):
        return {
            "examples": self.examples,
            "losses": self.losses,
            "running": self.running.tolist(),
            "averages": dict(self.averages),
            "statistics": (self.statistics.batches, sorted(self.statistics.by_label.items())),
            "meter": (float(self.meters["loss"].total), self.meters["loss"].inner.calls),
            "recent": list(self.recent),
            "noise": self.noise.get_state().tolist(),
            "centre": [value.tolist() for value in self.centre.state_dict().values()],
            "seen": self.state.seen,
            "newly": self.newly,
        }


def counting(folder, rate):
    arguments = transformers.TrainingArguments(str(folder), learning_rate=rate, **OPTIONS)
    return Counting(hf.bert(), args=arguments, train_dataset=hf.classification(16))


TRAINERS = {
    "TRL, SFT": sft,
    "TRL, SFT with LoRA": sft_lora,
    "TRL, DPO": dpo,
    "TRL, reward": reward,
    "sentence-transformers": sentences,
    "a user's subclass": counting,
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_at_learning_rate_zero_every_number_is_that_of_a_run_without_sam(trainer, tmp_path):
    runs = {}
    for name in ("plain", "sam"):
        run = TRAINERS[trainer](tmp_path / name, 0.0)
        if name == "sam":
            make_sharpness_aware(run, sam="sam", sam_rho=0.5)
        run.train()
        runs[name] = run
    plain, sam = runs["plain"], runs["sam"]
    assert float(sam.sam_optimizer.last_step.sharpness) != 0.0
    assert logged(sam.state.log_history) == logged(plain.state.log_history)
    assert getattr(sam, "numbers", None) == getattr(plain, "numbers", None)
    ours, theirs = saved(tmp_path / "sam"), saved(tmp_path / "plain")
    assert ours == theirs
    for field in dataclasses.fields(plain.state):
        if field.name != "log_history":
            assert getattr(sam.state, field.name) == getattr(plain.state, field.name), field.name
    for first, second in zip(sam.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_numbers_of_the_first_step_do_not_depend_on_the_radius(trainer, tmp_path):
    """Both runs begin at the same weights; the step itself differs."""
    runs = {}
    for name, rho in (("plain", 0.0), ("sam", 0.5)):
        run = TRAINERS[trainer](tmp_path / name, 1e-2)
        make_sharpness_aware(run, sam="sam", sam_rho=rho).train()
        runs[name] = logged(run.state.log_history)
    assert runs["sam"][0] == runs["plain"][0]
    assert runs["sam"] != runs["plain"]


@pytest.mark.parametrize("sam", [None, "sam"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_measuring_adds_nothing_to_what_a_trainer_collects_and_logs(trainer, sam, tmp_path):
    """A measure calls ``compute_loss`` at perturbed weights, many times."""
    runs = {}
    for name in ("alone", "measured"):
        run = TRAINERS[trainer](tmp_path / name, 1e-2)
        if sam:
            make_sharpness_aware(run, sam=sam, sam_rho=0.5)
        run.eval_dataset = run.train_dataset
        if name == "measured":
            measures = {"worst_case": {"steps": 2}, "average_case": {"samples": 1}}
            callback = SharpnessCallback(measures, every=1, examples=4, max_fraction=None)
            callback.attach(run)
        run.train()
        run.evaluate()
        runs[name] = run
    alone, measured = runs["alone"], runs["measured"]
    rows = [row for row in measured.state.log_history if "sharpness/worst_case" in row]
    assert len(rows) == measured.state.global_step
    of_every_row = {"epoch", "step", "num_input_tokens_seen"}
    assert all(row.keys() <= {"sharpness/worst_case", "sharpness/average_case", *of_every_row} for row in rows)
    others = [row for row in measured.state.log_history if row not in rows]
    assert logged(others) == logged(alone.state.log_history)
    assert getattr(measured, "numbers", None) == getattr(alone, "numbers", None)


def test_a_long_list_of_data_is_not_looked_through(tmp_path, monkeypatch):
    """Elements of lists with thousands of entries are data; a window costs no walk over them."""
    run = counting(tmp_path, 1e-2)
    touched = []

    class Row(dict):
        def copy(self):
            touched.append(self)
            return super().copy()

    run.rows = [Row() for _ in range(20_000)]
    make_sharpness_aware(run, sam="sam").train()
    assert not touched


class Wrapper:
    """A trainer of another package around a Hugging Face one, as setfit's."""

    def __init__(self, *inner):
        for index, each in enumerate(inner):
            setattr(self, f"trainer_{index}", each)

    def train(self):
        self.trainer_0.train()


def test_a_wrapper_is_unwrapped(tmp_path):
    wrapper = Wrapper(counting(tmp_path, 1e-2))
    assert make_sharpness_aware(wrapper, sam="asam") is wrapper
    wrapper.train()
    assert isinstance(wrapper.trainer_0.sam_optimizer, samopt.ASAM)


def test_wrappers_that_leave_open_which_trainer_is_meant(tmp_path):
    both = Wrapper(counting(tmp_path, 1e-2), counting(tmp_path, 1e-2))
    with pytest.raises(TypeError, match=r"Wrapper holds several.*trainer_0, trainer_1.*make_sharpness_aware\(trainer"):
        make_sharpness_aware(both, sam="sam")
    with pytest.raises(TypeError, match="needs a transformers Trainer, got Wrapper, which holds none"):
        make_sharpness_aware(Wrapper(), sam="sam")
    with pytest.raises(TypeError, match="needs a transformers Trainer, got the class Counting"):
        make_sharpness_aware(Counting, sam="sam")


def test_a_subclass_of_sam_trainer_counts_once(tmp_path):
    """The mixin's place in the class order does not matter for what is put back."""

    class Own(SAMTrainer):
        examples = 0

        def compute_loss(self, model, inputs, **options):
            self.examples += len(inputs["labels"])
            return super().compute_loss(model, inputs, **options)

    run = hf.make_trainer(tmp_path, hf.norms(), hf.points(16), kind=Own, sam="sam", num_train_epochs=1)
    run.train()
    assert run.examples == 16


class Noting:
    """Computes a loss and keeps numbers, as a method of an object, called in several ways."""

    def __init__(self):
        self.examples = 0
        self.seen = []

    def loss(self, outputs, labels, num_items_in_batch=None):
        self.examples += len(labels)
        self.seen.append(labels.tolist())
        return nn.functional.cross_entropy(outputs["logits"], labels)

    def __call__(self, *args, **options):
        return self.loss(*args, **options)


def _call(loss, outputs, labels, num_items_in_batch=None):
    return loss(outputs, labels)


def _closure(noting):
    counts = {"calls": 0}

    def loss(outputs, labels, num_items_in_batch=None):
        counts["calls"] += 1
        noting.calls = counts["calls"]
        return noting.loss(outputs, labels)

    return loss


@pytest.mark.parametrize(
    "function",
    [
        lambda noting: noting.loss,
        lambda noting: noting,
        lambda noting: functools.partial(_call, noting.loss),
        lambda noting: lambda outputs, labels, **options: noting.loss(outputs, labels),
        _closure,
    ],
    ids=["method", "callable object", "partial", "lambda", "closure"],
)
def test_what_a_loss_function_keeps_counts_once(function, tmp_path):
    noting = Noting()
    options = {"compute_loss_func": function(noting)}
    run = hf.make_trainer(tmp_path, hf.norms(), hf.points(16), num_train_epochs=1, trainer_options=options)
    run.train()
    assert noting.examples == 16
    assert len(noting.seen) == 4
    assert getattr(noting, "calls", 4) == 4
