"""The second pass draws what the first drew, and every random stream ends where a plain run ends."""

from __future__ import annotations

import copy
import gc
import io
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import samopt
from samopt._replay.forward_calls import RngState
from tests.helpers.cases import two_pass_step, wrapped_step

forms = pytest.mark.parametrize("form", ["closure", "explicit"])


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)


def data(seed, size=10):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def dropout_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 20), nn.Dropout(0.3), nn.Linear(20, 3))


def watch_masks(model):
    """A list that receives, for each call of each dropout layer, which entries it kept."""
    masks = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, args, out: masks.append((out != 0) | (args[0] == 0)))
    return masks


def streams():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def seed_everything(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def same_streams(left, right):
    return torch.equal(left[0], right[0]) and left[1] == right[1] and np.array_equal(left[2][1], right[2][1])


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("form, given", [("closure", True), ("closure", False), ("explicit", True)])
def test_masks_repeat_and_every_stream_ends_where_a_plain_run_ends(form, given, calls):
    def one_pass(model, x):
        """Several calls, with draws of every kind between them and a call without grad that is not counted."""
        total = torch.zeros(())
        for _ in range(calls):
            if form == "closure":  # the explicit form replays the model's own draws only
                x = x + random.random() + torch.rand(()) + float(np.random.rand())
            with torch.no_grad():
                silent(x)
            total = total + loss_of(model, x)
        return total

    model, plain = dropout_model(), dropout_model()
    silent = model
    masks, plain_masks = watch_masks(model), watch_masks(plain)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model if given else None)
    for seed in range(3):
        x = data(seed)
        masks.clear()
        plain_masks.clear()
        seed_everything(seed)
        wrapped_step(optimizer, [lambda x=x: one_pass(model, x)] * 2, form)
        ours = streams()

        seed_everything(seed)
        silent = plain
        one_pass(plain, x).backward()
        silent = model
        assert same_streams(ours, streams())
        counted = [i for i in range(4 * calls) if i % 4 >= 2]  # two layers: a silent call, then a counted one
        assert len(masks) == 2 * len(plain_masks) == 8 * calls
        first, second = ([masks[i + start] for i in counted] for start in (0, 4 * calls))
        expected = [plain_masks[i] for i in counted]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, expected, strict=True))
        assert not torch.equal(first[0], masks[0]) and (calls == 1 or not torch.equal(first[0], first[2]))


def test_the_explicit_form_without_a_model_still_ends_where_a_plain_run_ends():
    model = dropout_model()
    masks = watch_masks(model)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    seed_everything(0)
    loss_of(model, data(0)).backward()
    after_first = streams()
    with optimizer.perturbed():
        (loss_of(model, data(0)) + random.random() + np.random.rand()).backward()
    assert same_streams(streams(), after_first)
    assert not torch.equal(masks[0], masks[2])  # what model= is for


@pytest.mark.parametrize(
    "between", ["an evaluation", "a silent call", "a failed pass", "a copy's pass", "another optimizer's step"]
)
def test_calls_outside_the_step_do_not_shift_the_masks(between):
    model = dropout_model()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    twin, masks = copy.deepcopy(model), watch_masks(model)
    other = samopt.SAM(torch.optim.SGD(twin.parameters(), lr=0.1), model=twin)

    def interlude():
        if between == "an evaluation":  # whose author forgot torch.no_grad
            model.eval()
            for seed in range(3):
                loss_of(model, data(seed))
                torch.rand(1)  # the loader's shuffling, say
            model.train()
        elif between == "a silent call":
            with torch.no_grad():
                loss_of(model, data(5))
        elif between == "a failed pass":
            loss_of(model, data(5))
            loss_of(model, data(6))
            optimizer.zero_grad()
        elif between == "a copy's pass":
            loss_of(twin, data(5)).backward()
        else:
            wrapped_step(other, [lambda: loss_of(twin, data(4))] * 2, "explicit")

    for seed in range(3):
        interlude()
        masks.clear()
        loss_of(model, data(seed)).backward()
        if between in ("a copy's pass", "another optimizer's step"):
            interlude()
        with optimizer.perturbed():
            loss_of(model, data(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(masks) == 4
        assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.block, self.last = nn.Linear(6, 20), nn.Sequential(), nn.Linear(20, 3)
        self.block = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 20), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x):
        hidden = self.first(x)
        if self.reentrant is None:
            return self.last(self.block(hidden))
        return self.last(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(3, 5, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x.unflatten(1, (2, 3)))[0][:, -1])


