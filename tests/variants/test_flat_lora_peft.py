"""Flat-LoRA on the layers of peft: what it perturbs, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers import adapters
from tests.helpers.adapters import DOUBLE, VOCABULARY, differing, frozen, hand_step, peft_layers, trained
from tests.helpers.cases import bits, same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.hf

PERTURBATIONS = pytest.mark.parametrize("perturbation", ["noise", "gradient"])
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def adapted(model: nn.Module, dtype: torch.dtype = DOUBLE, **options: Any) -> nn.Module:
    """A model with adapters whose product is not 0."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8} | options))
    model = peft.get_peft_model(model, config).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    return model.train()


def llama(dtype: torch.dtype = DOUBLE, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return adapted(model, dtype, **({"target_modules": ["q_proj", "v_proj", "down_proj"]} | options))


def gpt2(**options: Any) -> nn.Module:
    """Linear layers that hold (inputs, outputs), and an embedding whose weight is the head's too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "use_cache": False}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    return adapted(model, **({"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True} | options))


class Kinds(nn.Module):
    """An embedding and convolutions of one, two and three dimensions."""

    def __init__(self):
        super().__init__()
        self.embedding, self.one = nn.Embedding(VOCABULARY, 8, padding_idx=0), nn.Conv1d(8, 6, 3, padding=1)
        self.two, self.three = nn.Conv2d(1, 3, (3, 1)), nn.Conv3d(1, 2, (1, 2, 2), stride=2)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, input_ids, labels):
        x = torch.tanh(self.one(self.embedding(input_ids).transpose(1, 2)))
        x = torch.tanh(self.two(x.unsqueeze(1)))
        x = self.three(x.unsqueeze(1)).flatten(1)
        return transformers.modeling_outputs.CausalLMOutput(
            loss=nn.functional.cross_entropy(self.head(x[:, :24]), labels[:, 0])
        )


def kinds() -> nn.Module:
    torch.manual_seed(0)
    return adapted(Kinds(), target_modules=["embedding", "one", "two", "three", "head"])


def ids(step: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(step))


def loss_at(model: nn.Module, step: int) -> Tensor:
    return model(input_ids=ids(step), labels=ids(step)).loss


def flat(model: nn.Module, rho: float = 0.1, **options: Any) -> samopt.FlatLoRA:
    return samopt.FlatLoRA(torch.optim.AdamW(trained(model), lr=0.01), model=model, rho=rho, **options)


def take_step(optimizer: samopt.FlatLoRA, model: nn.Module, step: int) -> None:
    optimizer.zero_grad()
    optimizer.backward(lambda: loss_at(model, step))
    optimizer.step()


def assert_trains_as_by_hand(ours: nn.Module, theirs: nn.Module, perturbation: str, steps: int = 3) -> None:
    optimizer = flat(ours, perturbation=perturbation, seed=5)
    base, layers = torch.optim.AdamW(trained(theirs), lr=0.01), peft_layers(theirs)
    before = frozen(ours)
    for step in range(steps):
        take_step(optimizer, ours, step)

        def backward(step=step) -> None:
            loss_at(theirs, step).backward()

        hand_step(base, layers, backward, perturbation=perturbation, seed=5, step=step)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, **EXACT)
    assert differing(ours, before) == 0
    assert all(p.grad is None for name, p in ours.named_parameters() if name in before)


@PERTURBATIONS
@pytest.mark.parametrize("make", [llama, kinds])
def test_layers_of_each_kind_train_as_by_hand(make, perturbation):
    assert_trains_as_by_hand(make(), make(), perturbation)


@PERTURBATIONS
def test_layers_that_hold_inputs_first_train_as_by_hand(perturbation):
    make = lambda: gpt2(target_modules=["c_attn", "c_proj"])  # noqa: E731
    assert_trains_as_by_hand(make(), make(), perturbation)


@PERTURBATIONS
def test_a_trained_head_beside_the_adapters_is_not_perturbed(perturbation):
    make = lambda: llama(modules_to_save=["lm_head"])  # noqa: E731
    ours = make()
    assert any("modules_to_save" in name for name, p in ours.named_parameters() if p.requires_grad)
    assert_trains_as_by_hand(ours, make(), perturbation)


@PERTURBATIONS
def test_a_plain_model_with_inputs_first_moves_its_rows(perturbation):
    def make() -> nn.Module:
        torch.manual_seed(0)
        layer = transformers.pytorch_utils.Conv1D(5, 3).double()
        return layer

    ours, theirs = make(), make()
    optimizer = samopt.FlatLoRA(torch.optim.SGD(trained(ours), lr=0.1), model=ours, perturbation=perturbation, rho=0.1)
    base = torch.optim.SGD(trained(theirs), lr=0.1)
    layers = [adapters.Whole(theirs.weight, lambda: theirs.weight, (0,))]
    for step in range(3):
        x = torch.randn(4, 3, dtype=DOUBLE)
        optimizer.zero_grad()
        optimizer.backward(lambda x=x: torch.tanh(ours(x)).square().mean())
        optimizer.step()

        def backward(x=x) -> None:
            torch.tanh(theirs(x)).square().mean().backward()

        hand_step(base, layers, backward, perturbation=perturbation, step=step)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def test_a_weight_that_is_tied_to_a_layer_without_adapters_moves_in_its_own_layer_only():
    model = gpt2(target_modules=["wte"])
    head, embedding = model.base_model.model.lm_head, model.base_model.model.transformer.wte
    assert head.weight is embedding.get_base_layer().weight
    optimizer = flat(model, rho=0.5)
    seen: dict[str, Tensor] = {}
    head.register_forward_hook(lambda module, args, output: seen.update(head=module.weight, x=args[0], output=output))
    exact = embedding.get_base_layer().weight.clone()
    loss_at(model, 0).backward()
    assert torch.equal(seen["head"], exact)
    torch.testing.assert_close(seen["output"], seen["x"] @ exact.T)
    with torch.no_grad():
        at_w = embedding(ids(0))
    noisy = embedding(ids(0))
    moved = 0.5 * (exact + embedding.get_delta_weight("default")).detach()
    deviation = moved.norm(dim=1, keepdim=True) / 4 * adapters.normal(exact, 0, 0, 0)
    torch.testing.assert_close(noisy, at_w + deviation[ids(0)])
    optimizer.step()


def test_two_layers_over_one_parameter_each_have_their_own_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    model = adapted(model, target_modules=["0", "2"])
    layers = peft_layers(model)
    assert layers[0].weight is layers[1].weight
    optimizer = flat(model, rho=0.3)
    x = torch.randn(4, 6, dtype=DOUBLE)
    first, second = adapters.noise(layers, [0.3, 0.3], 0, 0)
    inner = model.base_model.model
    expected = torch.tanh(x @ (layers[0].merged() + first).T + inner[0].base_layer.bias)
    expected = expected @ (layers[1].merged() + second).T + inner[2].base_layer.bias
    torch.testing.assert_close(model(x), expected)
    optimizer.detach()


@PERTURBATIONS
def test_several_adapters_make_one_whole_weight(perturbation):
    def make() -> nn.Module:
        model = llama()
        model.add_adapter(
            "second", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "second"])
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        return model.double()

    assert_trains_as_by_hand(make(), make(), perturbation)


def test_the_reference_without_adapters_is_exact():
    model = llama()
    optimizer = flat(model, rho=0.5)
    with torch.no_grad(), model.disable_adapter():
        exact = loss_at(model, 0)
    with model.disable_adapter():
        assert float(loss_at(model, 0).detach()) == float(exact)
    assert float(loss_at(model, 0).detach()) != float(exact)
    optimizer.detach()


@PERTURBATIONS
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(perturbation, reentrant):
    plain, checked = llama(lora_dropout=0.1), llama(lora_dropout=0.1)
    checked.enable_input_require_grads()
    checked.gradient_checkpointing_enable({"use_reentrant": reentrant})
    one, other = flat(plain, perturbation=perturbation), flat(checked, perturbation=perturbation)
    for step in range(3):
        for model, optimizer in ((plain, one), (checked, other)):
            torch.manual_seed(step)
            take_step(optimizer, model, step)
    for mine, their in zip(plain.parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(mine, their, **EXACT)


@pytest.mark.slow
@PERTURBATIONS
def test_a_thousand_bf16_steps_change_no_bit_of_a_frozen_weight(perturbation):
    model = llama(torch.bfloat16)
    optimizer = flat(model, rho=0.05, perturbation=perturbation)
    before, factors = frozen(model), bits(model)
    for step in range(1000):
        optimizer.zero_grad()
        loss = loss_at(model, step)
        if step % 100 == 0:
            assert differing(model, before) == 0
        loss.backward()
        if perturbation == "gradient":
            with optimizer.perturbed(loss):
                again = loss_at(model, step)
                if step % 100 == 0:
                    assert differing(model, before) == 0
                again.backward()
        optimizer.step()
        if step % 100 == 0:
            assert differing(model, before) == 0
    assert differing(model, before) == 0
    assert not same_bits(model, factors)


def refused(model: nn.Module, text: str) -> None:
    base = torch.optim.AdamW(trained(model), lr=0.01)
    groups = [dict(group) for group in base.param_groups]
    for perturbation in ("noise", "gradient"):
        with pytest.raises(ValueError, match=text):
            samopt.FlatLoRA(base, model=model, perturbation=perturbation)
    assert [dict(group) for group in base.param_groups] == groups


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class of that name."""

    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, False)


