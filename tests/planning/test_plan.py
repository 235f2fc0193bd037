"""txl-plan as a user meets it."""

import json
from statistics import median

import pytest

from txl_dist.planning.measured import RATE

LARGE = ["+experiment=wt103_large", "nodes=4", "gpus=8", "device=H100"]
SMALL = ["model.n_layer=4", "model.d_model=32", "model.n_head=2", "model.d_inner=64", "model.tgt_len=16"]
SMALL += ["model.mem_len=16", "data.num_lanes=8", "vocab_size=300"]


def plan(run, *overrides, expect=0):
    return run("txl_dist.plan", *overrides, expect=expect)


def test_a_plan_is_one_screen(run):
    screen = plan(run, *LARGE, "engine.pipeline_stages=8", "engine.gradient_accumulation=8").stdout.splitlines()
    assert len(screen) <= 40 and max(map(len, screen)) <= 110
    text = "\n".join(screen)
    assert "285,205,322 parameters" in text and "in 8 stages of" in text and "47% of the pipeline's time" in text
    assert "limited by" in text and "assume.*: product_share=0.6" in text


def test_a_model_with_one_way_of_attention_is_planned_on_a_gpu_and_on_a_cpu(run):
    recipe = ["+experiment=reformer_enwik8", "model.tgt_len=1024", "gpus=8"]
    assert "attention by the model's own formula" in plan(run, *recipe, "device=H100").stdout
    planned = json.loads(plan(run, *recipe, "device=cpu", "format=json").stdout)
    assert planned["fits"] and planned["step"]["total"] > 0


def test_wrong_numbers_get_the_messages_of_training(run):
    refused = plan(run, *SMALL, "gpus=7", "engine.pipeline_stages=8", "device=A200", expect=2).stderr
    assert "engine.pipeline_stages=8: needs a multiple of 8 processes, not 7" in refused
    assert "engine.pipeline_stages=8: is more than the embedding, 4 layers" in refused
    assert "device=A200: is not in the table of devices" in refused
    assert "give assume.tflops, assume.memory" in refused
    refused = plan(run, *SMALL, "gpus=3", expect=2).stderr
    assert "data.num_lanes=8: cannot be split evenly over 3 processes" in refused
    refused = plan(run, *SMALL, "engine.zero_stage=0", expect=2).stderr
    assert "engine.zero_stage=0: with engine.precision=auto DeepSpeed's first step" in refused


def test_a_vocabulary_that_nobody_knows_is_asked_for(run):
    refused = plan(run, "data.dir=data/mine", expect=2).stderr
    assert "vocab_size: is missing, and there is no dataset in data.dir=data/mine" in refused
    refused = plan(run, "model.cutoffs=[20000]", "vocab_size=10000", expect=2).stderr
    assert "model.cutoffs=[20000]: must stay below the vocabulary of 10,000" in refused


def test_the_dataset_says_how_large_it_is(run, dataset):
    found = json.loads(plan(run, *SMALL[:-1], f"data.dir={dataset}", "format=json", "train.max_steps=10").stdout)
    assert found["tokens"] == 10 * 8 * 16 and 0 < found["epochs"] < 1


def test_given_figures_count(run):
    def planned(*overrides):
        return json.loads(plan(run, *SMALL, "format=json", *overrides).stdout)

    usual = planned("gpus=2")
    assert planned("gpus=2", "assume.tflops=1e-3")["step"]["products"] > 100 * usual["step"]["products"]
    assert not planned("gpus=2", "assume.memory=0.1")["fits"] and usual["fits"]
    assert planned("gpus=2", "assume.disk=0.5")["save"] == 2 * usual["save"]
    unknown = [f"assume.{key}=1" for key in ("tflops", "memory", "bandwidth", "link", "watts")]
    assert planned("device=abacus", *unknown)["step"]["total"] > usual["step"]["total"]


def test_a_search_prints_the_best_splits_and_the_command(run):
    found = json.loads(plan(run, *SMALL, "gpus=4", "search=true", "format=json", "+model.pre_lnorm=true").stdout)
    times = [one["step"]["total"] for one in found["plans"]]
    assert len(times) == 10 and times == sorted(times) and all(one["fits"] for one in found["plans"])
    engine = found["plans"][0]["engine"]
    assert found["command"].startswith("torchrun --nproc_per_node=4 -m txl_dist.train model.n_layer=4")
    assert f"engine.zero_stage={engine['zero_stage']}" in found["command"] and "vocab_size" not in found["command"]
    screen = plan(run, *LARGE, "search=true").stdout
    assert "sbatch --nodes=4 --gpus-per-node=8 slurm/train.sh +experiment=wt103_large engine." in screen
    refused = plan(run, *SMALL, "gpus=4", "search=true", "assume.memory=1e-3", expect=2).stderr
    assert "search=true: no split fits" in refused


@pytest.mark.slow
def test_a_thousand_gpus_are_planned_as_fast(run):
    found = json.loads(plan(run, "+experiment=xlnet_large", "nodes=128", "gpus=8", "search=true", "format=json").stdout)
    assert {one["ranks"] for one in found["plans"]} == {1024}


def test_a_measured_run_sets_the_pace(run, small, metrics, tmp_path):
    folder = tmp_path / "run"
    run("txl_dist.train", *small, f"run.dir={folder}")
    rate = median(line[RATE] for line in metrics(folder) if RATE in line)
    cpu = [*small, "device=cpu", "format=json"]
    same = json.loads(plan(run, *cpu, f"measured={folder}").stdout)
    assert same["tokens_per_second"] == pytest.approx(rate)
    deeper = json.loads(plan(run, *cpu, f"measured={folder}", "model.n_layer=8").stdout)
    assert deeper["tokens_per_second"] < rate
    assert "there is no such run" in plan(run, *cpu, "measured=/nowhere", expect=2).stderr
