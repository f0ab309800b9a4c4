"""What is read off a forward call: logits of any kind of output, positions that count, calls that count."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import samopt
from tests.helpers.cases import batch, closure_of, loss_of, mlp

EXACT = {"rtol": 1e-9, "atol": 1e-14}


class Shaped(nn.Module):
    """Classifies every position of ``x``, and returns the logits in the shape that ``wrap`` gives them."""

    def __init__(self, wrap: Callable[[Tensor], Any], classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, classes, dtype=torch.float64)
        self.wrap = wrap

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return self.wrap(self.net(x))


class Output(dict):
    """As Hugging Face's: entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def measure(
    model: nn.Module, call: Callable[[nn.Module], Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Take two steps; return the second one's distance, and the weights that it compared: old and new."""
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model, **options)
    states = []

    def closure() -> Tensor:
        if not optimizer.is_perturbed:
            states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        optimizer.zero_grad()
        loss = call(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer.last_step.distance > 0
    return optimizer.last_step.distance, states[0], states[1]


def logits_at(state: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ state["net.weight"].T + state["net.bias"]


def position_kl(old: dict[str, Tensor], new: dict[str, Tensor], x: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=logits_at(old, x)), Categorical(logits=logits_at(new, x)))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda z: z, lambda out: out),
    "tuple": (lambda z: (z, z.sum()), lambda out: out[0]),
    "loss first": (lambda z: (z.square().mean(), z), lambda out: out[1]),
    "list with ids": (lambda z: [z.argmax(-1), z], lambda out: out[1]),
    "dict": (lambda z: {"loss": z.mean(), "logits": z}, lambda out: out["logits"]),
    "dict without the name": (lambda z: {"loss": z.mean(), "scores": z}, lambda out: out["scores"]),
    "model output": (lambda z: Output(loss=z.mean(), hidden=2 * z, logits=z), lambda out: out.logits),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("shape", [(8,), (4, 3)], ids=["one position", "sequence"])
def test_logits_are_found_in(kind: str, shape: tuple[int, ...]) -> None:
    wrap, take = OUTPUTS[kind]
    x = inputs(*shape)
    distance, old, new = measure(Shaped(wrap), lambda model: take(model(x)).square().mean())
    torch.testing.assert_close(distance, position_kl(old, new, x).mean(), **EXACT)


def test_heads_add_up() -> None:
    def two_heads(z: Tensor) -> Output:
        return Output(start_logits=z[..., :2], end_logits=z[..., 2:], states=z)

    x = inputs(8)
    distance, old, new = measure(Shaped(two_heads), lambda model: model(x).states.square().mean())
    expected = torch.zeros(8, dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 5)):
        p, q = (Categorical(logits=logits_at(state, x)[:, part]) for state in (old, new))
        expected += kl_divergence(p, q)
    torch.testing.assert_close(distance, expected.mean(), **EXACT)


def test_logits_and_class_dim_can_be_named() -> None:
    x = inputs(4, 3)
    distance, old, new = measure(
        Shaped(lambda z: {"aux": z * 2, "map": z.movedim(-1, 1)}),
        lambda model: model(x)["map"].square().mean(),
        logits=lambda output: output["map"],
        class_dim=1,
    )
    torch.testing.assert_close(distance, position_kl(old, new, x).mean(), **EXACT)


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_regressions_use_l2(shape: tuple[int, ...]) -> None:
    x = inputs(8)
    model = Shaped(lambda z: z.view(shape), classes=1)
    distance, old, new = measure(model, lambda model: model(x).square().mean(), divergence="l2")
    torch.testing.assert_close(distance, (logits_at(old, x) - logits_at(new, x)).abs().mean(), **EXACT)
    with pytest.raises(ValueError, match='use divergence="l2" for a regression'):
        measure(Shaped(lambda z: z.view(shape), classes=1), lambda model: model(x).square().mean())


def test_a_binary_logit_becomes_two_classes() -> None:
    x = inputs(8)
    distance, old, new = measure(
        Shaped(lambda z: z.squeeze(-1), classes=1),
        lambda model: model(x).square().mean(),
        logits=lambda output: torch.stack([torch.zeros_like(output), output], -1),
    )
    p, q = (torch.distributions.Bernoulli(logits=logits_at(state, x)) for state in (old, new))
    torch.testing.assert_close(distance, kl_divergence(p, q).mean(), **EXACT)


def test_an_output_without_logits_is_explained() -> None:
    model = Shaped(lambda z: {"loss": z.mean(), "ids": z.argmax(-1)})
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model, trust_region="pretrained")
    with pytest.raises(TypeError, match=r"returned dict with the keys \['loss', 'ids'\].*pass logits="):
        model(inputs(4))
    assert not optimizer.is_perturbed


ATTENTION = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
LABELS = torch.tensor([[2, 1, -100], [1, 3, 3], [-100, -100, 0], [1, 1, 1]])


def mean_by_example(values: Tensor, counts: Tensor) -> Tensor:
    means = [row[counted].mean() for row, counted in zip(values, counts, strict=True) if counted.any()]
    return torch.stack(means).mean()