def test_what_is_not_plain_lora_is_refused_by_name():
    refused(llama(use_dora=True), r"q_proj uses DoraLinearVariant, whose weight is not W \+ scaling B A")
    merged = llama()
    merged.merge_adapter()
    refused(merged, r"the adapters of .*q_proj are merged into its weight.*unmerge_adapter")
    quantised = llama()
    layer = quantised.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight = Params4bit(torch.zeros(16, 8, dtype=torch.uint8))
    refused(quantised, r"the base weight of .*q_proj is quantised \(Linear with Params4bit of dtype torch.uint8\)")
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    refused(adapted(attention, target_modules=["attention"]), r"is a peft.tuners.lora.layer.MultiheadAttention, whose")
    grouped = nn.Sequential(nn.Conv1d(8, 8, 3, groups=4))
    with pytest.warns(UserWarning, match="groups > 1"):
        grouped = adapted(grouped, target_modules=["0"])
    refused(grouped, "is a convolution with groups=4")
    adalora = peft.get_peft_model(
        copy.deepcopy(llama().unload()),
        peft.AdaLoraConfig(r=2, target_modules=["q_proj"], total_step=10),
    )
    refused(adalora, r"q_proj is a peft.tuners.adalora.layer.SVDLinear, whose weight is not")


OTHER_METHODS = {
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_another_method_than_lora_is_refused_and_no_trained_head_takes_its_place(method):
    """Without LoRA the plain weights that are trained would move: of a new head, or inside the prompt's encoder."""
    model = peft.get_peft_model(llama().unload(), OTHER_METHODS[method]()).to(DOUBLE)
    model.get_output_embeddings().requires_grad_(True)
    refused(model, rf"is a peft.tuners.{method}.*which changes the model in another way than by adding scaling B A")


def test_another_method_beside_lora_is_refused():
    for target in ("q_proj", "down_proj"):  # on a layer with LoRA, and on another one
        model = peft.get_peft_model(llama().unload(), peft.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
        model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=[target]))
        model.set_adapter(["default", "other"])
        refused(model, rf"{target} is a peft.tuners.loha.layer.Linear, which changes the model in another way")


@PERTURBATIONS
def test_tokens_that_are_trained_beside_the_adapters_are_not_perturbed(perturbation):
    make = lambda: llama(trainable_token_indices={"embed_tokens": [1, 2]})  # noqa: E731
    assert_trains_as_by_hand(make(), make(), perturbation)


def test_adapters_that_were_merged_later_are_refused_in_the_forward():
    model = llama()
    optimizer = flat(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"the adapters of .*q_proj are merged into its weight"):
        loss_at(model, 0)
    model.unmerge_adapter()
    take_step(optimizer, model, 0)
