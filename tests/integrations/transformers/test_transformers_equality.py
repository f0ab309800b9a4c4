"""A SAMTrainer run is the loop that a person would write by hand, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters

import samopt
from samopt.integrations.transformers import SAMArguments, SAMTrainer, SAMTrainerMixin, SAMTrainingArguments
from samopt.trust_region import InputNoise
from tests.helpers import cases, hf

pytestmark = pytest.mark.hf


def items(window):
    """The labels of a window that count."""
    return sum((batch["labels"] != -100).sum() for batch in window)


KINDS = {
    "bert": (hf.bert, hf.classification, hf.undivided_loss, None),
    "gpt2": (hf.gpt2, hf.language, hf.counted_loss, items),
    "norms": (hf.norms, hf.points, hf.mean_loss, None),
}


def assert_same(trainer, model, by_hand, history):
    """Weights, buffers, losses, norms and sharpness are the same bits."""
    for (name, ours), theirs in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert hf.logged(trainer, "loss") == history.losses
    assert hf.logged(trainer, "sharpness/sam") == history.sharpness
    if history.grad_norms:
        assert hf.logged(trainer, "grad_norm") == history.grad_norms


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_clipping(kind, accumulate, max_grad_norm, tmp_path):
    build, rows, loss_of, count = KINDS[kind]
    data = rows()  # 26 rows, 7 batches: the last batch and the last window of an epoch are partial
    model, by_hand = build(), build()
    trainer = hf.make_trainer(
        tmp_path, model, data, gradient_accumulation_steps=accumulate, max_grad_norm=max_grad_norm
    )
    trainer.train()
    history = hf.train_by_hand(
        by_hand, hf.batches_of(data), loss_of, accumulate=accumulate, max_grad_norm=max_grad_norm, count=count
    )
    assert_same(trainer, model, by_hand, history)


def test_the_hand_written_loop_is_the_textbook(tmp_path):
    """The engine aside: plain torch with the perturbation in fp64 gives the same weights up to fp32 rounding."""
    data = hf.points()
    model, textbook = hf.norms(), hf.norms()
    trainer = hf.make_trainer(
        tmp_path, model, data, base=hf.momentum_sgd, num_train_epochs=1, lr_scheduler_type="constant"
    )
    for layer in [*model.modules(), *textbook.modules()]:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    trainer.train()
    base = hf.momentum_sgd(textbook)
    for batch in hf.batches_of(data):
        buffers = []

        def backward(batch=batch, buffers=buffers):
            if buffers:
                before = {name: buffer.clone() for name, buffer in textbook.named_buffers()}
            loss = textbook(**batch)["loss"]
            loss.backward()
            if buffers:
                for name, buffer in textbook.named_buffers():
                    buffer.copy_(before[name])
            buffers.append(True)
            return loss

        cases.second_gradient(list(textbook.parameters()), backward, cases.sam_epsilon, 0.05)
        base.step()
    for ours, theirs in zip(model.state_dict().values(), textbook.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clipping_by_value(tmp_path):
    class ClipByValue(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            nn.utils.clip_grad_value_(kwargs["model"].parameters(), 0.01)

    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, callbacks=[ClipByValue()], gradient_accumulation_steps=2)
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), accumulate=2, clip_value=0.01)
    assert_same(trainer, model, by_hand, history)


@pytest.mark.parametrize(
    ("options", "sam"),
    [
        ({"sam": "asam"}, samopt.ASAM),
        ({"sam": "asam", "sam_rho": 0.2, "sam_eta": 0.1}, functools.partial(samopt.ASAM, rho=0.2, eta=0.1)),
        ({"sam": "sam", "sam_rho": 0.01, "sam_norm": "linf"}, functools.partial(samopt.SAM, rho=0.01, norm="linf")),
        ({"sam": "fisher-sam", "sam_rho": 0.2}, functools.partial(samopt.FisherSAM, rho=0.2)),
        ({"sam": "tram"}, samopt.TRAM),
        (
            {"sam": "tram", "sam_trust_region": "input_noise", "sam_noise_std": 0.3, "sam_scale": 5.0, "seed": 7},
            functools.partial(samopt.TRAM, trust_region=InputNoise(0.3, seed=7), scale=5.0),
        ),
        ({"sam": "functional-sam", "sam_rho": 0.3}, functools.partial(samopt.FunctionalSAM, rho=0.3)),
    ],
    ids=["asam", "asam-options", "linf", "fisher-sam", "tram", "tram-input-noise", "functional-sam"],
)
def test_the_arguments_choose_the_optimizer(options, sam, tmp_path):
    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, gradient_accumulation_steps=2, **options)
    trainer.train()
    assert_same(trainer, model, by_hand, hf.train_by_hand(by_hand, hf.batches_of(data), sam=sam, accumulate=2))


@pytest.mark.parametrize("sam", ["sam", "asam"])
def test_one_pass_along_the_momentum(sam, tmp_path):
    data = hf.classification()
    model, unchanged, by_hand = hf.bert(), hf.bert(), hf.bert()
    options = {"base": hf.momentum_sgd, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    kind = {"sam": samopt.SAM, "asam": samopt.ASAM}[sam]

    class Counting(SAMTrainer):
        calls = 0

        def compute_loss(self, *args, **options):
            self.calls += 1
            assert not self.is_second_pass
            return super().compute_loss(*args, **options)

    trainer = hf.make_trainer(tmp_path, model, data, kind=Counting, sam=sam, sam_direction="momentum", **options)
    trainer.train()
    assert trainer.calls == 14
    assert hf.logged(trainer, "sharpness/radius")[1:] == pytest.approx([trainer.sam_optimizer.option({}, "rho")] * 7)
    # An unchanged Trainer, given the optimizer.
    options["base"] = lambda model: kind(hf.momentum_sgd(model), direction="momentum", model=model)
    plain = {"kind": transformers.Trainer, "arguments": transformers.TrainingArguments}
    hf.make_trainer(tmp_path, unchanged, data, **plain, **options).train()
    assert cases.same_bits(model, cases.bits(unchanged))
    # A loop by hand.
    base = hf.momentum_sgd(by_hand)
    optimizer = kind(base, direction="momentum", model=by_hand)
    by_hand.train()
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: (8 - step) / 8)
    batches = hf.batches_of(data)
    for step, window in enumerate([batches[start : start + 2] for start in range(0, 7, 2)] * 2):
        torch.manual_seed(1000 + step)
        for batch in window:
            by_hand(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert cases.same_bits(model, cases.bits(by_hand))


def test_the_optimizer_that_the_arguments_name_is_the_base(tmp_path):
    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, base=None, optim="sgd", learning_rate=0.1, weight_decay=0.01)
    trainer.train()

    def sgd(model):
        decayed = trainer.get_decay_parameter_names(model)
        return torch.optim.SGD(
            [
                {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.01},
                {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
            ],
            lr=0.1,
        )

    assert_same(trainer, model, by_hand, hf.train_by_hand(by_hand, hf.batches_of(data), base=sgd))


class Halving(torch.optim.AdamW):
    """Stands in for APOLLO, which projects the gradients of groups that have a rank: it halves them."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if "rank" in group else ():
                p.grad *= 0.5
        return super().step(closure)