@pytest.mark.parametrize("given", ["attention", "labels", "both"])
@pytest.mark.parametrize("how", ["keyword", "position", "batch"])
def test_padding_and_ignored_labels_are_left_out(given: str, how: str) -> None:
    x = inputs(4, 3)
    attention = None if given == "labels" else ATTENTION
    labels = None if given == "attention" else LABELS
    call = {
        "keyword": lambda model: model(x, attention_mask=attention, labels=labels),
        "position": lambda model: model(x, attention, labels),
        "batch": lambda model: model({"x": x, "attention_mask": attention, "labels": labels}),
    }[how]

    class TakesBatch(Shaped):
        def forward(self, x: Any, attention_mask: Any = None, labels: Any = None) -> Tensor:
            return super().forward(x["x"] if isinstance(x, dict) else x)

    distance, old, new = measure(TakesBatch(lambda z: z), lambda model: call(model).square().mean())
    counts = torch.ones(4, 3, dtype=torch.bool)
    if attention is not None:
        counts &= attention == 1
    if labels is not None:
        counts &= labels != -100
    torch.testing.assert_close(distance, mean_by_example(position_kl(old, new, x), counts), **EXACT)


def test_ignored_examples_are_left_out_and_do_not_count_among_micro_batches() -> None:
    x = inputs(6)
    labels = torch.tensor([0, -100, 1, 2, -100, -100])

    def accumulate(model: nn.Module) -> Tensor:
        return sum(model(x[part], labels=labels[part]).square().mean() for part in (slice(0, 1), slice(1, 6)))

    distance, old, new = measure(Shaped(lambda z: z), accumulate)
    torch.testing.assert_close(distance, position_kl(old, new, x)[labels != -100].mean(), **EXACT)


def test_nothing_that_counts_is_no_distance() -> None:
    model = Shaped(lambda z: z)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model, trust_region="pretrained")
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs(4), labels=torch.full((4,), -100)).square().mean().backward()
        optimizer.ascend()
        assert optimizer.radius.metrics()["distance"].item() == 0.0
        optimizer.restore()
        optimizer.step()


def test_a_mask_of_ones_own() -> None:
    x = inputs(4, 3)
    counts = ATTENTION.bool()
    distance, old, new = measure(
        Shaped(lambda z: z), lambda model: model(x).square().mean(), mask=lambda call: call.arguments["x"][..., 0] < 0.5
    )
    torch.testing.assert_close(distance, mean_by_example(position_kl(old, new, x), x[..., 0] < 0.5), **EXACT)
    with pytest.raises(ValueError, match=r"boolean tensor of shape \(4, 3\).*got \(4,\)"):
        measure(Shaped(lambda z: z), lambda model: model(x).square().mean(), mask=lambda call: counts[:, 0])


def test_several_calls_in_a_step_are_averaged_by_their_examples() -> None:
    first, second = inputs(6), 2 * inputs(2)

    def contrast(model: nn.Module) -> Tensor:
        return model(first).square().mean() - model(second).mean()

    distance, old, new = measure(Shaped(lambda z: z), contrast)
    expected = position_kl(old, new, torch.cat([first, second])).mean()
    torch.testing.assert_close(distance, expected, **EXACT)


def test_calls_that_are_no_training_pass_do_not_count() -> None:
    x = inputs(8)

    def with_an_aside(model: nn.Module) -> Tensor:
        model.eval()
        model(3 * x)  # an evaluation whose author forgot torch.no_grad
        model.train()
        with torch.no_grad():
            model(7 * x)
        return model(x).square().mean()

    distance, old, new = measure(Shaped(lambda z: z), with_an_aside)
    torch.testing.assert_close(distance, position_kl(old, new, x).mean(), **EXACT)


def test_a_model_that_trains_in_evaluation_mode_counts() -> None:
    x = inputs(8)
    distance, old, new = measure(Shaped(lambda z: z).eval(), lambda model: model(x).square().mean())
    torch.testing.assert_close(distance, position_kl(old, new, x).mean(), **EXACT)


def test_an_abandoned_pass_does_not_count() -> None:
    model = mlp(torch.float64)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region="pretrained")
    optimizer.step(closure_of(optimizer, model, batch(torch.float64)))
    loss_of(model, batch(torch.float64, seed=5))  # forward only: its distance belongs to no gradient
    optimizer.zero_grad()
    x, y = batch(torch.float64, seed=6)
    with torch.no_grad():
        start = mlp(torch.float64)(x)
        expected = kl_divergence(Categorical(logits=start), Categorical(logits=model(x))).mean()
    loss_of(model, (x, y)).backward()
    optimizer.ascend()
    torch.testing.assert_close(optimizer.radius.metrics()["distance"], expected, **EXACT)
    optimizer.restore()


def test_hooks_go_with_the_optimizer_and_copies_of_the_model_are_free_of_them() -> None:
    model = mlp()
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    copied = copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model))
    for each in (copied, restored):
        loss_of(each, batch()).backward()
    with pytest.raises(RuntimeError, match="saw no forward call"):
        optimizer.radius._measured_distance()
    del optimizer
    gc.collect()
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
    assert "_compiled_call_impl" not in vars(model)


def test_users_hooks_see_the_reference_once_with_inputs_as_given() -> None:
    model = Shaped(lambda z: z)
    seen = []
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.net.register_forward_hook(lambda module, args, output: seen.append((torch.is_grad_enabled(), args[0])))
    x = inputs(8)
    distance, old, new = measure(model, lambda model: model(x).square().mean())
    torch.testing.assert_close(distance, position_kl(old, new, x + 1).mean(), **EXACT)
    assert [grad for grad, _ in seen] == [True, True, True, False, True]
    assert all(torch.equal(given, x + 1) for _, given in seen)
