"""The page of a text: what it holds is what the model says, and a mistake is named."""

import json
import re

import pytest

from txl_dist.config.schema import LookJob
from txl_dist.errors import UserError
from txl_dist.evaluation.scoring import Scorer
from txl_dist.look import look

TEXT = "the and of the\nabcd <b>&amp;</b> \u00e9 the and of the abcd"


@pytest.fixture(scope="module")
def trained_run(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("look") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}")
    return run_dir


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))[1]
    )


def test_the_page_holds_what_the_model_says(trained_run, run, tmp_path):
    page = tmp_path / "my [page].html"
    printed = run("txl_dist.look", f"run={trained_run}", f"text={TEXT}", f"to={page}").stdout
    data = data_of(page)
    scores, _ = Scorer.open(str(trained_run)).read(TEXT)
    assert data["tokens"] == [score.text for score in scores] and "".join(data["tokens"]) == TEXT
    assert data["loss"] == pytest.approx([-score.log_prob for score in scores], abs=1e-4)
    assert data["alone"][:16] == data["loss"][:16] and data["alone"] != data["loss"]
    assert (data["tgt_len"], data["mem_len"], data["step"]) == (16, 24, 20)
    assert data["attention"]["layers"] == [[0, 2], [1, 2]] and data["text_tokens"] == len(TEXT.encode())
    mean = sum(data["loss"]) / len(scores)
    assert float(re.search(r"loss with memory (\S+),", printed)[1]) == pytest.approx(mean, abs=1e-3)
    assert f"{page}: " in printed and " kB; open it" in printed
    loads = re.findall(r"src=|href=\S+|@import|url\(", page.read_text("utf-8"))
    assert loads == ['href="data:,">']  # an icon that is none: all that the page shows is in it


def test_a_long_text_is_cut_and_lengths_can_be_others(trained_run, run, tmp_path):
    options = ["max_tokens=20", "model.tgt_len=4", "model.mem_len=8"]
    done = run("txl_dist.look", f"run={trained_run}", *options, f"to={tmp_path}/look.html", stdin=TEXT)
    data = data_of(tmp_path / "look.html")
    assert f"The text has {len(TEXT.encode())} tokens: it is cut after max_tokens=20." in done.stdout
    assert "".join(data["tokens"]) == TEXT[:20] and (data["tgt_len"], data["mem_len"]) == (4, 8)
    scores, _ = Scorer.open(str(trained_run), changes={"tgt_len": 4, "mem_len": 8}).read(TEXT)
    assert data["loss"] == pytest.approx([-score.log_prob for score in scores[:20]], abs=1e-4)


def test_the_page_is_look_html_by_default(trained_run, run, tmp_path):
    run("txl_dist.look", f"run={trained_run}", "text=a", cwd=tmp_path)
    assert len(data_of(tmp_path / "look.html")["tokens"]) == 1


def test_mistakes_are_named_and_nothing_is_overwritten(trained_run, run, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("a book")
    wrong = [f"run={tmp_path}", f"to={text}", "text=a", "max_tokens=0"]
    refused = run("txl_dist.look", *wrong, expect=2, cwd=tmp_path).stderr
    assert f"run={tmp_path}: holds no checkpoint" in refused and "max_tokens=0: " in refused
    wrong = [f"run={trained_run}", "text=a"]
    refused = run("txl_dist.look", *wrong, f"to={text}", expect=2).stderr
    assert f"to={text}: is not the name of a page; give one that ends with .html" in refused
    refused = run("txl_dist.look", *wrong, f"to={tmp_path}/none/look.html", expect=2).stderr
    assert f"there is no folder {tmp_path}/none" in refused
    refused = run("txl_dist.look", f"run={trained_run}", "text=''", f"to={tmp_path}/look.html", expect=2).stderr
    assert "text: has no token to look at; give a longer one" in refused
    assert sorted(tmp_path.iterdir()) == [text] and text.read_text() == "a book"


def test_a_text_that_cannot_be_encoded_is_refused(trained_run, tmp_path):
    options = {"max_tokens": 512, "checkpoint": None, "average": False, "model": {}}
    job = LookJob(run=str(trained_run), text="a\ud800", to=f"{tmp_path}/look.html", **options)
    with pytest.raises(UserError, match="text: character 2 is half of a surrogate pair"):
        look(job)
    assert not [*tmp_path.iterdir()]
