"""Step (e): whole steps under bf16 autocast, call by call and replayed from a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import samopt
from benchmarks.harness.environment import describe, select_device
from benchmarks.harness.gpu.step import Options
from benchmarks.harness.gpu.updates import small_case
from benchmarks.harness.networks import CASES
from benchmarks.harness.timing import in_turns, peak_bytes, seconds
from benchmarks.harness.updates import UPDATES

Step = Callable[[], object]
_IN_A_ROW = 3  # steps that are timed together, so that the host can run ahead as in training
_VARIANTS = {"sam": {"rho": 0.05}, "asam": {"rho": 0.5}, "one pass": {"rho": 0.3}, "tram": {}}
_FORMS = ("base", "two passes", "script", *_VARIANTS)
_FEW = ("base", "two passes", "sam", "one pass")
"""Of models that another package makes, and of those that fill the memory."""


@dataclass(frozen=True)
class Model:
    """A model and its batch.

    Attributes:
        build: Makes the model.
        batch: Makes the inputs.
        forms: What to measure on it.
        graphs: Whether to capture its steps, too.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    forms: tuple[str, ...] = _FORMS
    graphs: bool = True


def _timm() -> nn.Module:
    import timm

    made: nn.Module = timm.create_model("vit_small_patch16_224", pretrained=False)
    return made


def _transformers() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    made: nn.Module = BertForSequenceClassification(config)
    return made


MODELS = {
    "resnet18": Model(CASES["resnet18"].build, lambda: torch.randn(128, 3, 224, 224)),
    "bert_base": Model(CASES["bert_base"].build, lambda: torch.randint(30522, (32, 128))),
    "vit_s": Model(CASES["vit_s"].build, lambda: torch.randn(64, 3, 224, 224)),
    "decoder_1b": Model(CASES["decoder_1b"].build, lambda: torch.randint(50304, (4, 512)), _FEW, graphs=False),
    "timm vit_s": Model(_timm, lambda: torch.randn(64, 3, 224, 224), _FEW),
    "transformers bert": Model(_transformers, lambda: torch.randint(30522, (32, 128)), _FEW),
}


def run(options: Options) -> None:
    """Write a row for each form of each model; what raises leaves its error."""
    device = select_device(options.device)
    models: Mapping[str, Model] = MODELS
    if options.quick:
        case = small_case()
        models = {"small": Model(case.build, lambda: torch.randn(8, 30))}
    for name, model in models.items():
        if options.left < 8:
            options.write(case=name, skipped="no time was left")
            continue
        try:
            _measure(options, name, model, device)
        except Exception as error:  # of one model: the next one is measured all the same
            options.write(case=name, skipped=_one_line(error))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def make_step(form: str, module: nn.Module, inputs: Tensor, device: torch.device) -> Step:
    """Return a function that takes a whole step with fused AdamW as the base."""
    base = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True, capturable=device.type == "cuda")

    def loss(optimizer: Any = base) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            outputs = module(inputs)
            outputs = getattr(outputs, "logits", outputs)
            labels = torch.zeros(len(outputs), dtype=torch.long, device=device)
            value = functional.cross_entropy(outputs.float(), labels)
        value.backward()
        return value

    if form in ("base", "two passes"):

        def plain() -> None:
            for _ in range(1 if form == "base" else 2):
                loss()
            base.step()

        return plain
    if form == "script":
        script = UPDATES["script"](list(module.parameters()), "sam", lambda _: base)

        def by_script() -> None:
            loss()
            script.ascend()
            loss()
            script.descend()

        return by_script
    name = "momentum-sam" if form == "one pass" else form
    optimizer: Any = samopt.create(name, base, model=module, warn_on_stall=False, **_VARIANTS[form])
    return partial(optimizer.step, partial(loss, optimizer))


def captured(step: Step, device: torch.device) -> Step:
    """Return the replay of a step that a CUDA graph has captured; on the CPU the step itself."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Step = graph.replay
    return replay


def _measure(options: Options, name: str, model: Model, device: torch.device) -> None:
    """Measure all forms in turns: first call by call, then from graphs, so that a capture that fails harms nothing."""
    torch.manual_seed(0)
    inputs = model.batch().to(device)
    for graph in (False, True) if model.graphs else (False,):
        steps: dict[str, Step] = {}
        memory: dict[str, int] = {}
        elements = 0
        for form in model.forms:
            if graph and form == "script":  # its weights have other memory after each step
                continue
            with device:
                module = model.build()
            elements = sum(p.numel() for p in module.parameters())
            try:
                step = make_step(form, module, inputs, device)
                known = [*module.parameters(), inputs]
                memory[form] = peak_bytes(device, partial(_repeat, step), known)[0]
                steps[form] = captured(step, device) if graph else step
            except Exception as error:  # of one form: the others are measured all the same
                options.write(case=name, form=form, graph=graph, skipped=_one_line(error))
        rounds = 2 if options.quick else 7

        def take(form: str, steps: dict[str, Step] = steps) -> float:
            return seconds(device, "wall", partial(_repeat, steps[form])) / _IN_A_ROW

        times, _ = in_turns(list(steps), rounds, take)
        for form, values in times.items():
            options.write(
                case=name, form=form, graph=graph, elements=elements, milliseconds=[round(v, 4) for v in values],
                peak=memory[form], environment=describe(device),
            )  # fmt: skip


def _repeat(step: Step) -> None:
    for _ in range(_IN_A_ROW):
        step()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
