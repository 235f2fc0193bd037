"""Fine-tuning is the same run under every split and after every restart: classes, scores and answers, dropout on."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_same_run import Split, check_same
from tests.examples import write_labels, write_scores, write_squad
from txl_dist.data.index import Index

LANES = 8
SIZES = ["model.n_layer=2", "model.d_model=32", "model.n_head=2", "model.d_head=16", "model.d_inner=64"]
XLNET = ["model=xlnet", *SIZES, "model.reuse_len=8", "model.tgt_len=24", "model.mem_len=32", "model.dropatt=0.1"]
TRANSFORMER_XL = ["model=transformer_xl", *SIZES, "model.tgt_len=20", "model.mem_len=16", "model.dropatt=0.1"]
COMMON = ["data.order=documents", "data.reset_memory=document", f"data.num_lanes={LANES}", "model.dropout=0.1"]
COMMON += ["optimizer=adamw", "optimizer.lr=3e-3", "optimizer.clip=1.0", "tracking.mode=disabled", "train.max_steps=20"]
COMMON += ["train.eval_every=10", "checkpoint.every=10", "tracking.log_every=1"]
LABELS = ["objective=classification", *XLNET, "optimizer.layer_decay=0.75"]  # most examples have several segments
SCORES = ["objective=classification", *TRANSFORMER_XL]
QUESTIONS = ["objective.max_question_tokens=6", "objective.doc_stride=8"]
ANSWERS = ["objective=span_qa", *QUESTIONS, *XLNET]
QUESTION_FIRST = ["objective=span_qa", "objective.head=simple", "objective.passage_first=false", *QUESTIONS]
QUESTION_FIRST += TRANSFORMER_XL
TASKS = {"labels": LABELS, "scores": SCORES, "answers": ANSWERS, "question-first": QUESTION_FIRST}
DATA = {"labels": "labels", "scores": "scores", "answers": "answers", "question-first": "answers"}
SPLITS = [
    Split(1, acc=4, checkpointing=True),
    Split(2, zero=1, acc=2),
    Split(2, zero=3),
    Split(2, zero=2, offload="optimizer"),
    Split(4, zero=1),
    Split(pp=2, zero=1, acc=2),
    Split(2, 2, zero=1, acc=2, checkpointing=True),
]
MOVES = [(Split(2, zero=3), Split(1)), (Split(1), Split(2, 2, zero=1, acc=2))]
# Softmax over positions does not see what is added to all of them.
WITHOUT_EFFECT = {
    "answers": [f"task_head.{name}.bias" for name in ("start", "end.layer_norm", "end.dense_1")],
    "question-first": ["task_head.out.bias"],
}
FEW = [Split(2, zero=1, acc=2), Split(2, 2, zero=1, acc=2, checkpointing=True)]  # where others have more already
CASES = [(task, split) for task in TASKS for split in (SPLITS if task in ("labels", "answers") else FEW)]
MOVED = [(task, *move) for task in TASKS for move in MOVES]


@pytest.fixture(scope="module")
def datasets(run, tmp_path_factory):
    """One dataset of each kind, prepared."""
    folder = tmp_path_factory.mktemp("examples")
    for name, write in (("labels", write_labels), ("scores", write_scores), ("answers", write_squad)):
        files = folder / f"{name}-files"
        files.mkdir()
        corpus = "squad" if name == "answers" else "examples"
        tokenizer = ["tokenizer=xlnet", "tokenizer.vocab_size=120"] if name != "scores" else ["tokenizer=bytes"]
        cut = ["data.sample_tokens=256", "data.shard_samples=4", f"data.dir={folder / name}"]
        run("txl_dist.prepare", f"corpus={corpus}", *write(files), *tokenizer, *cut)
    return folder


def name(task, *splits):
    return "-".join(map(str, (task, *splits)))


@pytest.fixture(scope="module")
def runs(run, datasets, tmp_path_factory):
    """A run of each task in one process, under every split, and with a change of the split half-way."""
    folder = tmp_path_factory.mktemp("splits")
    first = [(task, name(task, "whole"), Split(), []) for task in TASKS]
    first += [(task, name(task, split), split, []) for task, split in CASES]
    first += [(task, name(task, before, after), before, ["train.stop_at=10"]) for task, before, after in MOVED]
    second = [(task, name(task, before, after), after, []) for task, before, after in MOVED]
    for starts in (first, second):
        for processes in sorted({split.processes for _, _, split, _ in starts}):
            jobs = [
                [
                    *TASKS[task],
                    *COMMON,
                    f"data.dir={datasets / DATA[task]}",
                    *split.overrides,
                    *more,
                    f"run.dir={folder / path}",
                ]
                for task, path, split, more in starts
                if split.processes == processes
            ]
            (folder / "jobs.json").write_text(json.dumps(jobs))
            script = Path(__file__).parent / "many_runs.py"
            run(script, str(folder / "jobs.json"), "--no-curves", processes=processes, fresh=True)
    return folder


def check_same_metrics(metrics, run_dir, reference):
    """All that is said of examples, whatever a rounding makes of the likeliest of several."""
    for line, expected in zip(metrics(run_dir), metrics(reference), strict=True):
        keys = [key for key in expected if key.startswith(("valid/", "test/"))]
        assert [key for key in line if key in keys] == keys
        assert all(line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-4) for key in keys)


@pytest.mark.parametrize("task, split", CASES, ids=[name(*case) for case in CASES])
def test_every_split_is_the_same_run(runs, metrics, task, split):
    whole = runs / name(task, "whole")
    check_same(metrics, runs / name(task, split), whole, WITHOUT_EFFECT.get(task, []))
    check_same_metrics(metrics, runs / name(task, split), whole)


@pytest.mark.parametrize("task, before, after", MOVED, ids=[name(*case) for case in MOVED])
def test_a_run_goes_on_under_another_split(runs, metrics, task, before, after):
    check_same(metrics, runs / name(task, before, after), runs / name(task, "whole"), WITHOUT_EFFECT.get(task, []))


@pytest.mark.parametrize("task", TASKS)
def test_a_restart_changes_nothing(run, datasets, runs, tmp_path, check_identical, task):
    options = [*TASKS[task], *COMMON, f"data.dir={datasets / DATA[task]}", f"run.dir={tmp_path / 'run'}"]
    options += Split().overrides
    run("txl_dist.train", *options, "train.stop_at=10")
    run("txl_dist.train", *options)
    check_identical(tmp_path / "run", runs / name(task, "whole"))


def test_what_is_measured(runs, metrics):
    """The metrics of each task, and no others."""
    keys = {task: {key for line in metrics(runs / name(task, "whole")) for key in line} for task in TASKS}
    assert {"valid/accuracy", "test/f1", "test/matthews"} <= keys["labels"]
    assert {"valid/pearson", "test/spearman"} <= keys["scores"]
    assert {"valid/exact_match", "test/answer_f1", "test/no_answer_f1", "test/best_threshold"} <= keys["answers"]
    assert not any(key.startswith("memory/") or "perplexity" in key for task in TASKS for key in keys[task])


def test_examples_are_longer_than_a_segment(datasets):
    """Else nothing of the memory between the segments of an example would be tested."""
    starts = Index.open(str(datasets / "labels")).splits["train"].document_starts.astype(int)
    lengths = starts[1:] - starts[:-1]
    assert (lengths > 24).sum() > 20 and (lengths > 48).any()