def test_the_target_modules_of_a_low_rank_optimizer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apollo_torch", SimpleNamespace(APOLLOAdamW=Halving))
    monkeypatch.setattr("transformers.trainer_optimizer.is_apollo_torch_available", lambda: True)
    data = hf.classification()
    model, by_hand = hf.bert(), hf.bert()
    hf.adamw(model)  # torch gives a class's step its hooks at first use: AdamW's, inside Halving's, now runs them too
    targets = ["attention", "intermediate"]
    options = {"base": None, "optim": "apollo_adamw", "optim_target_modules": targets, "learning_rate": 1e-2}
    trainer = hf.make_trainer(tmp_path, model, data, gradient_accumulation_steps=2, **options)
    trainer.train()

    def halving(model):
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        chosen = {name for name in linear if any(target in name for target in targets)}
        assert 0 < len(chosen) < len(linear)
        others = [p for name, p in model.named_parameters() if name not in chosen]
        low_rank = [p for name, p in model.named_parameters() if name in chosen]
        return Halving([{"params": others}, {"params": low_rank, "rank": 1}], lr=1e-2)

    history = hf.train_by_hand(by_hand, hf.batches_of(data), hf.undivided_loss, base=halving, accumulate=2)
    assert_same(trainer, model, by_hand, history)
    assert isinstance(trainer.sam_optimizer.base_optimizer, Halving)


