"""The same run, however it is cut, and wherever it is interrupted."""

import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from txl_dist.checkpoint.format import latest, steps

HERE = Path(__file__).parent

# What is trained, with every kind of dropout. Each is compared under every split with its own run in one process.
MODELS = {
    "plain": [],
    # Here some gradients are little but rounding, of which Adam makes full steps; not so with a larger eps.
    "variational": ["model.variational=true", "optimizer.eps=1e-5"],
    "adaptive": ["model.cutoffs=[60,110]", "model.div_val=2", "model.tie_projections=true", "model.same_length=true"],
    "untied": ["model.cutoffs=[60,110]", "model.div_val=2", "model.tie_weights=false", "optimizer.clip=0.0"],
    "lamb": ["optimizer=lamb", "engine.zero_stage=0"],
    "averaged": ["optimizer.average_from=5", "++optimizer.lr_scale={embedding|softmax: 0.5, bias$: 2.0}"],
    # Stages differ in the learning rates that occur in them.
    "scaled": ["++optimizer.lr_scale={embedding|softmax: 0.5}"],
    "scaled-untied": ["++optimizer.lr_scale={embedding: 0.5}", "model.tie_weights=false"],
    "documents": ["data.order=documents", "data.reset_memory=document", "optimizer.eps=1e-5"],
    **{name: [f"model.attention={name}", "train.loss=second_half"] for name in ("shaw", "absolute", "al_rfou")},
    "lengths": ["++evaluation={tgt_len: 9, mem_len: 40, clamp_len: 30}"],
}
# A split rounds in its own way. Where that moves the input of a ReLU across 0, a gradient changes by a term of its own,
# and what follows is another run: no bound holds for that. So these sizes and seeds are such that in no step the input
# of any ReLU is closer to 0 than EDGE, many times as far as rounding moves it.
EDGE = 2e-6
NARROW = ["model.d_inner=24"]
KINDS = {"dropout": 0.1, "dropatt": 0.1, "dropout_words": 0.1}
KINDS |= {"dropout_input": 0.2, "dropout_ff": 0.3, "dropout_output": 0.2}
DROPOUT = [f"model.{kind}={share}" for kind, share in KINDS.items()]
SEEDS = {
    "plain": 6,
    "adaptive": 18,
    "untied": 10,
    "lamb": 58,
    "averaged": 4,
    "scaled": 4,
    "scaled-untied": 4,
    "documents": 4,
}
SEEDS |= {"variational": 6, "shaw": 20, "absolute": 3, "al_rfou": 6, "lengths": 6}
MODELS = {name: [*NARROW, *DROPOUT, f"run.seed={SEEDS.get(name, 1)}", *options] for name, options in MODELS.items()}
ONE_GO = "in-one-go"


class Split(NamedTuple):
    """How a run is cut. `dp`: data-parallel ranks, `pp`: pipeline stages."""

    dp: int = 1
    pp: int = 1
    zero: int = 0
    acc: int = 1
    checkpointing: bool = False
    offload: str = "none"
    precision: str = "fp32"
    layers: str = ""
    compile: bool = False

    @property
    def processes(self):
        return self.dp * self.pp

    @property
    def overrides(self):
        return [
            f"engine.pipeline_stages={self.pp}",
            f"engine.stage_layers={'[' + self.layers.replace('+', ',') + ']' if self.layers else 'null'}",
            f"engine.zero_stage={self.zero}",
            f"engine.gradient_accumulation={self.acc}",
            f"engine.activation_checkpointing={str(self.checkpointing).lower()}",
            f"engine.offload={self.offload}",
            f"engine.precision={self.precision}",
            f"engine.compile={str(self.compile).lower()}",
        ]

    def __str__(self):
        words = [f"dp{self.dp}", f"pp{self.pp}", f"zero{self.zero}", f"acc{self.acc}"]
        words += ["checkpointing"] if self.checkpointing else []
        words += [f"offload-{self.offload}"] if self.offload != "none" else []
        words += [self.precision] if self.precision != "fp32" else []
        words += ["compiled"] if self.compile else []
        return "-".join([*words, *([self.layers] if self.layers else [])])


BF16 = [Split(2, zero=stage, precision="bf16") for stage in (1, 2, 3)]
BF16 += [Split(pp=2, zero=1, acc=2, precision="bf16"), Split(2, 2, zero=1, acc=4, precision="bf16")]

