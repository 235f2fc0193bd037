"""What a split does to a plan: stages, messages, time."""

import pytest

from tests.planning.test_trace import planner
from txl_dist.config.parse import failed_checks
from txl_dist.config.schema import PlanJob
from txl_dist.planning.planner import stage_ends, with_engine
from txl_dist.planning.search import PLAN_KEYS, candidates, command, is_one_of
from txl_dist.planning.time import hop_rate, ring_rate


def plan(*overrides, **engine):
    found = planner("data.num_lanes=16", "gpus=4", "device=H100", *overrides)
    return found.plan(with_engine(found.job, **engine))


def test_embedding_and_head_belong_to_the_first_stage_and_the_last():
    assert stage_ends([4]) == [(0, 6)]
    assert stage_ends([2, 1, 1]) == [(0, 3), (3, 4), (4, 6)]
    assert stage_ends([0, 4]) == [(0, 1), (1, 6)]


def test_stages_wait_for_each_other():
    planned = plan(pipeline_stages=4, gradient_accumulation=8)
    computed = planned.time.products + planned.time.memory + planned.time.launches
    assert planned.time.idle == pytest.approx(3 / 8 * computed)
    assert [stage.in_flight for stage in planned.stages] == [4, 3, 2, 1]
    assert plan(gradient_accumulation=4).time.idle == 0


def test_what_is_sent_depends_on_the_stage_of_zero():
    """Of N parameters in bf16, on 4 ranks: a ring sends 3/4 of a payload to gather, twice as much to reduce."""
    payload = 2 * plan().num_parameters
    gradients = {zero: plan(zero_stage=zero, gradient_accumulation=2).sent[0]["gradients"] for zero in (1, 2, 3)}
    assert gradients == {1: 1.5 * payload, 2: 3 * payload, 3: 1.5 * payload}
    weights = {zero: plan(zero_stage=zero, gradient_accumulation=2).sent[0]["weights"] for zero in (1, 2, 3)}
    assert weights == {1: 0.75 * payload, 2: 0.75 * payload, 3: 1.5 * payload}
    on_cpu = plan("device=cpu", zero_stage=0)
    assert on_cpu.sent[0]["gradients"] == 1.5 * 4 * on_cpu.num_parameters and on_cpu.sent[0]["weights"] == 0


def test_carries_cross_and_tied_weights_are_reduced():
    planned = plan(pipeline_stages=2, gradient_accumulation=4)
    first, last = planned.sent
    hidden = 2 * 2 * 16 * 32  # bytes of 2 rows of 16 positions
    assert first["carries"] == 4 * (hidden + 8 * 2 * 16) and last["carries"] == 0
    assert last["carry gradients"] == 4 * hidden and first["carry gradients"] == 0
    assert first["tied gradients"] == last["tied gradients"] == 2 * 300 * 32
    untied = plan("model.tie_weights=false", pipeline_stages=2, gradient_accumulation=4)
    assert untied.sent[0]["tied gradients"] == 0


def test_what_leaves_a_machine_takes_the_network():
    inside = plan("nodes=2", pipeline_stages=2)
    assert ring_rate(inside.job, inside.split, inside.rates) == inside.rates.link
    assert hop_rate(inside.job, inside.split, inside.rates) == inside.rates.network / 4
    across = plan("nodes=2")
    assert ring_rate(across.job, across.split, across.rates) == across.rates.network


def test_zero_and_offload_need_less_memory_on_the_device():
    optimizer = {zero: plan(zero_stage=zero).memory[0].optimizer for zero in (1, 3)}
    assert optimizer[1] == optimizer[3] == 12 * -(-plan().num_parameters // 4)
    offloaded = plan(zero_stage=3, offload="parameters").memory[0]
    assert offloaded.optimizer == 0 and offloaded.host > optimizer[3]
    averaged = plan("optimizer.average_from=1").memory[0].optimizer
    assert averaged == optimizer[1] * 4 // 3


def test_a_search_tries_what_training_accepts_and_nothing_else():
    job = planner("data.num_lanes=8", "gpus=4", "device=H100").job
    tried = list(candidates(job))
    assert not [problem for one in tried for problem in failed_checks(PlanJob, vars(one))]
    splits = {(one.engine.pipeline_stages, one.engine.gradient_accumulation) for one in tried}
    assert splits == {(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (4, 8)}
    assert {one.engine.zero_stage for one in tried} == {1, 2, 3}


def test_the_command_keeps_what_is_of_the_run():
    given = ["+experiment=ptb", "nodes=2", "gpus=4", "assume.disk=2.0", "engine.zero_stage=3", "run.dir='my run'"]
    words = command(plan("nodes=2"), given)
    assert words.startswith(
        "sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh +experiment=ptb \"run.dir='my run'\" engine."
    )
    assert words.count("zero_stage") == 1 and "assume" not in words
    assert not is_one_of("device_name=1", PLAN_KEYS) and is_one_of("+assume.disk=1", PLAN_KEYS)