def test_options_of_a_parameter_group_are_kept(tmp_path):
    def grouped(model):
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        return torch.optim.AdamW([{"params": weights, "rho": 0.1}, {"params": others, "perturb": False}], lr=1e-2)

    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, base=grouped)
    trainer.train()
    assert_same(trainer, model, by_hand, hf.train_by_hand(by_hand, hf.batches_of(data), base=grouped))
    assert [group["rho"] for group in trainer.sam_optimizer.param_groups] == [0.1, 0.05]


@pytest.mark.parametrize("only", ["norm", r"^layers\.[15]\."])
def test_only_moves_what_groups_with_perturb_would(tmp_path, only):
    norms = ("layers.1.", "layers.5.")

    def base(perturbs):
        return lambda model: torch.optim.AdamW(
            [{"params": [p], "perturb": perturbs(name)} for name, p in model.named_parameters()], lr=1e-2
        )

    data = hf.points()
    models = [hf.norms(), hf.norms()]
    ours = hf.make_trainer(tmp_path, models[0], data, base=base(lambda name: True), sam_rho=0.3, sam_only=only)
    theirs = hf.make_trainer(tmp_path, models[1], data, base=base(lambda name: name.startswith(norms)), sam_rho=0.3)
    for trainer in (ours, theirs):
        trainer.train()
    assert len(ours.sam_optimizer.perturbed_parameters) == 4
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_compute_loss_func(tmp_path):
    def summed(outputs, labels, num_items_in_batch):
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return loss / num_items_in_batch

    def by_hand_loss(model, batch, count, accumulate):
        return summed(model(x=batch["x"]), batch["labels"], count)

    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(
        tmp_path, model, data, gradient_accumulation_steps=3, trainer_options={"compute_loss_func": summed}
    )
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), by_hand_loss, accumulate=3, count=items)
    assert_same(trainer, model, by_hand, history)


def test_compute_loss_that_consumes_and_changes_its_inputs(tmp_path):
    class Consuming(SAMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            inputs["x"].mul_(2)  # in place, on what the data loader gave
            inputs["x"] += torch.randn_like(inputs["x"]) / 10  # random numbers outside the model's forward
            return nn.functional.cross_entropy(model(**inputs)["logits"], labels)

    def by_hand_loss(model, batch, count, accumulate):
        x = 2 * batch["x"]
        x = x + torch.randn_like(x) / 10
        return nn.functional.cross_entropy(model(x)["logits"], batch["labels"]) / accumulate

    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, kind=Consuming, gradient_accumulation_steps=2)
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), by_hand_loss, accumulate=2)
    assert_same(trainer, model, by_hand, history)


def test_label_smoothing(tmp_path):
    def smoothed(model, batch, count, accumulate):
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=0.1) / count

    data = hf.classification()
    model, by_hand = hf.bert(), hf.bert()
    trainer = hf.make_trainer(
        tmp_path, model, data, base=hf.momentum_sgd, label_smoothing_factor=0.1, gradient_accumulation_steps=2
    )
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), smoothed, base=hf.momentum_sgd, accumulate=2, count=items)
    assert hf.logged(trainer, "loss") == pytest.approx(history.losses, rel=1e-5)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # the smoothing sums in another order


