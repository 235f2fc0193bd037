"""Log-probabilities of a text equal those of one forward over it, for any segments, softmax and tokens."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.batches import batch
from txl_dist.checkpoint.format import latest, write_manifest
from txl_dist.errors import ConfigError
from txl_dist.evaluation.scoring import Scorer
from txl_dist.runs.load import load_model

TEXT = "the and of the\nabcd"


@pytest.fixture(scope="module", params=["full", "adaptive"])
def trained_run(request, run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("score") / request.param
    adaptive = ["model.cutoffs=[60,110]", "model.div_val=2"] if request.param == "adaptive" else []
    run("txl_dist.train", *small, f"run.dir={run_dir}", *adaptive)
    return run_dir


def test_scores_are_those_of_one_forward(trained_run):
    """Read segments of 5 tokens with a memory of all before them."""
    scores, next_log_probs = Scorer.open(str(trained_run), changes={"tgt_len": 5, "mem_len": 30}).read(TEXT)
    scorer = Scorer.open(str(trained_run), changes={"mem_len": 0})
    inputs = torch.tensor([[scorer.tokenizer.eos, *TEXT.encode()]])
    with torch.no_grad():
        log_probs, _ = scorer.model(
            batch(inputs, None, torch.arange(inputs.size(1))[None]), scorer.model.empty_memory(1)
        )
    assert [score.token for score in scores] == list(TEXT.encode()) and "".join(score.text for score in scores) == TEXT
    expected = [log_probs[0, i, token].item() for i, token in enumerate(TEXT.encode())]
    assert [score.log_prob for score in scores] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(next_log_probs, log_probs[0, -1], rtol=1e-5, atol=1e-5)
    assert next_log_probs.exp().sum().item() == pytest.approx(1, rel=1e-5)


def test_a_config_that_does_not_fit_together_is_refused_without_any_change(trained_run, tmp_path):
    """By whatever it came into the checkpoint, whose sums are right."""
    shutil.copytree(trained_run, tmp_path / "run")
    folder = latest(tmp_path / "run").path
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["sha256"]
    manifest["config"]["model"]["clamp_len"] = 0
    write_manifest(folder, manifest)
    with pytest.raises(ConfigError, match=r"model\.clamp_len=0: would make all distances equal"):
        load_model(str(tmp_path / "run"))


def test_json_and_table_show_the_same_scores(trained_run, run):
    printed = json.loads(run("txl_dist.score", f"run={trained_run}", f"text={TEXT}", "format=json", "next=3").stdout)
    scores, next_log_probs = Scorer.open(str(trained_run)).read(TEXT)
    log_probs = [score.log_prob for score in scores]
    assert [token["log_prob"] for token in printed["tokens"]] == pytest.approx(log_probs, rel=1e-5)
    assert printed["log_prob"] == pytest.approx(sum(log_probs), rel=1e-5)
    assert [token["token"] for token in printed["next"]] == next_log_probs.topk(3).indices.tolist()
    table = run("txl_dist.score", f"run={trained_run}", stdin=TEXT).stdout
    assert f"{np.exp(scores[0].log_prob):.4f}" in table and "next token" in table and f"{len(TEXT)} tokens" in table


def test_a_model_that_reads_from_left_to_right_has_no_other_side(trained_run, run):
    refused = run("txl_dist.score", f"run={trained_run}", "text=a", "context=both", expect=2).stderr
    assert "context=both: transformer_xl predicts from left to right only; give context=left" in refused


def test_an_empty_text_has_a_next_token(trained_run, run):
    printed = json.loads(run("txl_dist.score", f"run={trained_run}", "text=''", "format=json", "next=2").stdout)
    more = json.loads(run("txl_dist.score", f"run={trained_run}", "text=''", "format=json", "next=9999").stdout)
    assert len(more["next"]) == 257  # the whole vocabulary
    assert printed["tokens"] == [] and printed["log_prob"] == 0 and len(printed["next"]) == 2


def test_the_scorer_can_be_imported_from_its_former_place():
    with pytest.warns(DeprecationWarning, match=r"import Scorer from txl_dist\.evaluation\.scoring"):
        from txl_dist.score import Scorer as former
    assert former is Scorer