SPLITS = {
    "plain": [
        *(Split(1, 1, *fields) for fields in [(1,), (1, 4), (2, 2, True), (3, 1, True)]),
        *(Split(2, 1, *fields) for fields in product(range(4), (1, 2), (False, True))),
        *(Split(2, zero=stage, offload="optimizer") for stage in (1, 2, 3)),
        Split(2, zero=3, offload="parameters"),
        Split(2, zero=2, compile=True),
        Split(pp=2, zero=1, acc=2, checkpointing=True, compile=True),
        *(Split(4, 1, *fields) for fields in [(0,), (1,), (2, 2), (3, 2, True)]),
        *(Split(1, 2, *fields) for fields in product((0, 1), (1, 2, 4), (False, True))),
        Split(pp=2, zero=1, acc=2, offload="optimizer"),
        Split(pp=2, zero=1, acc=2, layers="1+1"),
        *(Split(1, 4, *fields) for fields in [(0, 2), (1, 4), (1, 8, True)]),
        *(Split(2, 2, *fields) for fields in [(0, 2), (1, 1), (1, 4, True)]),
    ],
    "variational": [Split(2, zero=3, acc=2), Split(pp=2, zero=1, acc=2)],
    "adaptive": [
        *(Split(2, zero=stage, acc=2) for stage in (1, 3)),
        *(Split(pp=2, zero=stage, acc=2) for stage in (0, 1)),
        Split(pp=4, zero=1, acc=4),
        Split(2, 2, zero=1, acc=2, checkpointing=True),
    ],
    "untied": [Split(pp=2, zero=1, acc=2), Split(2, 2, zero=0, acc=2)],
    "lamb": [Split(pp=2, zero=0, acc=2)],
    "averaged": [*(Split(2, zero=stage) for stage in range(4)), Split(pp=2, zero=1, acc=2)],
    "scaled": [
        *(Split(pp=2, zero=stage, acc=2, layers="2+0") for stage in (0, 1)),
        *(Split(pp=stages, zero=1, acc=2) for stages in (3, 4)),
    ],
    "scaled-untied": [
        *(Split(pp=2, zero=stage, acc=2) for stage in (0, 1)),
        Split(pp=2, zero=1, acc=2, offload="optimizer"),
        *(Split(pp=4, zero=stage, acc=2) for stage in (0, 1)),
        Split(2, 2, zero=1, acc=2),
    ],
    **{name: [Split(2, zero=3, acc=2), Split(pp=2, zero=1, acc=2)] for name in ("shaw", "absolute", "al_rfou")},
    "documents": [*(Split(2, zero=stage, acc=2) for stage in (1, 3)), Split(2, 2, zero=1, acc=2)],
    "lengths": [Split(2, zero=3), Split(pp=2, zero=1, acc=2), Split(2, 2, zero=1, acc=2)],
}
RUNS = [(model, split) for model, splits in SPLITS.items() for split in splits]

# Runs that change their split half-way: the model, the first half's split, the second's.
MOVES = [
    ("plain", Split(1, zero=1), Split(2, zero=2, acc=2)),
    ("plain", Split(2, zero=3), Split(1)),
    ("plain", Split(2, zero=3), Split(pp=2, zero=1, acc=2)),
    ("plain", Split(2, 2, zero=1, acc=2), Split(1)),
    ("plain", Split(1), Split(4, zero=2)),
    ("plain", Split(pp=4, zero=1, acc=4), Split(2, zero=1)),
    ("plain", Split(4, zero=1), Split(2, 2, zero=1, acc=4, checkpointing=True)),
    ("plain", Split(pp=2, zero=0, acc=2), Split(pp=4, zero=1, acc=4)),
    ("plain", Split(pp=2, zero=1, acc=4, checkpointing=True), Split(2, zero=3, offload="parameters")),
    ("plain", Split(2, zero=2, offload="optimizer"), Split(pp=2, zero=1, acc=2, layers="1+1")),
    ("adaptive", Split(pp=2, zero=1, acc=2), Split(2, zero=3, acc=2)),
    ("adaptive", Split(2, zero=2), Split(2, 2, zero=0, acc=2)),
    ("documents", Split(2, 2, zero=1, acc=2), Split(2, zero=1)),
    ("averaged", Split(2, zero=3), Split(pp=2, zero=1, acc=2)),
    ("averaged", Split(pp=2, zero=0, acc=2), Split(2, zero=2)),
    ("scaled", Split(pp=2, zero=1, acc=2, layers="2+0"), Split(2, zero=3)),
    ("scaled-untied", Split(1), Split(pp=4, zero=1, acc=2)),
]

