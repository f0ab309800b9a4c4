"""One pass: several optimizers over one model, the end of one's work, and a model that stays the user's."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import samopt
from samopt.parts.direction import Momentum
from tests.helpers.cases import batch, bits, loss_of, mlp, sam_epsilon, same_bits
from tests.helpers.one_pass import RHO, assert_close, hand_step, momenta_of, one_pass, sgd

DOUBLE = torch.float64
OLDER = "the older one no longer perturbs the model"


def step_once(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, batch(DOUBLE, seed=step)).backward()
    optimizer.step()


def trained(**options):
    model = mlp(DOUBLE)
    optimizer = one_pass(model, **options)
    for step in range(2):
        step_once(model, optimizer, step)
    return model, optimizer


def plain_steps(model, make, steps=3):
    optimizer = make(model.parameters())
    for step in range(steps):
        step_once(model, optimizer, step)
    return optimizer


def hand_steps(model, stock, steps, **options):
    for step in steps:
        hand_step(stock, lambda step=step: loss_of(model, batch(DOUBLE, seed=step)).backward(), **options)


MAKERS = {
    "one pass": lambda model: one_pass(model),
    "one pass without model": lambda model: samopt.MomentumSAM(sgd(model.parameters()), rho=RHO),
    "two passes": lambda model: samopt.SAM(sgd(model.parameters()), rho=RHO, model=model),
    "the same base": None,
}


@pytest.mark.parametrize("newer", MAKERS)
def test_a_newer_optimizer_over_the_same_weights_replaces_the_older_with_a_warning(newer) -> None:
    model, older = trained()
    twin = copy.deepcopy(model)
    stock = sgd(twin.parameters())
    with pytest.warns(UserWarning, match=OLDER) as caught:
        if newer == "the same base":
            optimizer = samopt.MomentumSAM(older.base_optimizer, rho=RHO, model=model)
            stock.load_state_dict(copy.deepcopy(older.base_optimizer.state_dict()))
        else:
            optimizer = MAKERS[newer](model)
    (said_at,) = [warning.filename for warning in caught if OLDER in str(warning.message)]
    assert "/tests/" in said_at
    if newer == "two passes":
        exact = bits(model)
        seen = model(batch(DOUBLE)[0])
        assert torch.equal(seen, twin(batch(DOUBLE)[0])) and same_bits(model, exact)
        return
    for step in range(3):
        data = batch(DOUBLE, seed=step)
        optimizer.zero_grad()
        if newer == "one pass without model":
            with optimizer.perturbed():
                loss_of(model, data).backward()
        else:
            loss_of(model, data).backward()
        optimizer.step()
    hand_steps(twin, stock, range(3))
    assert_close(model, twin)


PLAIN = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "groups": lambda p: torch.optim.SGD([{"params": [w], "lr": 0.1} for w in p]),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_an_unused_optimizer_that_lives_on_does_not_change_a_plain_ones_training(kind) -> None:
    model, kept = trained()
    twin = copy.deepcopy(model)
    plain_steps(model, PLAIN[kind])
    plain_steps(twin, PLAIN[kind])
    assert same_bits(model, bits(twin))
    assert kept is not None


def test_an_optimizer_that_is_used_again_perturbs_again() -> None:
    model, optimizer = trained()
    twin = copy.deepcopy(model)
    stock = sgd(twin.parameters())
    stock.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))
    plain_steps(model, PLAIN["sgd"])
    plain_steps(twin, PLAIN["sgd"])
    for step in range(5, 8):
        step_once(model, optimizer, step)
    hand_steps(twin, stock, range(5, 8))
    assert_close(model, twin)


def test_folds_in_one_process_are_as_the_first() -> None:
    model = mlp(DOUBLE)
    start = copy.deepcopy(model.state_dict())
    ends, kept = [], []
    for fold in range(3):
        model.load_state_dict(start)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = one_pass(model)
        for step in range(4):
            step_once(model, optimizer, step)
        ends.append(bits(model))
        if fold == 1:
            optimizer.detach()
            kept.append(optimizer)  # the third is made beside one that was detached
        del optimizer
        gc.collect()
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


def test_two_optimizers_on_parts_of_the_weights_are_both_at_work() -> None:
    """Matrices in one, vectors in another, as with Muon and AdamW; each has its own radius and norm."""

    def split(model):
        return [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]

    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    bases = [make(part) for make, part in zip((sgd, PLAIN["adamw, fused"]), split(model), strict=True)]
    stocks = [make(part) for make, part in zip((sgd, PLAIN["adamw, fused"]), split(twin), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = [samopt.MomentumSAM(base, rho=rho, model=model) for base, rho in zip(bases, (0.5, 0.1), strict=True)]
    for step in range(4):
        data = batch(DOUBLE, seed=step)
        for optimizer in both:
            optimizer.zero_grad()
        exact = bits(model)
        loss_of(model, data).backward()
        assert same_bits(model, exact)
        for optimizer in both:
            optimizer.step()

        parts, start = split(twin), bits(twin)
        with torch.no_grad():
            for part, stock, rho in zip(parts, stocks, (0.5, 0.1), strict=True):
                moves = sam_epsilon(part, momenta_of(stock), [rho] * len(part))
                for p, move in zip(part, moves, strict=True):
                    p.sub_(move)
        twin.zero_grad()
        loss_of(twin, data).backward()
        with torch.no_grad():
            for p, value in zip(twin.parameters(), start, strict=True):
                p.copy_(value)
        for stock in stocks:
            stock.step()
    assert_close(model, twin)


def test_the_generators_step_through_a_watched_discriminator_is_exact() -> None:
    def make():
        torch.manual_seed(0)
        return nn.Linear(3, 6).double(), mlp(DOUBLE)

    (generator, critic), (twin, other) = make(), make()
    optimizers = one_pass(critic, "adamw"), torch.optim.Adam(generator.parameters(), lr=1e-2)
    stocks = torch.optim.AdamW(other.parameters(), lr=0.01, foreach=False), torch.optim.Adam(twin.parameters(), lr=1e-2)

    def critic_loss(made, module, step):
        real = batch(DOUBLE, seed=step)[0]
        noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(step), dtype=DOUBLE)
        return module(real).mean() - module(made(noise).detach()).square().mean(), noise

    for step in range(4):
        optimizers[0].zero_grad()
        loss, noise = critic_loss(generator, critic, step)
        loss.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        with optimizers[0].exact():
            critic(generator(noise)).mean().backward()
        optimizers[1].step()

        hand_step(stocks[0], lambda step=step: critic_loss(twin, other, step)[0].backward())
        stocks[1].zero_grad()
        other(twin(noise)).mean().backward()
        stocks[1].step()
    assert_close(critic, other)
    assert_close(generator, twin)


@pytest.mark.parametrize("clear", ["optimizer, before", "optimizer, after", "model, after"])
def test_a_critic_that_is_frozen_in_the_generators_step_is_exact_there_and_moved_in_its_own(clear) -> None:
    def make():
        torch.manual_seed(0)
        return nn.Linear(3, 6).double(), mlp(DOUBLE)

    (generator, critic), (twin, other) = make(), make()
    optimizers = one_pass(critic, "adamw"), torch.optim.SGD(generator.parameters(), lr=0.1)
    stocks = torch.optim.AdamW(other.parameters(), lr=0.01, foreach=False), torch.optim.SGD(twin.parameters(), lr=0.1)
    real, noise = batch(DOUBLE)[0], torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)

    def critic_loss(made, module):
        return module(real).mean() - module(made(noise).detach()).square().mean()

    for _ in range(4):
        if clear == "optimizer, before":
            optimizers[0].zero_grad()
        critic_loss(generator, critic).backward()
        optimizers[0].step()
        if clear != "optimizer, before":
            (critic if clear == "model, after" else optimizers[0]).zero_grad()
        critic.requires_grad_(False)
        optimizers[1].zero_grad()
        critic(generator(noise)).mean().backward()
        optimizers[1].step()
        critic.requires_grad_(True)

        hand_step(stocks[0], lambda: critic_loss(twin, other).backward())
        stocks[1].zero_grad()
        other(twin(noise)).mean().backward()
        stocks[1].step()
    assert_close(critic, other)
    assert_close(generator, twin)


def test_given_tensors_are_left_alone() -> None:
    model, _ = trained()
    plain = copy.deepcopy(model)
    x, y = batch(DOUBLE)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    exact = bits(model)

    def per_sample(module):
        def loss(given, row, label):
            return nn.functional.cross_entropy(functional_call(module, given, (row[None],)), label[None])

        return loss

    for given in (parameters, dict(model.named_parameters())):
        got = vmap(grad(per_sample(model)), in_dims=(None, 0, 0))(given, x, y)
        want = vmap(grad(per_sample(plain)), in_dims=(None, 0, 0))(parameters, x, y)
        assert all(map(torch.equal, got.values(), want.values()))
    for transform in (jacrev, hessian):
        got = transform(lambda given: functional_call(model, given, (x[:2],)).sum(0))(parameters)
        want = transform(lambda given: functional_call(plain, given, (x[:2],)).sum(0))(parameters)
        for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
            assert torch.equal(a, b)
    fast = {name: (p * 2).requires_grad_() for name, p in parameters.items()}
    assert torch.equal(functional_call(model, fast, (x,)), functional_call(plain, fast, (x,)))
    assert same_bits(model, exact)


SAVES = ["torch.save", "deepcopy", "pickle", "copy of both"]


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("moment", ["before a step", "between steps", "after a forward"])
def test_a_saved_or_copied_model_holds_nothing_of_samopt(moment, how) -> None:
    model, optimizer = trained() if moment != "before a step" else (mlp(DOUBLE), None)
    optimizer = optimizer or one_pass(model)
    if moment == "after a forward":
        loss_of(model, batch(DOUBLE))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        assert b"samopt" not in file.getvalue()
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif how == "pickle":
        data = pickle.dumps(model)
        assert b"samopt" not in data
        other = pickle.loads(data)
    elif how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        other, _ = copy.deepcopy((model, optimizer))
    assert same_bits(other, bits(model))
    if how != "copy of both":
        assert all(
            vars(module).keys() == vars(plain).keys()
            for module, plain in zip(other.modules(), mlp().modules(), strict=True)
        )


def test_a_saved_model_loads_where_samopt_is_not_installed(tmp_path) -> None:
    model, _ = trained()
    recurrent = nn.LSTM(3, 2)
    kept = one_pass(recurrent)
    recurrent(torch.ones(2, 1, 3))[0].sum().backward()
    kept.step()
    torch.save(nn.ModuleList([model, recurrent]), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['samopt'] = None; "
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "print(model[1](torch.ones(2, 1, 3))[0].sum().item())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(found) == pytest.approx(recurrent.eval()(torch.ones(2, 1, 3))[0].sum().item())


def test_export_needs_no_detach_and_script_does() -> None:
    model, optimizer = trained()
    x = batch(DOUBLE)[0]
    want = copy.deepcopy(model)(x)
    program = torch.export.export(model, (x,))  # in training, as it is
    assert torch.equal(program.module()(x), want)
    assert torch.equal(torch.export.export(model.eval(), (x,)).module()(x), want)
    optimizer.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert torch.equal(torch.jit.script(model)(x), want)


def test_a_call_with_fake_tensors_belongs_to_no_pass() -> None:
    """It only finds out shapes. The export of torch 2.4 makes such a call, which does not count as compiled."""
    (model, optimizer), (other, untouched) = trained(), trained()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.ones(5, 6, dtype=DOUBLE)).shape == (5, 3)
    for step in range(2, 4):
        step_once(model, optimizer, step)
        step_once(other, untouched, step)
    assert same_bits(model, bits(other))


@pytest.mark.parametrize("recorder", ["trace", "make_fx"])
@pytest.mark.parametrize("kind", [samopt.MomentumSAM, samopt.FlatLoRA])
def test_what_is_recorded_in_training_is_the_exact_model_and_leaves_the_run_alone(kind, recorder) -> None:
    models = []
    for looks in (True, False):
        model = mlp(DOUBLE)
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=model)
        for step in range(4):
            if looks and step == 2:
                x = batch(DOUBLE)[0]
                want = copy.deepcopy(model)(x)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    recorded = torch.jit.trace(model, x) if recorder == "trace" else make_fx(model)(x)
                torch.testing.assert_close(recorded(x), want, rtol=0, atol=0)
            step_once(model, optimizer, step)
        models.append(model)
    assert same_bits(models[0], bits(models[1]))


def test_a_scripted_part_is_left_at_the_exact_weights() -> None:
    """Compiled TorchScript has parameters of its own making, which nothing replaces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(12, 3).double())
    model = nn.Sequential(nn.Linear(6, 12).double(), scripted)
    optimizer = one_pass(model)
    step_once(model, optimizer, 0)
    exact = bits(model)
    step_once(model, optimizer, 1)
    assert not same_bits(model, exact)


