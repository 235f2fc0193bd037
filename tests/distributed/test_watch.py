"""What is logged of a step's inside is the same under every split, and watching changes nothing."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.distributed.test_same_run import COMPILER, DROPOUT, EDGE, Split
from txl_dist.checkpoint.format import directory, open_checkpoint

HERE = Path(__file__).parent
STEPS = 6
# Known to be bad; the first one is watched.
SKIPPED = [{"step": 4, "why": "known"}, {"step": 5, "why": "known"}]
# An odd width leaves padding behind the shards of ZeRO 3.
ODD = ["model.d_inner=25", *DROPOUT]
# What is trained, with seeds that keep inputs of ReLUs away from 0: tests/distributed/test_same_run.py says why.
MODELS = {
    "tied": ["run.seed=4"],
    "groups": ["++optimizer.lr_scale={embedding|softmax: 0.5, bias$: 2.0}", "run.seed=6", "optimizer.clip=0.0"],
    "adaptive": ["model.cutoffs=[60,110]", "model.div_val=2", "model.tie_projections=true", "run.seed=6"],
    "skipping": ["run.seed=1"],
}
SPLITS = {
    "tied": [
        *(Split(1, zero=stage, acc=2) for stage in (1, 3)),
        *(Split(2, zero=stage, acc=2) for stage in range(4)),
        *(Split(2, zero=stage, checkpointing=True) for stage in (0, 3)),
        *(Split(2, zero=stage, offload="optimizer") for stage in (1, 2, 3)),
        Split(2, zero=3, offload="parameters"),
        Split(2, zero=1, compile=True),
        *(Split(4, zero=stage) for stage in (0, 3)),
        *(Split(pp=2, zero=stage, acc=2, checkpointing=stage == 1) for stage in (0, 1)),
        Split(pp=2, zero=1, acc=2, offload="optimizer"),
        *(Split(2, 2, zero=stage, acc=2) for stage in (0, 1)),
        Split(pp=4, zero=1, acc=2),
    ],
    "groups": [
        *(Split(2, zero=stage) for stage in (0, 2, 3)),
        *(Split(pp=2, zero=stage, acc=2, layers="2+0") for stage in (0, 1)),
    ],
    "adaptive": [Split(2, zero=3), *(Split(pp=2, zero=stage, acc=2) for stage in (0, 1))],
    "skipping": [*(Split(2, zero=stage) for stage in range(4)), *(Split(pp=2, zero=z, acc=2) for z in (0, 1))],
}
RUNS = [(model, split) for model, splits in SPLITS.items() for split in splits]
BF16 = [Split(2, zero=stage, precision="bf16") for stage in (1, 2, 3)]
BF16 += [Split(pp=2, zero=1, acc=2, precision="bf16")]
# Watched and not watched.
TWICE = [split for split in SPLITS["tied"] if split.processes == 2 and split.acc == 2 and split.offload == "none"]
ONE = Split()


def name(model, split):
    return f"{model}/{split}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run, small):
    """Watched runs of 6 steps; all of one size in one process group."""
    folder = tmp_path_factory.mktemp("watched")
    short = [f"train.max_steps={STEPS}", "train.eval_every=6", "checkpoint.every=2", "checkpoint.keep_last=20"]
    starts = [(split, name(model, split), MODELS[model]) for model in MODELS for split in (ONE, *SPLITS[model])]
    starts += [(split, name("tied", split), MODELS["tied"]) for split in BF16]
    starts += [(split, name("off", split), [*MODELS["tied"], "tracking.watch_every=null"]) for split in TWICE]
    for split in (ONE, *SPLITS["skipping"]):
        run_dir = folder / name("skipping", split)
        run_dir.mkdir(parents=True)
        (run_dir / "skipped_steps.json").write_text(json.dumps(SKIPPED))
    for processes in (1, 2, 4):
        jobs = [
            [*small, *short, *ODD, "tracking.watch_every=2", *split.overrides, *options, f"run.dir={folder / where}"]
            for split, where, options in starts
            if split.processes == processes and not (split.compile and not COMPILER)
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run(HERE / "many_runs.py", folder / "jobs.json", "--no-curves", processes=processes, fresh=True)
    return folder


@pytest.fixture
def watched(runs, metrics):
    """What a run has watched, by step: a number by key."""

    def watched(model, split):
        values = {}
        for line in metrics(runs / name(model, split)):
            of_step = {key: value for key, value in line.items() if key.startswith("watch/")}
            if of_step:
                assert of_step.pop("watch/seconds") > 0
                values[line["step"]] = of_step
        assert list(values) == [2, 4, 6]
        return values

    return watched


@pytest.mark.parametrize("model, split", RUNS, ids=[name(model, split) for model, split in RUNS])
def test_every_split_watches_the_same(watched, model, split):
    if split.compile and not COMPILER:
        pytest.skip("no C++ compiler here, for engine.compile")
    one, other = watched(model, ONE), watched(model, split)
    for step, expected in one.items():
        assert other[step] == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("model", MODELS)
def test_no_relu_is_at_its_edge(runs, model):
    """Else the runs that are compared need not be the same."""
    closest = float((runs / name(model, ONE) / "closest_to_the_edge").read_text())
    assert EDGE < closest < 1


@pytest.mark.parametrize("model, split", RUNS, ids=[name(model, split) for model, split in RUNS])
def test_the_parts_make_the_whole(runs, watched, metrics, model, split):
    """Every parameter counts once, tied or not: the norm of all is that of the gradient, and of the checkpoint."""
    norms = {
        line["step"]: line["train/grad_norm"] for line in metrics(runs / name(model, split)) if "train/loss" in line
    }
    for step, values in watched(model, split).items():
        of = {
            quantity: [values[key] for key in values if f"/{quantity}/" in key] for quantity in ("weights", "gradients")
        }
        assert math.hypot(*of["gradients"]) == pytest.approx(norms[step], rel=1e-5)
        weights = open_checkpoint(directory(runs / name(model, split), step)).tensors("weights").values()
        assert math.hypot(*of["weights"]) == pytest.approx(math.hypot(*(weight.norm() for weight in weights)), rel=1e-5)


@pytest.mark.parametrize("split", [ONE, *SPLITS["skipping"]], ids=str)
def test_a_step_that_is_skipped_has_a_gradient_and_no_update(watched, split):
    values = watched("skipping", split)[4]
    assert {value for key, value in values.items() if "/updates/" in key} == {0.0}
    assert all(value > 0 for key, value in values.items() if "/updates/" not in key)


@pytest.mark.parametrize("split", TWICE, ids=str)
def test_watching_changes_nothing(runs, metrics, split):
    """To the bit: what else is logged, and every checkpoint."""
    on, off = (runs / name(model, split) for model in ("tied", "off"))
    exact = ("train/loss", "train/step_loss", "train/grad_norm", "valid/loss", "test/loss")
    logged = [[{key: line[key] for key in exact if key in line} for line in metrics(path)] for path in (on, off)]
    assert logged[0] == logged[1] and len(logged[0]) == STEPS + 1
    for step in (2, 4, 6):
        one, other = (open_checkpoint(directory(path, step)) for path in (on, off))
        assert one.state == other.state
        for kind in ("weights", "optimizer", "memory"):
            tensors, others = one.tensors(kind), other.tensors(kind)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensors[key], others[key]) for key in tensors), (step, kind)


@pytest.mark.parametrize("split", BF16, ids=str)
def test_bf16_is_near_fp32(watched, split):
    """bf16 has 8 bits: numbers differ in the third digit, and do; the weights are kept in float32."""
    one, other = watched("tied", ONE), watched("tied", split)
    for step, expected in one.items():
        assert other[step] == pytest.approx(expected, rel=0.02), step
        assert other[step] != pytest.approx(expected, rel=1e-5)


FAULTY_SPLITS = {
    "one": ["engine.zero_stage=0"],
    **{f"zero-{stage}": [f"engine.zero_stage={stage}"] for stage in range(4)},
    **{f"pipeline-{stage}": [f"engine.zero_stage={stage}", "engine.pipeline_stages=2"] for stage in (0, 1)},
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, run, small):
    """Runs that skip step 2, where lane 0 is nan from the embedding on, and step 4, where the gradient alone is."""
    folder = tmp_path_factory.mktemp("faulty")
    short = ["train.max_steps=6", "train.eval_every=100", "tracking.watch_every=2", "guard.on_bad_step=skip"]
    for processes in (1, 2):
        names = [name for name in FAULTY_SPLITS if (name == "one") == (processes == 1)]
        jobs = [
            ([*small, *short, *FAULTY_SPLITS[name], f"run.dir={folder / name}"], {2: "loss", 4: "gradient"})
            for name in names
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run(HERE / "faulty_runs.py", folder / "jobs.json", processes=processes)
    return folder


@pytest.mark.parametrize("split", FAULTY_SPLITS)
def test_what_is_not_finite_is_null_in_the_log_and_training_goes_on(faulty, metrics, split):
    lines = {line["step"]: line for line in metrics(faulty / split) if "watch/seconds" in line}
    one = {line["step"]: line for line in metrics(faulty / "one") if "watch/seconds" in line}
    assert list(lines) == [2, 4, 6]
    for step, line in lines.items():
        for key in (key for key in line if key.startswith("watch/") and key != "watch/seconds"):
            _, quantity, _ = key.split("/")
            is_bad = step < 6 and quantity == "gradients" or step == 2 and quantity.startswith("activations")
            assert (line[key] is None) == is_bad, (step, key)
            assert is_bad or line[key] == pytest.approx(one[step][key], rel=1e-5)
            assert quantity != "updates" or (line[key] == 0) == (step < 6)