# Runs that resume from the same checkpoint with a learning rate of almost nothing: each step is the first one from it.
STANDING = ["optimizer.lr=1e-30", "train.max_steps=30", "train.eval_every=1000"]
STANDING_STILL = [(model, split) for model, splits in SPLITS.items() for split in splits[:2] if model != "plain"]
STANDING_STILL += [("plain", Split(2, zero=stage, acc=2)) for stage in range(4)]
STANDING_STILL += [("plain", Split(pp=stages, zero=stage, acc=2)) for stages in (2, 4) for stage in (0, 1)]
STANDING_STILL += [("plain", Split(2, 2, zero=1, acc=4, checkpointing=True))]

# In one start and in two.
IN_TWO_STARTS = [*(Split(2, zero=stage) for stage in range(4)), *(Split(pp=2, zero=z, acc=2) for z in (0, 1))]
IN_TWO_STARTS += [Split(2, zero=1, compile=True)]
# Evaluated often, and only at the end.
WATCHED = [Split(2, zero=2), Split(pp=2, zero=1, acc=2)]


COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.fixture(autouse=True)
def compiler(request):
    """What is compiled needs one; nothing else here does."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not COMPILER and ("split" in params and params["split"].compile or "is_compiled" in request.node.name):
        pytest.skip("no C++ compiler here, for engine.compile")


def name(*parts):
    return "/".join(map(str, parts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run, small):
    """All runs of this file, 20 steps each; all of one size in one process group."""
    folder = tmp_path_factory.mktemp("runs")
    half = ["train.stop_at=10"]
    patience = ["guard.stall_timeout=120"]
    first, second = [], []  # (processes, run directory, overrides)

    def add(starts, where, split, *more):
        if split.compile and not COMPILER:
            return
        overrides = [*split.overrides, *(override for part in more for override in part)]
        starts.append((split.processes, where, overrides))

    add(first, "of-old", Split())
    for model, options in MODELS.items():
        add(first, name(model, ONE_GO), Split(), options)
        add(second, name("standing", model, ONE_GO), Split(), options, STANDING)
    for model, split in STANDING_STILL:
        add(second, name("standing", model, split), split, MODELS[model], STANDING)
    for model, split in [*RUNS, *(("plain", split) for split in BF16)]:
        add(first, name(model, split), split, MODELS[model])
    for model, before, after in MOVES:
        add(first, name("moves", model, before, after), before, MODELS[model], half)
        add(second, name("moves", model, before, after), after, MODELS[model])
    for split in IN_TWO_STARTS:
        add(first, name("whole", split), split, DROPOUT)
        add(first, name("parts", split), split, DROPOUT, half)
        add(second, name("parts", split), split, DROPOUT)
    for split in WATCHED:
        add(first, name("watched", split), split, DROPOUT, ["train.eval_every=3"])
        add(first, name("unwatched", split), split, DROPOUT, ["train.eval_every=1000"])

    for starts in (first, second):
        for processes in sorted({processes for processes, _, _ in starts}):
            jobs_file = folder / "jobs.json"
            jobs = [
                [*small, *patience, f"run.dir={folder / where}", *more] for n, where, more in starts if n == processes
            ]
            jobs_file.write_text(json.dumps(jobs))
            run(HERE / "many_runs.py", str(jobs_file), "--no-curves", processes=processes, fresh=True)
        if starts is first:
            assert all(steps(folder / where) == [10] for _, where, more in first if half[0] in more)
            for model, split in [*((model, ONE_GO) for model in MODELS), *STANDING_STILL]:
                shutil.copytree(folder / name(model, ONE_GO), folder / name("standing", model, split))
    return folder


def losses(metrics, run_dir, key="train/loss"):
    return [line[key] for line in metrics(run_dir) if key in line]


def check_same(metrics, run_dir, reference, without_effect=()):
    """Losses within 1e-5; weights and memories, each tensor as a whole, within 1e-5 as well. No ReLU is at its edge.

    Args:
        without_effect: weights whose gradient is nothing but rounding.
    """
    assert len(losses(metrics, run_dir)) == 20
    for key in ("train/loss", "train/grad_norm", "valid/loss", "test/loss"):
        assert losses(metrics, run_dir, key) == pytest.approx(losses(metrics, reference, key), rel=1e-5), key
    check_same_use(metrics(run_dir), metrics(reference))
    for kind in ("weights", "memory", "optimizer"):
        actual, expected = (latest(path).tensors(kind) for path in (run_dir, reference))
        assert actual.keys() == expected.keys()
        for key, value in expected.items():  # memories by (layer, lane): the right lane, not just the same set
            if key.startswith("exp_avg") or key in without_effect:
                continue  # moments near zero are all rounding; what they do is seen in the weights
            assert value.norm() > 0, key
            error = (actual[key] - value).norm()
            assert error <= 1e-5 * value.norm(), (key, error / value.norm())


def check_same_use(lines, reference):
    """What the memory does: a gain is a difference of losses, which are some nats."""
    for line, expected in zip(lines, reference, strict=True):
        keys = [key for key in expected if key.startswith("memory/") and key != "memory/seconds"]
        assert [key for key in line if key in keys] == keys
        assert all(line[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-5) for key in keys)


@pytest.mark.parametrize("model, split", RUNS, ids=[name(model, split) for model, split in RUNS])
def test_every_split_is_the_same_run(runs, metrics, model, split):
    check_same(metrics, runs / name(model, split), runs / name(model, ONE_GO))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [(), ("standing",)], ids=["moving", "standing"])
def test_no_relu_is_at_its_edge(runs, kind, model):
    """Else the runs that are compared need not be the same, and another machine may find that they are not."""
    closest = float((runs / name(*kind, model, ONE_GO) / "closest_to_the_edge").read_text())
    assert EDGE < closest < 1


@pytest.mark.parametrize("model, split", STANDING_STILL, ids=[name(model, split) for model, split in STANDING_STILL])
def test_each_step_from_the_same_checkpoint_has_the_same_gradient(runs, metrics, model, split):
    """The loss and the gradient's norm of each step, and of each parameter the sum of ten gradients that Adam keeps.

    To 1e-6, or to 1e-11 of the whole gradient, where a parameter's own is a small difference of large numbers.
    """
    run_dir, reference = (runs / name("standing", model, cut) for cut in (split, ONE_GO))
    for key in ("train/loss", "train/grad_norm"):
        actual, expected = (losses(metrics, path, key) for path in (run_dir, reference))
        assert len(actual) == 30 and actual == pytest.approx(expected, rel=1e-6), key
    start = runs / name(model, ONE_GO)
    actual, expected, before = (latest(path).tensors("optimizer") for path in (run_dir, reference, start))
    gradients = {key: expected[key] - 0.9**10 * before[key] for key in expected if key.startswith("exp_avg/")}
    total_norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for key, gradient in gradients.items():
        error = (actual[key] - expected[key]).norm()
        assert error <= 1e-6 * gradient.norm() + 1e-11 * total_norm, (key, error / gradient.norm(), error / total_norm)


@pytest.mark.parametrize(
    "model, before, after", MOVES, ids=[f"{model}/{before}-to-{after}" for model, before, after in MOVES]
)
def test_a_run_goes_on_under_another_split(runs, metrics, model, before, after):
    check_same(metrics, runs / name("moves", model, before, after), runs / name(model, ONE_GO))


@pytest.mark.parametrize("split", BF16, ids=str)
def test_bf16_follows_fp32(runs, metrics, split):
    """bf16 has 8 bits: losses may differ in the third digit, and do (else it was not bf16)."""
    bf16, fp32 = (losses(metrics, runs / name("plain", cut)) for cut in (split, ONE_GO))
    assert bf16 == pytest.approx(fp32, rel=1e-2) and bf16 != pytest.approx(fp32, rel=1e-6)


def test_losses_are_those_of_old(runs, metrics):
    """A change of the numbers, however small, is to be noticed; another processor rounds otherwise."""
    kept = json.loads((HERE / "exact_losses.json").read_text())
    assert losses(metrics, runs / "of-old") == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("split", IN_TWO_STARTS, ids=str)
def test_a_run_in_two_starts_is_the_run_in_one(runs, metrics, check_identical, split):
    """To the bit."""
    one_start = runs / name("whole", split)
    two_starts = runs / name("parts", split)
    check_identical(one_start, two_starts)
    assert [line["step"] for line in metrics(two_starts) if "train/loss" in line] == list(range(1, 21))


def test_what_is_compiled_is_compiled(runs, metrics):
    """What is compiled rounds otherwise; it drops the same."""
    plain, compiled = (losses(metrics, runs / name("whole", Split(2, zero=1, compile=flag))) for flag in (False, True))
    assert compiled != plain and compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("split", WATCHED, ids=str)
def test_evaluation_changes_no_later_loss_by_a_bit(runs, metrics, split):
    watched, unwatched = (runs / name(kind, split) for kind in ("watched", "unwatched"))
    assert len(losses(metrics, watched, "valid/loss")) == 7 and len(losses(metrics, unwatched, "valid/loss")) == 1
    assert losses(metrics, watched) == losses(metrics, unwatched)
    one, two = (latest(path).tensors("memory") for path in (watched, unwatched))
    assert all(torch.equal(one[key], two[key]) for key in one)
