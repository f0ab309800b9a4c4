"""``only=``: the chosen parameters move, are saved and are measured; the others are trained as ever."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import samopt
from samopt.parts import ReusedGradient
from tests.helpers.cases import (
    BASES,
    TOLERANCE,
    VARIANTS,
    assert_same,
    batch,
    bits,
    loss_of,
    norms,
    sam_epsilon,
    same_bits,
    train,
)
from tests.helpers.published import PRESETS

NORM_NAMES = ["1.weight", "1.bias", "5.weight", "5.bias"]  # of cases.norms()
CHOICES = {
    "norm": NORM_NAMES,
    "bias": ["0.bias", "1.bias", "4.bias", "5.bias", "6.bias"],
    "head": ["6.weight", "6.bias"],
    r"^[04]\.": ["0.weight", "0.bias", "4.weight", "4.bias"],
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return norms()


def matrices(name: str, parameter: torch.Tensor) -> bool:
    """A choice by a function that can be pickled."""
    return name.endswith("weight") and parameter.dim() > 1


def named(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in names]


def names_of(model: nn.Module, parameters: list[torch.Tensor]) -> list[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in parameters]


def chosen(model: nn.Module, only: object, **options: object) -> list[str]:
    """The names of what moves."""
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), only=only, model=model, **options)
    return names_of(model, optimizer.perturbed_parameters)


def grouped(model: nn.Module, names: list[str]) -> list[dict]:
    """The parameters in their order, each in a group that says whether it moves."""
    return [{"params": [p], "perturb": name in names} for name, p in model.named_parameters()]


@pytest.mark.parametrize("only", [*CHOICES, matrices])
def test_what_each_choice_chooses(only):
    expected = ["0.weight", "4.weight", "6.weight"] if only is matrices else CHOICES[only]
    assert sorted(chosen(network(), only)) == sorted(expected)


@pytest.mark.parametrize("only", CHOICES)
def test_a_step_perturbs_the_chosen_ones_along_their_own_gradient(only):
    """The textbook in fp64, with the ascent over the chosen parameters alone."""
    ours, theirs = network().double(), network().double()
    optimizer = samopt.SAM(BASES["sgd-momentum"](ours.parameters()), rho=0.3, model=ours, only=only)
    stock = BASES["sgd-momentum"](theirs.parameters())
    for step in range(4):
        data = batch(torch.float64, seed=step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        optimizer.backward(lambda data=data: loss_of(ours, data))
        measured = optimizer.last_step
        optimizer.step()
        losses = textbook(theirs, stock, data, CHOICES[only], 0.3, seed=step)
        assert float(measured.loss) == pytest.approx(losses[0].item(), rel=1e-12)
        assert float(measured.perturbed_loss) == pytest.approx(losses[1].item(), rel=1e-12)
        assert float(measured.radius) == pytest.approx(0.3)
        assert float(measured.applied_radius) == pytest.approx(0.3)
    torch.testing.assert_close(bits(ours), bits(theirs), **TOLERANCE[torch.float64])


def textbook(model, base, data, names, rho, *, seed):
    """Both passes in plain torch, of which the second repeats masks and leaves no statistics behind."""
    state = []

    def backward():
        torch.manual_seed(seed)
        if state:
            before = copy.deepcopy(model.state_dict())
        loss = loss_of(model, data)
        loss.backward()
        if state:
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        state.append(None)
        return loss

    base.zero_grad()
    moving = named(model, names)
    others = [p for p in model.parameters() if all(p is not each for each in moving)]
    first = backward()
    saved = [p.detach().clone() for p in moving]
    moves = sam_epsilon(saved, [p.grad for p in moving], [rho] * len(moving))
    with torch.no_grad():
        for p, move in zip(moving, moves, strict=True):
            p.add_(move)
    for p in (*moving, *others):
        p.grad = None
    second = backward()
    with torch.no_grad():
        for p, value in zip(moving, saved, strict=True):
            p.copy_(value)
    base.step()
    return first, second


ROWS = {variant.name: (variant.wrap, variant.rho, "sgd-momentum") for variant in VARIANTS}
ROWS |= {preset.name: (preset.wrap, preset.rho, preset.usual_base) for preset in PRESETS}


@pytest.mark.parametrize("form", ["backward", "closure"])
@pytest.mark.parametrize("name", ROWS)
def test_every_optimizer_trains_as_with_perturb_false_in_the_other_groups(name, form):
    """Bit for bit: the same tensors move, in the same order."""
    wrap, rho, base_name = ROWS[name]
    ours, theirs = network(), network()
    base = BASES[base_name]
    optimizer = wrap(base(grouped(ours, list(dict(ours.named_parameters())))), rho=rho, model=ours, only="norm")
    expected = wrap(base(grouped(theirs, NORM_NAMES)), rho=rho, model=theirs)
    for step in range(5):
        for each, model in ((optimizer, ours), (expected, theirs)):
            data = batch(seed=step)
            torch.manual_seed(step)
            if form == "closure":
                train(model, each, range(step, step + 1))
                continue
            each.zero_grad()
            each.backward(lambda model=model, data=data: loss_of(model, data))
            each.step()
        assert_same(ours.state_dict(), theirs.state_dict())
        assert_same(optimizer.last_step.to_dict(), expected.last_step.to_dict())
        assert_same(optimizer.state_dict()["state"], expected.state_dict()["state"])


def test_the_copy_of_the_weights_holds_the_chosen_ones_alone():
    model = network()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.3, model=model, only="norm")
    optimizer.backward(lambda: loss_of(model, batch()))
    buffers = optimizer.two_passes._memory._buffers
    assert sum(buffer.memory.numel() for buffer in buffers.values()) == sum(p.numel() for p in named(model, NORM_NAMES))
    assert set(buffers) == {id(p) for p in named(model, NORM_NAMES)}


def test_only_the_chosen_ones_are_elsewhere_in_the_second_pass():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.3, model=model, only="norm")
    loss_of(model, batch()).backward()
    norm = sum(float(p.grad.double().square().sum()) for p in named(model, NORM_NAMES)) ** 0.5
    with optimizer.perturbed():
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert [name for name in moved if name not in NORM_NAMES] == []
        assert "1.weight" in moved
        loss_of(model, batch()).backward()
    assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert_same({name: p.detach() for name, p in model.named_parameters()}, before)


def test_one_pass_replaces_the_chosen_ones_alone():
    model = network()
    optimizer = samopt.MomentumSAM(
        BASES["sgd-momentum"](model.parameters()), rho=0.3, model=model, only="norm", measure_grad_norms=True
    )
    seen = []
    model[6].register_forward_pre_hook(
        lambda *_: seen.append([name for name, p in parameters.items() if attribute(model, name) is not p])
    )
    parameters = dict(model.named_parameters())
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(seed=step)).backward()
        norm = sum(float(p.grad.double().square().sum()) for p in named(model, NORM_NAMES)) ** 0.5
        optimizer.step()
    assert seen == [[], NORM_NAMES]
    assert float(optimizer.last_step.perturbed_grad_norm) == pytest.approx(norm, rel=1e-6)


def attribute(model: nn.Module, name: str) -> torch.Tensor:
    module, _, last = name.rpartition(".")
    return getattr(model.get_submodule(module), last)


def test_a_reused_gradient_is_kept_for_the_chosen_ones_alone():
    model = network()
    base = BASES["sgd"](model.parameters())
    optimizer = samopt.SAM(base, direction=ReusedGradient(every=3), rho=0.3, model=model, only="norm")
    train(model, optimizer, range(1))
    assert [id(p) for p in optimizer.direction._gradients] == [id(p) for p in named(model, NORM_NAMES)]


def test_both_only_and_the_group_must_allow_a_move():
    model = network()
    groups = [
        {"params": [*model[0].parameters(), *model[1].parameters()]},
        {"params": [*model[4].parameters(), *model[5].parameters(), *model[6].parameters()], "perturb": False},
    ]
    optimizer = samopt.SAM(BASES["sgd"](groups), model=model, only="norm")
    assert names_of(model, optimizer.perturbed_parameters) == ["1.weight", "1.bias"]


def test_no_second_pass_where_the_radius_of_the_chosen_ones_is_zero():
    model = network()
    groups = [{"params": [*model[0].parameters()]}, {"params": [*model[6].parameters()], "rho": 0.0}]
    optimizer = samopt.SAM(BASES["sgd"](groups), rho=0.1, model=model, only="head")
    calls = []
    optimizer.backward(lambda: calls.append(None) or loss_of(model, batch()))
    assert len(calls) == 1
    assert not optimizer.perturbs_this_step


def test_what_moves_is_counted():
    model = network()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), model=model, only="norm")
    count, every = (sum(p.numel() for p in some) for some in (named(model, NORM_NAMES), model.parameters()))
    assert sum(p.numel() for p in optimizer.perturbed_parameters) == count
    assert repr(optimizer).startswith(f"SAM (only='norm': {count} of {every} parameters) around SGD")
    assert optimizer.only == "norm"
    everything = samopt.SAM(BASES["sgd"](model.parameters()), model=model)
    assert everything.only is None
    assert [id(p) for p in everything.perturbed_parameters] == [id(p) for p in model.parameters()]
    assert "only" not in repr(everything)


# Names


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))])
def test_the_names_of_wrappers_are_left_out(wrap):
    model = network()
    asked = []
    samopt.SAM(BASES["sgd"](model.parameters()), model=wrap(model), only=lambda name, _: asked.append(name) or True)
    assert asked == [name for name, _ in model.named_parameters()]


def test_the_names_of_wrappers_inside_are_left_out():
    model = Wrapped(torch.compile(nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))))
    asked = []
    samopt.SAM(BASES["sgd"](model.parameters()), model=model, only=lambda name, _: asked.append(name) or True)
    assert asked == ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]


def test_a_users_own_module_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert chosen(model, r"^module\.") == ["module.weight", "module.bias"]


def test_several_models_give_names_together():
    model, criterion = network(), nn.Linear(3, 3)
    base = BASES["sgd"]([*model.parameters(), *criterion.parameters()])
    optimizer = samopt.SAM(base, model=[model, criterion], only="^weight$")
    assert [id(p) for p in optimizer.perturbed_parameters] == [id(criterion.weight)]


def test_a_tied_parameter_is_chosen_under_each_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["embedding"].weight
    assert chosen(model, "^embedding") == chosen(model, "^out") == chosen(model, "head") == ["embedding.weight"]


def test_names_that_the_base_has_serve_without_a_model():
    model = network()
    try:
        base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    except TypeError:
        pytest.skip("torch before 2.6 takes no names")
    optimizer = samopt.SAM(base, rho=0.3, only=r"^6\.")
    assert names_of(model, optimizer.perturbed_parameters) == CHOICES["head"]
    assert len(samopt.SAM(base, only="bias").perturbed_parameters) == len(CHOICES["bias"])
    with pytest.raises(ValueError, match=r"only='norm' looks for modules; give model="):
        samopt.SAM(base, only="norm")


class LlamaRMSNorm(nn.Module):
    """Named as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class BatchNormAct2d(nn.BatchNorm2d):
    """Named as in timm."""