RANDOM_MODELS = {
    "checkpointed": (lambda: Checkpointed(False), lambda: Checkpointed(None)),
    "checkpointed, reentrant": (lambda: Checkpointed(True), lambda: Checkpointed(None)),
    "rnn": (lambda: Recurrent(nn.RNN),) * 2,
    "lstm": (lambda: Recurrent(nn.LSTM),) * 2,
    "gru": (lambda: Recurrent(nn.GRU),) * 2,
}


@forms
@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_random_models_take_the_step_of_a_loop_that_seeds_each_pass(kind, form):
    models = []
    for build in RANDOM_MODELS[kind]:
        torch.manual_seed(0)
        models.append(build().double())
    ours, theirs = models
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1), rho=0.3, model=ours)
    stock = torch.optim.SGD(theirs.parameters(), lr=0.1)

    def seeded(x, seed):
        torch.manual_seed(seed)
        return loss_of(theirs, x)

    for seed in range(3):
        x = data(seed).double()
        torch.manual_seed(seed)
        wrapped_step(optimizer, [lambda x=x: loss_of(ours, x)] * 2, form)
        two_pass_step(stock, [lambda x=x, s=seed: seeded(x, s)] * 2, [0.3] * len(list(theirs.parameters())), None)
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-12, atol=1e-12)


def test_what_follows_the_model_goes_with_the_optimizer():
    model = dropout_model()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss_of(model, data(0)).backward()
    with optimizer.perturbed():
        loss_of(model, data(0)).backward()
    optimizer.step()
    assert "_compiled_call_impl" in vars(model)  # where the model's calls are followed
    del optimizer, scheduler
    gc.collect()
    assert "_compiled_call_impl" not in vars(model)
    assert not model._forward_pre_hooks and not model._forward_hooks

    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    loss_of(model, data(0)).backward()
    alive = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_copies_of_a_hooked_model_are_free_of_the_optimizer():
    model = dropout_model()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    loss_of(model, data(0)).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    for twin in copies:
        torch.manual_seed(1)
        theirs = twin(data(0))
        torch.manual_seed(1)
        assert torch.equal(model(data(0)), theirs)
        optimizer = samopt.SAM(torch.optim.SGD(twin.parameters(), lr=0.1), model=twin)
        masks = watch_masks(twin)
        wrapped_step(optimizer, [lambda twin=twin: loss_of(twin, data(0))] * 2, "explicit")
        assert torch.equal(masks[0], masks[2])


def test_the_stream_of_apples_gpu_is_asked_for_without_naming_it(monkeypatch):
    streams = {"mps": torch.arange(4)}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: streams["mps"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: streams.update(mps=state))
    before = RngState.capture([torch.device("mps")])
    assert not before.has_moved()
    streams["mps"] = torch.ones(4)
    assert before.has_moved()
    before.restore()
    assert torch.equal(streams["mps"], torch.arange(4))


def test_deep_copies_that_torch_makes_by_hand_run_their_own_forward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3))
    plain = copy.deepcopy(model)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    assert all("_compiled_call_impl" not in vars(m) or vars(m)["_compiled_call_impl"] is None for m in twin.modules())
    twin(data(0))
    plain(data(0))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
        assert torch.equal(model.state_dict()[name], before[name])
    del optimizer


def test_a_module_that_is_compiled_later_stays_compiled_when_the_optimizer_lets_it_go() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    model[0].compile(backend="eager")
    compiled = vars(model[0])["_compiled_call_impl"]
    optimizer.detach()
    assert vars(model[0])["_compiled_call_impl"] is compiled
    assert vars(model[1]).get("_compiled_call_impl") is None
