"""tracking.prompts: what a run writes while it trains."""

from types import SimpleNamespace

import pytest

from txl_dist.config.checks import prompts_can_be_encoded
from txl_dist.evaluation.sampling import Completion, Sampler, complete
from txl_dist.runs.load import load_model, load_tokenizer
from txl_dist.tracking.events import read_events

PROMPTS = ["the ab", "of"]
GIVEN = ['tracking.prompts=["the ab", "of"]', "tracking.sample_tokens=12", "checkpoint.keep_last=2"]


def samples(run_dir):
    return {event["step"]: event["samples"] for event in read_events(str(run_dir)) if event["event"] == "samples"}


@pytest.fixture(scope="module")
def one(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    done = run("txl_dist.train", *small, *GIVEN, f"run.dir={run_dir}")
    return run_dir, done


def test_samples_are_what_the_checkpoint_of_that_step_generates(one):
    run_dir, done = one
    drawn = samples(run_dir)
    assert list(drawn) == [10, 20]
    for step, of_step in drawn.items():
        model, checkpoint = load_model(str(run_dir), step)
        completions = [Completion(load_tokenizer(str(run_dir), checkpoint), prompt) for prompt in PROMPTS]
        list(complete(model, completions, Sampler(temperature=0.8), seed=1, max_tokens=12))
        assert [sample["prompt"] for sample in of_step] == PROMPTS
        assert [sample["prompt"] + sample["text"] for sample in of_step] == [text.text for text in completions]
        assert of_step[0]["prompt"] + of_step[0]["text"] in done.stdout + done.stderr
    assert drawn[10] != drawn[20]


@pytest.mark.distributed
@pytest.mark.parametrize("split", ["engine.zero_stage=3", "engine.pipeline_stages=2"])
def test_every_split_draws_the_same_samples(one, run, small, tmp_path, split):
    run("txl_dist.train", *small, *GIVEN, split, f"run.dir={tmp_path}", processes=2)
    assert samples(tmp_path) == samples(one[0])


def test_samples_change_no_loss_by_a_bit(one, run, small, metrics, tmp_path):
    run("txl_dist.train", *small, f"run.dir={tmp_path}")
    assert [line.get("train/loss") for line in metrics(tmp_path)] == [
        line.get("train/loss") for line in metrics(one[0])
    ]


def test_a_prompt_that_the_tokenizer_cannot_read_is_named(dataset):
    tracking = SimpleNamespace(prompts=["the", "\ud800"])
    (problem,) = prompts_can_be_encoded(tracking, SimpleNamespace(dir=str(dataset)))
    assert problem == "tracking.prompts: text 2: character 1 is half of a surrogate pair, which is not text; remove it"