@pytest.mark.parametrize("base", ["sgd", "adagrad"])
def test_an_average_of_samopts_own_serves_any_base(base) -> None:
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1), "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1)}[base]
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.SAM(make(model.parameters()), rho=RHO, direction=Momentum(own=True, decay=0.8), model=model)
    stock = make(twin.parameters())
    averages = [None] * 4
    for step in range(5):
        if step == 3:  # a checkpoint is loaded into new objects
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = mlp(DOUBLE, seed=1)
            optimizer = samopt.SAM(
                make(model.parameters()), rho=RHO, direction=Momentum(own=True, decay=0.8), model=model
            )
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        step_once(model, optimizer, step)
        given = {p: average for p, average in zip(twin.parameters(), averages, strict=True)}

        def epsilon(weights, momenta, rhos, given=given):
            return sam_epsilon(weights, list(given.values()), rhos)

        def backward(step=step):
            loss_of(twin, batch(DOUBLE, seed=step)).backward()
            for index, p in enumerate(twin.parameters()):
                before = torch.zeros_like(p) if averages[index] is None else averages[index]
                averages[index] = 0.8 * before + 0.2 * p.grad

        hand_step(stock, backward, epsilon=epsilon)
    assert_close(model, twin)


class Keeping(torch.optim.Optimizer):
    """SGD that keeps a running average in a form of its own."""

    def __init__(self, parameters, form):
        self.form = form
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first = self.state[group["params"][0]]
            for p in group["params"]:
                if self.form == "stacked":
                    first["momentum_buffer"] = torch.zeros(len(group["params"]), *group["params"][0].shape)
                elif self.form == "int8":
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.int8)
                elif self.form == "float8":
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32).to(torch.float8_e4m3fn)
                elif self.form == "flat":
                    self.state[p]["exp_avg"] = torch.zeros(p.numel())
                elif self.form == "list":
                    self.state[p]["exp_avg"] = [torch.zeros_like(p)]
                elif self.form == "elsewhere":
                    self.state["momentum_buffer"] = torch.zeros(3)
                elif self.form == "named otherwise":
                    self.state[p]["m"] = torch.zeros_like(p)
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("form", ["stacked", "int8", "flat", "list", "elsewhere", "named otherwise", "nothing"])
@pytest.mark.parametrize("loop", ["unchanged", "closure", "perturbed"])
def test_momentum_that_does_not_fit_is_refused_before_the_second_step(loop, form) -> None:
    model = mlp()
    optimizer = samopt.SAM(Keeping(model.parameters(), form), rho=RHO, direction="momentum", model=model)

    def step(seed):
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(seed=seed))
            loss.backward()
            return loss

        if loop == "closure":
            optimizer.step(closure)
        elif loop == "perturbed":
            with optimizer.perturbed():
                closure()
            optimizer.step()
        else:
            closure()
            optimizer.step()

    step(0)
    before = bits(model)
    with pytest.raises(ValueError, match=r"Keeping keeps .*Momentum\(own=True\)"):
        step(1)
    assert same_bits(model, before)


