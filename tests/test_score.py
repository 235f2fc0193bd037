"""Log-probabilities of texts: those of one forward over the whole, whatever the segments, the softmax or the tokens."""

import json

import numpy as np
import pytest
import torch

from txl_dist.config.schema import LengthsConfig
from txl_dist.evaluation.scoring import Scorer

TEXT = "the and of the\nabcd"


@pytest.fixture(scope="module", params=["full", "adaptive"])
def trained(request, run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("score") / request.param
    adaptive = ["model.cutoffs=[60,110]", "model.div_val=2"] if request.param == "adaptive" else []
    run("txl_dist.train", *small, f"run.dir={run_dir}", *adaptive)
    return run_dir


def test_scores_are_those_of_one_forward(trained):
    """In segments of 5 with a memory of everything."""
    scores, after = Scorer.open(str(trained), lengths=LengthsConfig(5, 30, None, None)).read(TEXT)
    scorer = Scorer.open(str(trained), lengths=LengthsConfig(None, 0, None, None))
    inputs = torch.tensor([[scorer.tokenizer.eos, *TEXT.encode()]])
    with torch.no_grad():
        whole, _ = scorer.model(inputs, None, torch.arange(inputs.size(1))[None], scorer.model.empty_memory(1))
    assert [each.token for each in scores] == list(TEXT.encode()) and "".join(each.text for each in scores) == TEXT
    expected = [whole[0, i, token].item() for i, token in enumerate(TEXT.encode())]
    assert [each.log_prob for each in scores] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(after, whole[0, -1], rtol=1e-5, atol=1e-5)
    assert after.exp().sum().item() == pytest.approx(1, rel=1e-5)


def test_json_and_table_tell_the_same(trained, run):
    told = json.loads(run("txl_dist.score", f"run={trained}", f"text={TEXT}", "format=json", "next=3").stdout)
    scores, after = Scorer.open(str(trained)).read(TEXT)
    assert [each["log_prob"] for each in told["tokens"]] == pytest.approx([each.log_prob for each in scores], rel=1e-5)
    assert told["log_prob"] == pytest.approx(sum(each.log_prob for each in scores), rel=1e-5)
    assert [each["token"] for each in told["next"]] == after.topk(3).indices.tolist()
    table = run("txl_dist.score", f"run={trained}", stdin=TEXT).stdout
    assert f"{np.exp(scores[0].log_prob):.4f}" in table and "next token" in table and f"{len(TEXT)} tokens" in table


def test_an_empty_text_has_a_next_token(trained, run):
    told = json.loads(run("txl_dist.score", f"run={trained}", "text=''", "format=json", "next=2").stdout)
    more = json.loads(run("txl_dist.score", f"run={trained}", "text=''", "format=json", "next=9999").stdout)
    assert len(more["next"]) == 257  # all that there are
    assert told["tokens"] == [] and told["log_prob"] == 0 and len(told["next"]) == 2


def test_the_scorer_can_be_imported_from_its_former_place():
    with pytest.warns(DeprecationWarning, match=r"import Scorer from txl_dist\.evaluation\.scoring"):
        from txl_dist.score import Scorer as former
    assert former is Scorer
