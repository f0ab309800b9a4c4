"""Two processes under a Trainer: per-rank and synced perturbations are what one process computes by hand."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import samopt
from samopt.integrations.transformers import SAMTrainer, SharpnessCallback
from tests.helpers import cases, hf
from tests.helpers.ranks import run_on_launched_ranks
from tests.integrations.transformers.test_transformers_scaler import Scaled

pytestmark = [pytest.mark.hf, pytest.mark.slow]

RANKS = 2
SCENARIOS = {
    "per-rank": {},
    "per-rank, accumulated and clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "synced": {"sam_sync_perturbation": True},
    "synced, accumulated and clipped": {
        "sam_sync_perturbation": True,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
    },
    "per-rank every second step": {"sam_every": 2},
    "asam": {"sam": "asam"},
    "per-rank, static graph": {"ddp_static_graph": True},
    "one pass": {"sam_direction": "momentum"},
    "one pass, accumulated and clipped": {
        "sam_direction": "momentum",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
    },
    "without sam": {"sam": "none"},
    "per-rank, one without gradients": {"kind": "SilentOnOneRank"},
    "measured on the first rank": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_sharpness/one_step",
        "greater_is_better": False,
        "trainer_options": {"eval_dataset": hf.language(8, seed=2)},
    },
}
SCALED = {"inf on one rank": {(2, False), (2, True)}, "inf on one rank's second pass": {(1, True), (3, True)}}


class SilentOnOneRank(SAMTrainer):
    """Rank 1 has nothing to learn from at step 1."""

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        return loss * 0 if (self.args.process_index, self.state.global_step) == (1, 1) else loss


def train(rank, folder):
    """One rank's part of every scenario."""
    for name, options in SCENARIOS.items():
        model = hf.gpt2()
        trainer = hf.make_trainer(
            folder / "run",
            model,
            hf.language(32),
            ddp_backend="gloo",
            base=hf.momentum_sgd,
            **options | {"kind": SilentOnOneRank if "kind" in options else SAMTrainer},
        )
        assert trainer.accelerator.num_processes == RANKS
        if "eval_steps" in options:
            trainer.add_callback(SharpnessCallback(["one_step"], every=3, max_fraction=None))
        trainer.train()
        result = {name: hf.logged(trainer, name) for name in ("loss", "sharpness/one_step")}
        result["best"] = trainer.state.best_metric
        torch.save(result | {"weights": cases.bits(model)}, folder / f"{name}-{rank}.pt")
    for name, overflow in SCALED.items():
        AcceleratorState._reset_state(True)
        model = hf.gpt2()
        trainer = hf.make_trainer(folder / "run", model, hf.language(32), kind=Scaled, ddp_backend="gloo")
        trainer.overflow = overflow if rank == 1 else set()
        trainer.train()
        torch.save({"weights": cases.bits(model), "scales": trainer.scales}, folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_launched_ranks(train, folder, RANKS)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(RANKS)]
        for name in [*SCENARIOS, *SCALED]
    }


def by_hand(options):
    """The same run in one process: rank r trains on every second batch, and gradients are averaged.

    Trainer divides by the number of labels on all ranks, and multiplies by that of ranks.
    """
    model = hf.gpt2()
    model.train()
    base = hf.momentum_sgd(model)
    kind = {"sam": samopt.SAM, "asam": samopt.ASAM, "none": None}[options.get("sam", "sam")]
    direction = options.get("sam_direction", "gradient")
    optimizer = None if kind is None else kind(base, model=model, direction=direction)
    accumulate = options.get("gradient_accumulation_steps", 1)
    batches = hf.batches_of(hf.language(32))
    shards = [batches[rank::RANKS] for rank in range(RANKS)]
    steps = len(shards[0]) // accumulate
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: (2 * steps - step) / (2 * steps))
    losses = []
    for step in range(2 * steps):
        start = step % steps * accumulate
        windows = [shard[start : start + accumulate] for shard in shards]

        count = sum((batch["labels"] != -100).sum() for window in windows for batch in window)

        def backward(rank, step=step, windows=windows, count=count):
            torch.manual_seed(1000 + step)
            total = 0.0
            for batch in windows[rank]:
                loss = model(**batch, num_items_in_batch=count)["loss"] * RANKS
                if "kind" in options and (rank, step) == (1, 1):
                    loss = loss * 0
                loss.backward()
                total += float(loss.detach())
            return total

        (optimizer or base).zero_grad()
        perturbs = direction == "gradient" and optimizer is not None and step % options.get("sam_every", 1) == 0
        learns_graph = step == 0 and options.get("ddp_static_graph")  # from an exchange, whatever the mode
        if perturbs and not options.get("sam_sync_perturbation") and not learns_graph:
            gradients = []
            values = []
            for rank in range(RANKS):
                optimizer.zero_grad()
                values.append(backward(rank))
                with optimizer.perturbed():
                    backward(rank)
                gradients.append([p.grad.clone() for p in model.parameters()])
            for p, *parts in zip(model.parameters(), *gradients, strict=True):
                p.grad = sum(parts) / RANKS
        else:
            values = [backward(rank) for rank in range(RANKS)]
            for p in model.parameters():
                p.grad /= RANKS
            if perturbs:
                with optimizer.perturbed():
                    for rank in range(RANKS):
                        backward(rank)
                for p in model.parameters():
                    p.grad /= RANKS
        losses.append(sum(values) / RANKS)
        if options.get("max_grad_norm"):
            nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"])
        (optimizer if direction == "momentum" else base).step()
        scheduler.step()
    return model, losses


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name, results):
    first, second = results[name]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    model, losses = by_hand(SCENARIOS[name])
    assert first["loss"] == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(first["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)  # sums over ranks round once more


@pytest.mark.parametrize("name", SCALED)
def test_an_overflow_on_one_rank_skips_the_step_on_both(name, results):
    first, second = results[name]
    assert first["scales"] == second["scales"]
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()
    halved = [after < before for before, after in zip(first["scales"], first["scales"][1:], strict=False)]
    assert sum(halved) == len({step for step, _ in SCALED[name]})


def test_per_rank_and_synced_differ(results):
    """So that the comparisons above tell them apart."""
    per_rank, synced = results["per-rank"][0]["weights"], results["synced"][0]["weights"]
    assert max(float((a - b).abs().max()) for a, b in zip(per_rank, synced, strict=True)) > 1e-4


def test_the_first_rank_measures(results):
    first, second = results["measured on the first rank"]
    values = first["sharpness/one_step"]  # at step 2, for the evaluation that awaits one, and at steps 3 and 6
    assert len(values) == 3
    assert second["sharpness/one_step"] == []
    assert first["best"] == second["best"] == min(values)