@pytest.mark.parametrize("sam", [samopt.SAM, samopt.FunctionalSAM])
def test_bf16_autocast(sam, tmp_path):
    """The Trainer casts the logits that the model returns, after the model computed its loss."""
    data = hf.classification()
    model, by_hand = hf.bert(), hf.bert()
    name = {samopt.SAM: "sam", samopt.FunctionalSAM: "functional-sam"}[sam]
    trainer = hf.make_trainer(tmp_path, model, data, bf16=True, gradient_accumulation_steps=2, sam=name)
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), hf.undivided_loss, accumulate=2, autocast=True, sam=sam)
    assert_same(trainer, model, by_hand, history)


def test_bf16_weights(tmp_path):
    data = hf.classification()
    model, by_hand = hf.bert().bfloat16(), hf.bert().bfloat16()
    trainer = hf.make_trainer(tmp_path, model, data, seed=7)
    trainer.train()
    sam = functools.partial(samopt.SAM, seed=7)
    assert_same(trainer, model, by_hand, hf.train_by_hand(by_hand, hf.batches_of(data), hf.undivided_loss, sam=sam))


def test_seq2seq_trainer(tmp_path):
    @dataclass
    class Arguments(SAMArguments, transformers.Seq2SeqTrainingArguments):
        pass

    class Seq2Seq(SAMTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    data = hf.language()
    model, by_hand = hf.t5(), hf.t5()
    trainer = hf.make_trainer(
        tmp_path,
        model,
        data,
        kind=Seq2Seq,
        arguments=Arguments,
        sam="asam",
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        predict_with_generate=True,
        generation_max_length=4,
        trainer_options={"eval_dataset": data[:4]},
    )
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), hf.undivided_loss, sam=samopt.ASAM, accumulate=2)
    assert_same(trainer, model, by_hand, history)


def test_peft_adapter(tmp_path):
    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules=["query", "value"], lora_dropout=0.1, modules_to_save=["classifier"]
        )
        return peft.get_peft_model(hf.bert(), config)

    data = hf.classification()
    model, by_hand = adapted(), adapted()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = hf.make_trainer(tmp_path, model, data, gradient_accumulation_steps=2)
    trainer.train()
    history = hf.train_by_hand(by_hand, hf.batches_of(data), hf.undivided_loss, accumulate=2)
    assert_same(trainer, model, by_hand, history)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_a_trainable_parameter_that_the_optimizer_does_not_have(tmp_path):
    """Its gradient counts in the clipped norm once, as without SAM."""

    def without_the_first(model):
        return torch.optim.SGD(list(model.parameters())[1:], lr=0.1)

    data = hf.points()
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, base=without_the_first, max_grad_norm=0.3)
    trainer.train()

    def zeroed(model, batch, count, accumulate):
        first = next(model.parameters())
        first.grad = None
        return hf.mean_loss(model, batch, count, accumulate)

    history = hf.train_by_hand(by_hand, hf.batches_of(data), zeroed, base=without_the_first, max_grad_norm=0.3)
    assert_same(trainer, model, by_hand, history)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, tmp_path):
    data = hf.classification()
    model, plain = hf.bert(), hf.bert()
    # transformers 5.23 has new names for the arguments; 5.20, the newest for Python 3.10, has not.
    named = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in named else "gradient_checkpointing"
    options = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    trainer = hf.make_trainer(tmp_path, model, data, **options)
    trainer.train()
    assert_same(trainer, model, plain, hf.train_by_hand(plain, hf.batches_of(data), hf.undivided_loss))


def test_frozen_parameters(tmp_path):
    def frozen():
        model = hf.bert()
        model.bert.embeddings.requires_grad_(False)
        return model

    data = hf.classification()
    model, by_hand = frozen(), frozen()
    before = [p.clone() for p in model.bert.embeddings.parameters()]
    trainer = hf.make_trainer(tmp_path, model, data)
    trainer.train()
    assert_same(trainer, model, by_hand, hf.train_by_hand(by_hand, hf.batches_of(data), hf.undivided_loss))
    assert all(torch.equal(p, b) for p, b in zip(model.bert.embeddings.parameters(), before, strict=True))