class MyScaling(nn.LayerNorm):
    """Known by the class that it derives from."""


class AdaLayerNorm(nn.Module):
    """A layer inside it is no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class NormalLinear(nn.Linear):
    """Has half of the word in its name."""


@pytest.mark.parametrize(
    ("layer", "is_norm"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.InstanceNorm2d(4, affine=True), True),
        (nn.LayerNorm((4, 2)), True),
        (LlamaRMSNorm(), True),
        (BatchNormAct2d(4), True),
        (MyScaling(4), True),
        (AdaLayerNorm(), False),
        (NormalLinear(4, 4), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), False),
        (nn.MultiheadAttention(4, 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_layers_are_normalisation(layer, is_norm):
    model = nn.Sequential(layer, nn.LayerNorm(4))
    expected = [name for name, _ in model.named_parameters() if is_norm or name.startswith("1.")]
    assert chosen(model, "norm") == expected


def test_which_parameters_are_biases():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "rnn": nn.LSTM(2, 2)})
    model.register_parameter("relative_position_bias_table", nn.Parameter(torch.zeros(2)))
    expected = ["attention.in_proj_bias", "attention.out_proj.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0"]
    assert sorted(chosen(model, "bias")) == sorted(expected)


class Declares(nn.Module):
    """Says which module its head is, as models of transformers and timm do."""

    def __init__(self, method: str, head: object) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 2)
        self.last = nn.Linear(4, 4)
        setattr(self, method, lambda: self.decoder if head is None else head)


def children(**modules: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (Declares("get_output_embeddings", None), ["decoder"]),
        (Declares("get_classifier", None), ["decoder"]),
        (Declares("get_classifier", nn.Identity()), ["last"]),
        (children(fc=nn.Linear(4, 2), aux=nn.Linear(4, 2)), ["fc"]),
        (children(lm_head=nn.Linear(4, 2), trunk=two_layers()), ["lm_head"]),
        (children(score=nn.Linear(4, 2), trunk=two_layers()), ["score"]),
        (children(classifier=two_layers(), pre_classifier=nn.Linear(4, 4)), ["classifier.0", "classifier.1"]),
        (children(head=nn.Identity(), trunk=two_layers(), out=nn.Linear(4, 2)), ["out"]),
        (children(trunk=two_layers(), out=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), ["out.2"]),
        (Wrapped(children(fc=nn.Linear(4, 2), aux=nn.Linear(4, 2))), ["net.fc"]),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2), nn.Softmax()), ["1"]),
    ],
)
def test_which_module_is_the_head(model, head):
    assert {name.rpartition(".")[0] for name in chosen(model, "head")} == set(head)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (children(a_head=nn.Linear(4, 2), b_head=nn.Linear(4, 2)), "ambiguous: Module has a_head, b_head; .*regular"),
        (Declares("get_classifier", (nn.Linear(4, 2), nn.Linear(4, 2))), r"get_classifier\(\) of Declares returns 2"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"no head in Sequential: .*\(0, 1\).*, 1, is a LayerNorm"),
    ],
)
def test_a_head_that_cannot_be_told_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        chosen(model, "head")


def test_a_head_among_several_models_is_refused():
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    base = BASES["sgd"]([p for model in models for p in model.parameters()])
    with pytest.raises(ValueError, match=r"needs one model with parameters, but model= has 2: Linear, Linear"):
        samopt.SAM(base, model=models, only="head")


# Errors


@pytest.mark.parametrize(
    ("only", "kind", "message"),
    [
        ("encoder", ValueError, r"chooses none of the 10 parameters.*no name.*among 0.weight, 0.bias, .*\.\.\.; use"),
        ("(", ValueError, r"only='\(' is no valid regular expression: .*; use \"norm\""),
        ("", ValueError, "leave it out to perturb all"),
        (["norm", "bias"], TypeError, r"only must be text or a function, got \['norm', 'bias'\]"),
        (nn.LayerNorm, TypeError, "only must be text or a function, got <class"),
        (nn.Linear(2, 2), TypeError, "only must be text or a function, got Linear"),
        (re.compile("weight"), TypeError, "only must be text or a function"),
        (lambda name, p: re.search("weight", name), TypeError, r"True or False, got Match for 0.weight; write bool"),
        (lambda name, p: False, ValueError, "chooses none of the 10 parameters"),
    ],
    ids=["encoder", "bracket", "nothing", "a list", "a class", "a module", "compiled", "not a bool", "always False"],
)
def test_a_wrong_choice_is_refused_and_leaves_the_base_as_it_was(only, kind, message):
    model = network()
    base = BASES["sgd"](model.parameters())
    keys = set(base.param_groups[0])
    with pytest.raises(kind, match=message):
        samopt.SAM(base, model=model, only=only)
    assert set(base.param_groups[0]) == keys


def test_norm_without_a_normalisation_layer_is_refused():
    with pytest.raises(ValueError, match=r"chooses none of the 4 parameters.*no normalisation layer"):
        chosen(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "norm")


def test_names_are_needed():
    model = network()
    with pytest.raises(ValueError, match=r"chooses by name, and 10 parameters have none, .*give model="):
        samopt.SAM(BASES["sgd"](model.parameters()), only="bias")
    extra = nn.Parameter(torch.zeros(7))
    base = BASES["sgd"]([*model.parameters(), extra])
    with pytest.raises(ValueError, match=r"1 parameters .*shape \(7,\), are not among those of model=Sequential; give"):
        samopt.SAM(base, model=model, only="bias")
    base = BASES["sgd"]([{"params": model.parameters()}, {"params": [extra], "perturb": False}])
    optimizer = samopt.SAM(base, model=model, only="bias")
    assert len(optimizer.perturbed_parameters) == len(CHOICES["bias"])
    base.param_groups[1]["perturb"] = True  # from now on it would have to be known
    with pytest.raises(ValueError, match=r"shape \(7,\), are not among"):
        optimizer.backward(lambda: loss_of(model, batch()))


def test_a_choice_that_cannot_move_is_refused():
    model = network()
    model[6].requires_grad_(False)
    with pytest.raises(ValueError, match="chooses 2 parameters, but none of them can move: 2 are frozen"):
        chosen(model, "head")
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "perturb": False}]
    with pytest.raises(ValueError, match="chooses 2 parameters, but none .*: 0 are frozen .*groups with perturb=False"):
        samopt.SAM(BASES["sgd"](groups), model=model, only="norm")


# The life of an optimizer


def test_groups_that_are_added_follow_the_choice():
    model = network()
    optimizer = samopt.SAM(
        BASES["sgd"]([*model[0].parameters(), *model[1].parameters()]), rho=0.3, model=model, only="norm"
    )
    optimizer.add_param_group({"params": (p for p in [*model[4].parameters(), *model[5].parameters()])})
    assert names_of(model, optimizer.perturbed_parameters) == NORM_NAMES
    with pytest.raises(ValueError, match=r"1 parameters of the base optimizer, one of shape \(3,\), are not among"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3))})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3)), "perturb": False})
    assert names_of(model, optimizer.perturbed_parameters) == NORM_NAMES
    train(model, optimizer, range(2))


def test_a_layer_that_is_added_follows_the_choice():
    model = network()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), model=model, only="norm")
    model.append(nn.LayerNorm(3))
    optimizer.add_param_group({"params": model[7].parameters()})
    assert names_of(model, optimizer.perturbed_parameters) == [*NORM_NAMES, "7.weight", "7.bias"]


def test_parameters_that_take_the_place_of_others_follow_the_choice():
    """As sharding after the optimizer was made, which gives model and base new ones."""
    model = network()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.3, model=model, only="norm")
    for module in model:
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    assert names_of(model, optimizer.perturbed_parameters) == NORM_NAMES


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", [samopt.SAM, samopt.MomentumSAM, samopt.FriendlySAM])
@pytest.mark.parametrize("only", ["norm", matrices])
def test_a_copy_chooses_among_its_own_parameters(only, kind, duplicate):
    model = network()
    optimizer = kind(BASES["sgd-momentum"](model.parameters()), rho=0.3, model=model, only=only)
    train(model, optimizer, range(2))
    twin, twin_optimizer = duplicate((model, optimizer))
    before = bits(twin)
    train(model, optimizer, range(2, 5))
    assert same_bits(twin, before)
    train(twin, twin_optimizer, range(2, 5))
    assert same_bits(twin, bits(model))
    assert names_of(twin, twin_optimizer.perturbed_parameters) == names_of(model, optimizer.perturbed_parameters)


@pytest.mark.parametrize("kind", [samopt.SAM, samopt.ASAM, samopt.MomentumSAM, samopt.FriendlySAM, samopt.LookSAM])
@pytest.mark.parametrize(("before", "after"), [(None, "norm"), ("norm", None), ("norm", "norm")])
def test_checkpoints_with_and_without_a_choice_load_into_each_other(kind, before, after):
    def make(only):
        model = network()
        return model, kind(BASES["sgd-momentum"](model.parameters()), rho=0.1, model=model, only=only)

    model, optimizer = make(before)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loaded, loaded_optimizer = make(after)
    loaded.load_state_dict(saved[0])
    loaded_optimizer.load_state_dict(saved[1])
    assert loaded_optimizer.only == after
    assert_same(loaded_optimizer.state_dict()["state"], saved[1]["state"])
    expected = NORM_NAMES if after else [name for name, _ in loaded.named_parameters()]
    assert names_of(loaded, loaded_optimizer.perturbed_parameters) == expected
    train(loaded, loaded_optimizer, range(3, 5))
    if before == after:
        train(model, optimizer, range(3, 5))
        assert same_bits(loaded, bits(model))


def test_the_state_dict_and_the_groups_are_those_of_an_optimizer_without_a_choice():
    states = []
    for only in ("norm", None):
        model = network()
        optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.1, model=model, only=only)
        state = optimizer.state_dict()
        states.append((state["param_groups"], state["samopt"].keys()))
    assert states[0] == states[1]


def test_tram_moves_the_chosen_ones_by_the_distance_of_all():
    ours, theirs = network(), network()
    tram = samopt.TRAM(BASES["sgd"](grouped(ours, NORM_NAMES + CHOICES["head"])), model=ours, scale=3.0, only="norm")
    expected = samopt.TRAM(BASES["sgd"](grouped(theirs, NORM_NAMES)), model=theirs, scale=3.0)
    for model, optimizer in ((ours, tram), (theirs, expected)):
        train(model, optimizer, range(4))
    assert float(tram.last_step.distance) > 0
    assert same_bits(ours, bits(theirs))
    assert_same(tram.last_step.to_dict(), expected.last_step.to_dict())


def test_frozen_parameters_are_not_among_those_that_move():
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3))
    model[0].weight.requires_grad_(False)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    assert names_of(model, optimizer.perturbed_parameters) == ["0.bias", "1.weight", "1.bias"]