def test_named_momentum_serves() -> None:
    model = mlp()
    optimizer = samopt.SAM(
        Keeping(model.parameters(), "named otherwise"), rho=RHO, direction=Momentum(buffer="m"), model=model
    )
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, batch(seed=seed)).backward()
        optimizer.step()
    assert float(optimizer.last_step.applied_radius) == 0  # it is zero


@pytest.mark.parametrize("what", ["all", "one parameter"])
def test_a_base_whose_state_was_reset_begins_again(what) -> None:
    """A restart clears the base's state in the middle of a run: the next step moves what has a momentum."""
    ours, theirs = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, stock = one_pass(ours), sgd(theirs.parameters())
    for step in range(5):
        if step == 3:
            for base, model in ((optimizer.base_optimizer, ours), (stock, theirs)):
                if what == "all":
                    base.state.clear()
                else:
                    base.state.pop(next(model.parameters()))
        step_once(ours, optimizer, step)
        hand_step(stock, lambda step=step: loss_of(theirs, batch(DOUBLE, seed=step)).backward())
    assert_close(ours, theirs)


def test_sgd_without_momentum_is_refused_when_it_is_wrapped() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"SGD has momentum=0.*Momentum\(own=True\)"):
        samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), direction="momentum", model=model)
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())


class Normed(nn.Module):
    """Writes into its own weight in its forward."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(3, 6)), how

    def forward(self, x):
        norms = self.weight.detach().norm(dim=1, keepdim=True)
        with torch.no_grad():
            if self.how == "in place":
                self.weight.div_(norms)
            elif self.how == "augmented":
                self.weight /= norms
            elif self.how == "out=":
                torch.div(self.weight, norms, out=self.weight)
            elif self.how == "a row":
                self.weight[0] = self.weight[0] / norms[0]
            elif self.how == "data in place":
                self.weight.data.div_(norms)
            elif self.how == "data assigned":
                self.weight.data = self.weight.data / norms
            elif self.how == "data of a slice":
                self.weight.data[0].clamp_(-1e-3, 1e-3)
            elif self.how == "copy_":
                self.weight.copy_(self.weight / norms)
            elif self.how == "renorm_":
                self.weight.renorm_(2, 0, 0.01)
        return x @ self.weight.T


WRITING = [
    "in place", "augmented", "out=", "a row", "data in place", "data assigned", "data of a slice", "copy_", "renorm_",
]  # fmt: skip


@pytest.mark.parametrize("how", WRITING)
def test_a_forward_that_writes_into_its_own_weight_is_refused_by_name(how) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Normed("no"), nn.Linear(3, 3))
    optimizer = one_pass(model)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(seed=step)).backward()
        optimizer.step()
    model[0].how = how
    exact = bits(model)
    with pytest.raises(RuntimeError, match=r"wrote into its own weight Normed\.weight.*use two passes"):
        loss_of(model, batch(seed=2))
    assert same_bits(model, exact)
    assert not any("weight" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused_by_name(kind) -> None:
    torch.manual_seed(0)
    table = kind(7, 3, max_norm=0.1)
    optimizer = one_pass(table)
    rows = torch.arange(6).view(2, 3)
    table(rows).sum().backward()  # no momentum yet, so it is the plain forward
    optimizer.step()
    exact = bits(table)
    with pytest.raises(RuntimeError, match=rf"wrote into its own weight {kind.__name__}\.weight.*max_norm"):
        table(rows)
    assert same_bits(table, exact)


def test_a_forward_that_writes_into_other_state_is_not_refused() -> None:
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(DOUBLE)
            self.frozen = nn.Parameter(torch.zeros(3, dtype=DOUBLE), requires_grad=False)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            out = self.body(x)
            self.seen += 1
            self.frozen.copy_(out.detach().mean(0))
            self.last = out
            self.added = nn.Parameter(torch.ones(2))

    model = Counting()
    optimizer = one_pass(model)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(DOUBLE, seed=step)[0])  # returns nothing
        model.last.square().mean().backward()
        optimizer.step()
    assert model.seen == 3 and float(model.frozen.norm()) > 0 and model.added.requires_grad


def test_a_forward_that_returns_nothing_is_checked_too() -> None:
    class Silent(Normed):
        def forward(self, x):
            self.out = super().forward(x)

    model = Silent("no")
    optimizer = one_pass(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()[0])
        model.out.square().mean().backward()
        optimizer.step()
    model.how = "in place"
    with pytest.raises(RuntimeError, match=r"wrote into its own weight Silent\.weight"):
        model(batch()[0])


@pytest.mark.parametrize("slots", [True, False])
def test_outputs_of_every_kind_are_differentiated_at_one_point(slots) -> None:
    import dataclasses

    Output = dataclasses.make_dataclass("Output", [("logits", Tensor)], slots=slots)

    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(DOUBLE)

        def forward(self, x):
            return Output(self.body(x))

    model, twin = Returning(), Returning()
    optimizer, stock = one_pass(model), sgd(twin.parameters())
    for step in range(4):
        x, y = batch(DOUBLE, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).logits, y).backward()
        optimizer.step()
        hand_step(stock, lambda x=x, y=y: nn.functional.cross_entropy(twin(x).logits, y).backward())
    assert_close(model, twin)


PARTS = {
    "encoder, then model": lambda m, x, y: m[1](m[0](x)).square().mean() + nn.functional.cross_entropy(m(x), y),
    "model, then encoder": lambda m, x, y: nn.functional.cross_entropy(m(x), y) + m[1](m[0](x)).square().mean(),
    "parts only": lambda m, x, y: nn.functional.cross_entropy(m[2](m[1](m[0](x))), y),
    "the forward of a part": lambda m, x, y: nn.functional.cross_entropy(m[2].__call__(m[1](m[0](x))), y),
}


@pytest.mark.parametrize("parts", PARTS)
def test_parts_may_be_called_on_their_own(parts) -> None:
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, stock = one_pass(model), sgd(twin.parameters())
    for step in range(4):
        data = batch(DOUBLE, seed=step)
        optimizer.zero_grad()
        PARTS[parts](model, *data).backward()
        optimizer.step()
        hand_step(stock, lambda data=data: PARTS[parts](twin, *data).backward())
    assert_close(model, twin)