def test_an_iterable_dataset_whose_epochs_end_inside_a_window(tmp_path):
    """Trainer carries the gradients of such a window over to the next epoch; the second pass covers them too."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(hf.points(20))  # 5 batches an epoch, in windows of 2

    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(
        tmp_path, model, Stream(), gradient_accumulation_steps=2, max_steps=6, lr_scheduler_type="constant"
    )
    trainer.train()
    optimizer = samopt.SAM(hf.adamw(by_hand), model=by_hand)
    by_hand.train()
    first, second, third = (hf.batches_of(hf.points(20))[start : start + 2] for start in (0, 2, 4))
    pending = []
    step = 0
    for window in [first, second, third] * 2 + [first, second]:
        torch.manual_seed(1000 + step)
        for batch in window:
            pending.append((batch, len(window), torch.get_rng_state()))
            hf.mean_loss(by_hand, batch, None, len(window)).backward()
        if len(window) == 2:
            with optimizer.perturbed():
                for batch, parts, state in pending:
                    torch.set_rng_state(state)
                    hf.mean_loss(by_hand, batch, None, parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            pending = []
            step += 1
    assert trainer.state.global_step == 6
    for ours, theirs in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_any_trainer_by_mixin_or_afterwards_is_the_same(tmp_path):
    from samopt.integrations.transformers import make_sharpness_aware

    every = []  # of no Trainer, so that nothing is put back

    class Mine(transformers.Trainer):
        calls = 0

        def training_step(self, *args, **kwargs):
            self.calls += 1
            every.append(self)
            return super().training_step(*args, **kwargs)

    class MineWithSAM(SAMTrainerMixin, Mine):
        pass

    data = hf.points()
    by_mixin, afterwards = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, by_mixin, data, kind=MineWithSAM)
    trainer.train()
    plain = hf.make_trainer(tmp_path, afterwards, data, kind=Mine, arguments=transformers.TrainingArguments)
    assert make_sharpness_aware(plain, sam="sam") is plain
    plain.train()
    assert cases.same_bits(by_mixin, cases.bits(afterwards))
    assert every.count(trainer) == every.count(plain) == 28  # 7 batches, 2 epochs, 2 passes
    assert trainer.calls == plain.calls == 14  # the second pass does not count
    assert isinstance(plain, Mine)


def test_the_class_alone_changes_nothing(tmp_path):
    data = hf.points()
    model, plain = hf.norms(), hf.norms()
    hf.make_trainer(tmp_path, model, data, sam="none", gradient_accumulation_steps=2).train()
    hf.make_trainer(
        tmp_path,
        plain,
        data,
        kind=transformers.Trainer,
        arguments=transformers.TrainingArguments,
        gradient_accumulation_steps=2,
    ).train()
    assert cases.same_bits(model, cases.bits(plain))
    assert isinstance(SAMTrainingArguments(str(tmp_path)), transformers.TrainingArguments)


def test_a_compiled_model_is_compiled_as_often_as_without_sam(tmp_path):
    class Frames(transformers.TrainerCallback):
        def __init__(self):
            self.compiled = []

        def on_step_end(self, args, state, control, **kwargs):
            self.compiled.append(counters["frames"]["ok"])

    def run(model, sam, **options):
        torch._dynamo.reset()
        counters.clear()
        frames = Frames()
        hf.make_trainer(tmp_path, model, hf.classification(24), sam=sam, callbacks=[frames], **options).train()
        return frames.compiled

    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain = run(hf.bert(), "none", **compiling)
    compiled, eager = hf.bert(), hf.bert()
    frames = run(compiled, "sam", **compiling)
    assert frames == plain  # after each step: the second pass finds the config as the first one found it
    assert frames[-1] > 0
    assert run(eager, "sam")[-1] == 0
    assert cases.same_bits(compiled, cases.bits(eager))
