"""All problems of a config are reported at once, in plain words, each with its key."""

import copy
import os
from dataclasses import replace
from math import inf, nan
from typing import Annotated

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic.dataclasses import dataclass

from txl_dist.config.checks import objective_fits_the_rest, objective_fits_the_segment, objective_has_its_data
from txl_dist.config.identity import refused_changes
from txl_dist.config.overrides import CONF, spell_out
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import (
    CausalLMConfig,
    ConvertJob,
    DashboardJob,
    EvaluateJob,
    GenerateJob,
    InspectJob,
    LookJob,
    PermutationLMConfig,
    PredictJob,
    PrepareJob,
    ReclJob,
    ScoreJob,
    TrainJob,
)
from txl_dist.config.types import LANES, SCHEMA, Size, checked_path
from txl_dist.data.index import Index
from txl_dist.data.tokenizers import BytesTokenizer
from txl_dist.errors import ConfigError
from txl_dist.models.config import ModelConfig

JOBS = {"prepare": PrepareJob, "train": TrainJob, "evaluate": EvaluateJob, "generate": GenerateJob}


def compose_job(name, *overrides):
    """Compose and parse a config as a user's command line gives it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, [spell_out(override) for override in overrides])
    return parse_config(JOBS[name], OmegaConf.to_container(config, resolve=True))


def problems(name, *overrides):
    """List what is wrong with a config, as a user's command line gives it."""
    try:
        compose_job(name, *overrides)
    except ConfigError as error:
        return error.problems
    return []


def one(name, *overrides):
    (problem,) = problems(name, *overrides)
    return problem


@pytest.fixture
def processes(monkeypatch):
    """Set the variables of rank 0 of some processes, as torchrun does."""

    def be_one_of(size):
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return be_one_of


def test_a_valid_config_has_no_problems(small):
    assert problems("train", *small) == []
    assert problems("prepare") == []


def test_all_problems_are_reported_at_once(small):
    reported = problems(
        "train",
        *small,
        "model.d_model=wide",
        "+model.zzz=1",
        "nonsense=1",
        "engine.zero_stage=7",
        "optimizer.lr=-1",
        "data.num_lanes=2.5",
        "model.same_length=maybe",
        "train.stop_at=30",
        "data.dir=/nowhere",
    )
    keys = ["model.d_model", "model.zzz", "nonsense", "engine.zero_stage", "optimizer.lr", "data.num_lanes"]
    for key in [*keys, "model.same_length", "train.stop_at"]:
        assert any(problem.startswith(key) for problem in reported), (key, reported)
    assert len(reported) == 8, reported  # data.dir is checked once its section can be parsed


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\rb", "a\u2028b"])
def test_a_run_dir_that_cannot_be_printed_is_refused(name):
    job = OmegaConf.create({"run": {"dir": name, "seed": 1, "on_lane_change": "refuse"}})
    with pytest.raises(ConfigError) as refused:
        parse_config(TrainJob, OmegaConf.to_container(job))
    (problem,) = [problem for problem in refused.value.problems if problem.startswith("run.dir")]
    assert problem.startswith(f"run.dir={name!r}: holds a line break") and problem.isprintable()


def test_an_unknown_key_is_reported_with_the_most_similar_one():
    assert "model.tgt_len?" in one("train", "+model.tgt_length=1", "data.dir=${oc.env:DATASET}")


def test_a_key_of_another_choice_is_said_to_be_so(small):
    problem = one("train", *small, "objective.num_predict=3")
    assert problem == "objective.num_predict: is not a key of objective.name=causal_lm"


@pytest.fixture(autouse=True)
def dataset_in_environment(dataset, monkeypatch):
    monkeypatch.setenv("DATASET", str(dataset))


@pytest.mark.parametrize("lanes, size, accumulation, valid", [(7, 2, 1, "4, 6, 8, 10"), (8, 3, 2, "6, 12, 18")])
def test_lanes_that_cannot_be_split_list_those_that_can(small, processes, lanes, size, accumulation, valid):
    processes(size)
    problem = one("train", *small, f"data.num_lanes={lanes}", f"engine.gradient_accumulation={accumulation}")
    assert problem.startswith(f"data.num_lanes={lanes}") and valid in problem


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["engine.precision=fp16"], "engine.precision"),  # no GPU
        (["engine.precision=bf16", "engine.zero_stage=0"], "engine.zero_stage"),
        (["engine.offload=optimizer", "engine.zero_stage=0"], "engine.offload"),
        (["engine.offload=parameters", "engine.zero_stage=2"], "engine.offload"),
        (["engine.compile=true", "engine.zero_stage=3"], "engine.compile"),
        (["engine.compile=1"], "engine.compile"),
        (["optimizer=lamb"], "optimizer.name"),
        (["model.clamp_len=0"], "model.clamp_len"),
        (["model.same_length=true", "model.mem_len=0"], "model.same_length"),
        (["model.cutoffs=[200,100]"], "model.cutoffs"),
        (["model.cutoffs=[100,300]"], "model.cutoffs"),  # beyond the vocabulary
        (["model.div_val=2"], "model.div_val"),
        (["model.cutoffs=[50,100]", "model.div_val=8"], "model.div_val"),
        (["model.d_model=33"], "model.d_model"),
        (["train.stop_at=21"], "train.stop_at"),
        (["schedule.warmup_steps=21"], "schedule.warmup_steps"),
        (["schedule.min_lr=1.0"], "schedule.min_lr"),
        (["data.num_lanes=100000"], "data.num_lanes"),
        (["evaluation.clamp_len=0"], "evaluation.clamp_len"),
        (["evaluation.same_length=true", "evaluation.mem_len=0"], "evaluation.same_length"),
        (["engine.stage_layers=[1,1]"], "engine.stage_layers"),  # there is one stage
        (["data.order=random"], "data.order"),
        (["train.profile=5"], "train.profile"),
        (["train.profile=[0,5]"], "train.profile"),  # the first step is 1
        (["train.profile=[3,4,5]"], "train.profile"),
        (["engine.peak_tflops=0"], "engine.peak_tflops"),
        (["checkpoint.every=0"], "checkpoint.every"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last"),
        (["checkpoint.keep_every=15"], "checkpoint.keep_every=15: must be a multiple of checkpoint.every=10"),
        (["checkpoint.keep_best=true", "checkpoint.every=7"], "checkpoint.keep_best=true"),  # first both at step 70
    ],
)
def test_what_does_not_fit_together_is_refused(small, monkeypatch, overrides, key):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    reported = problems("train", *small, *overrides)
    assert reported and all(problem.startswith(key) for problem in reported), reported


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["train.profile=[15,21]", "train.eval_every=40", "checkpoint.every=40"],
            "ends after train.max_steps=20",
        ),
        (["train.profile=[3,9]", "train.stop_at=8"], "ends after train.stop_at=8"),
        (["train.profile=[5,4]"], "ends before it begins"),
        (["train.profile=[9,11]", "checkpoint.every=20"], "after step 10 training pauses (train.eval_every=10)"),
        (
            ["train.profile=[7,9]", "checkpoint.every=8"],
            "after step 8 training pauses (checkpoint.every=8)",
        ),
    ],
)
def test_a_profile_covers_training_alone(small, overrides, words):
    problem = one("train", *small, *overrides)
    assert problem.startswith("train.profile=[") and words in problem


def test_a_profile_may_touch_an_evaluation(small):
    assert problems("train", *small, "train.profile=[1,10]") == problems("train", *small, "train.profile=[11,20]") == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["engine.pipeline_stages=3"], "engine.pipeline_stages=3: needs a multiple"),
        (["engine.pipeline_stages=2", "engine.zero_stage=2"], "engine.zero_stage=2"),
        (["engine.pipeline_stages=4", "model.n_layer=1"], "engine.pipeline_stages=4"),
        (["engine.pipeline_stages=2", "engine.stage_layers=[1,2]"], "engine.stage_layers=[1, 2]: must add up"),
        (["engine.pipeline_stages=2", "engine.stage_layers=[2]"], "engine.stage_layers=[2]: must have one"),
        (["engine.pipeline_stages=4", "engine.stage_layers=[1,0,0,1]"], "engine.stage_layers=[1, 0, 0, 1]: only"),
        (["engine.pipeline_stages=2", "engine.gradient_accumulation=3"], "data.num_lanes=8"),
    ],
)
def test_stages_that_cannot_be_cut_are_refused(small, processes, overrides, words):
    processes(4)
    assert one("train", *small, *overrides).startswith(words)


def test_lanes_are_split_among_pipelines_not_processes(small, processes):
    processes(4)
    assert problems("train", *small, "engine.pipeline_stages=4", "engine.gradient_accumulation=8") == []


@pytest.mark.parametrize(
    "before, now, refused",
    [("adam", "adamw", False), ("adamw", "adam", False), ("adam", "lamb", True), ("lamb", "adamw", True)],
)
def test_another_optimizer_continues_where_its_states_are_of_the_same_kind(small, before, now, refused):
    job = compose_job("train", *small)
    started = {"run": {"seed": 1}, "data": {}, "model": {}, "optimizer": {"name": before, "average_from": None}}
    started["train"] = {}
    given = job.run, job.data, job.model, replace(job.optimizer, name=now), job.objective, job.train
    problems = list(refused_changes(started, *given))
    assert [f"give optimizer={before}, or another run.dir" in problem for problem in problems] == [True] * refused


PERMUTATION = {"num_predict": 10, "perm_size": 8, "spans": "words", "pairs": True, "directions": "both"}


@dataclass(config=SCHEMA, frozen=True, kw_only=True)
class ReusingConfig(ModelConfig):
    """A model that reads tokens ahead, and again in the next step."""

    name: str = "reusing"
    n_layer: Size = 1
    tgt_len: Annotated[Size, LANES] = 48
    reuse_len: Annotated[Size, LANES] = 24


def permutation(**options):
    return PermutationLMConfig(name="permutation_lm", **PERMUTATION | options)


def segment_problem(objective, model=None, **evaluation):
    (problem,) = objective_fits_the_segment(objective, model or ReusingConfig(), evaluation)
    return problem


@pytest.mark.parametrize(
    "overrides, options, words",
    [
        (["data.order=documents"], {}, "data.order=documents: objective=permutation_lm reads the text as it stands"),
        (["data.reset_memory=document"], {}, "data.reset_memory=document: objective=permutation_lm reads across"),
        (["data.on_error=skip_sample"], {}, "data.on_error=skip_sample: objective=permutation_lm cannot leave"),
        (["data.num_lanes=7"], {}, "data.num_lanes=7: with objective.directions=both half of the lanes"),
        (["data.num_lanes=7"], {"directions": "forward"}, None),
        (["train.loss=second_half"], {}, "train.loss=second_half: is for objective=causal_lm"),
        ([], {}, None),
    ],
)
def test_what_permutation_does_not_go_with_is_refused(small, overrides, options, words):
    job = compose_job("train", *small, *overrides)
    reported = list(objective_fits_the_rest(permutation(**options), ReusingConfig(), job.data, job.train))
    assert [problem.startswith(words) for problem in reported] == [True] * (words is not None)
    assert not list(objective_fits_the_rest(job.objective, ReusingConfig(), job.data, job.train))


def test_permutation_needs_a_model_that_reads_ahead(small):
    problem = one("train", *small, "objective=permutation_lm", "objective.pairs=false")
    assert problem.startswith("model.name=transformer_xl: objective=permutation_lm needs a model with reuse_len")
    assert "model=xlnet" in problem


@pytest.mark.parametrize(
    "options, model, words",
    [
        ({"num_predict": 41}, {}, "give 40 or less"),  # of 24 reused and 21 new ones, which get half each
        ({"num_predict": 46, "pairs": False}, {}, None),
        ({"num_predict": 47, "pairs": False}, {}, "give 46 or less"),
        ({"num_predict": 10**9}, {}, "objective.num_predict=1000000000: with model.tgt_len=48"),
        ({"perm_size": 12}, {}, None),
        ({"perm_size": 9}, {}, "objective.perm_size=9: has to divide the parts of a segment, 24 reused and 24 new"),
        ({"perm_size": 16}, {"reuse_len": 16}, None),
        ({"perm_size": 24}, {"reuse_len": 16}, "give 16 or a divisor of it"),
        ({"perm_size": 1}, {"reuse_len": 43}, None),
        ({"perm_size": 1}, {"reuse_len": 44}, "model.tgt_len=48: has to hold model.reuse_len=44 tokens"),
        ({"perm_size": 1}, {"reuse_len": 44}, "<sep> twice and <cls>; give 49 or more"),
        ({"perm_size": 1, "pairs": False}, {"reuse_len": 44}, None),
    ],
)
def test_the_numbers_of_permutation_fit_the_segment(options, model, words):
    reported = list(objective_fits_the_segment(permutation(**options), ReusingConfig(**model), {}))
    assert [words in problem for problem in reported] == [True] * (words is not None), reported


def test_as_many_as_are_advised_can_be_predicted():
    """And each part keeps a token that is not predicted."""
    for reuse_len in range(1, 44):
        for pairs in (True, False):
            model = ReusingConfig(reuse_len=reuse_len)
            objective = permutation(num_predict=48, perm_size=1, pairs=pairs)
            problem = segment_problem(objective, model)
            most = int(problem.rpartition("give ")[2].split()[0])
            assert not list(objective_fits_the_segment(replace(objective, num_predict=most), model, {}))
            assert list(objective_fits_the_segment(replace(objective, num_predict=most + 1), model, {}))


def test_evaluation_of_other_lengths_fits_the_permutation_too():
    assert not list(objective_fits_the_segment(permutation(), ReusingConfig(), {"tgt_len": 64, "reuse_len": 32}))
    problem = segment_problem(permutation(), tgt_len=50)
    assert problem.startswith("objective.perm_size=8")
    assert "evaluation.tgt_len=50 and evaluation.reuse_len=24" in problem


def test_pairs_need_special_pieces_and_sentences(small, dataset, monkeypatch):
    job = compose_job("train", *small)

    def reported(**options):
        return list(objective_has_its_data(permutation(**options), options.pop("model", ReusingConfig()), job.data))

    no_pieces, no_sentences = reported()
    assert no_pieces.startswith(f"objective.pairs=true: the tokenizer of {dataset} has no <sep> and no <cls>; prepare")
    assert no_sentences.startswith(f"objective.pairs=true: {dataset} does not know where the sentences of ")
    assert reported(pairs=False) == []
    monkeypatch.setattr(BytesTokenizer, "specials", {"<sep>": 1}, raising=False)
    assert "has no <cls>; prepare" in reported()[0]
    monkeypatch.setattr(BytesTokenizer, "specials", {"<sep>": 1, "<cls>": 2}, raising=False)
    (problem,) = reported()
    assert problem == no_sentences

    def with_sentences(location, opened=Index.open):
        index = opened(location)
        for split in index.splits.values():
            object.__setattr__(split, "sentence_starts", np.zeros(1, np.uint64))
        return index

    monkeypatch.setattr(Index, "open", with_sentences)
    assert reported() == []


def test_a_split_holds_a_whole_segment(small):
    job = compose_job("train", *small)
    model = ReusingConfig(tgt_len=10**6)
    reported = list(objective_has_its_data(permutation(pairs=False), model, job.data))
    assert len(reported) == 3 and all(problem.startswith("model.tgt_len=1000000: a segment is") for problem in reported)
    assert not list(objective_has_its_data(job.objective, model, job.data))


def test_the_objective_of_a_run_never_changes(small):
    """Runs of versions without objectives are those of causal_lm."""
    job = compose_job("train", *small)
    started = {"run": {"seed": 1}, "data": {}, "model": {}, "optimizer": {"name": "adam", "average_from": None}}
    started["train"] = {}

    def refused(started, objective):
        return list(refused_changes(started, job.run, job.data, job.model, job.optimizer, objective, job.train))

    causal = CausalLMConfig(name="causal_lm")
    trained = started | {"objective": {"name": "permutation_lm", **PERMUTATION}}
    assert refused(started, causal) == refused(trained, permutation()) == []
    (problem,) = refused(started, permutation())
    assert problem.startswith("objective.name=permutation_lm: the run in runs/default was started with causal_lm; give")
    (problem,) = refused(trained, causal)
    assert problem.startswith("objective.name=causal_lm: the run in runs/default was started with permutation_lm")
    for key, value in {"num_predict": 9, "perm_size": 4, "spans": "tokens", "pairs": False}.items():
        (problem,) = refused(trained, permutation(**{key: value}))
        assert problem.startswith(f"objective.{key}={value}: the run in runs/default was started with")


def test_a_model_has_its_own_attention_backends(small):
    for backend in ("reference", "auto"):
        assert not problems("train", *small, "model.attention=shaw", f"engine.attention={backend}")
    xlnet = ["model=xlnet", *(override for override in small if "n_layer" in override or "data." in override)]
    assert "engine.attention=sdpa: model.name=xlnet has only auto, reference" in problems(
        "train", *xlnet, "engine.attention=sdpa"
    )


def test_missing_data_are_reported_with_the_command_that_makes_them(small):
    assert "txl_dist.prepare" in one("train", *small, "data.dir=nowhere")


def test_the_best_can_be_kept_where_evaluations_and_checkpoints_meet(small):
    for every in (5, 10, 20):
        assert not problems("train", *small, "checkpoint.keep_best=true", f"checkpoint.every={every}")


def test_a_checkpoint_is_a_step_or_the_best_or_the_latest():
    for wrong in ("worst", "-1", "1.5", "true"):
        assert (
            f"checkpoint={wrong}: should be a step, best"
            in "\n".join(problems("evaluate", f"checkpoint={wrong}")).lower()
        )


SCHEMAS = JOBS | {"score": ScoreJob, "predict": PredictJob, "look": LookJob, "inspect": InspectJob, "recl": ReclJob}
SCHEMAS |= {"dashboard": DashboardJob, "convert": ConvertJob}
# A number can be a name; and whether a step exists is checked with the run.
TRACKING = [f"tracking.{key}" for key in ("project", "name", "entity", "group", "job_type", "tags", "notes", "prompts")]
NAMES = ("prompt", "text", *TRACKING, "tokenizer.model", "checkpoint")


def changes(name, values):
    """Yield (key, value, problems) for each key of an entry point's default config and each of some values."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            name, [f"data.dir={os.environ['DATASET']}"] if name == "train" else ["+run=x"] * (name != "prepare")
        )
    plain = OmegaConf.to_container(config, resolve=True)
    keys = [(key, None) for key, value in plain.items() if not isinstance(value, dict)]
    keys += [(section, key) for section, value in plain.items() if isinstance(value, dict) for key in value]
    for section, key in keys:
        for value in values:
            changed = copy.deepcopy(plain)
            if key is None:
                changed[section] = value
            else:
                changed[section][key] = value
            try:
                parse_config(SCHEMAS[name], changed)
                reported = []
            except ConfigError as error:
                reported = error.problems
            yield ".".join(filter(None, (section, key))), value, reported


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_number_is_limited(name):
    """Values that are not finite or far too large are refused with their key, without a stack trace."""
    paths = [key for key, _, reported in changes(name, [""]) if any("is empty" in problem for problem in reported)]
    for key, value, reported in changes(name, [inf, -inf, nan, 10**40, -(10**40)]):
        is_refused = any(problem.startswith(f"{key}=") for problem in reported)
        assert is_refused or key in (*NAMES, *paths), (key, value)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("train", {"run.dir", "data.dir"}),
        ("prepare", {"data.dir"}),
        ("evaluate", {"run", "data_dir"}),
        ("recl", {"run", "data_dir"}),
        ("dashboard", {"run", "to"}),
        ("generate", {"run"}),
        ("convert", {"run", "from", "to", "tokenizer_from"}),
    ],
)
def test_an_empty_path_is_refused_with_its_key(name, keys):
    reported = {key: refused for key, _, refused in changes(name, [""])}
    for key in keys:
        assert f"{key}=: is empty; give a path" in reported[key]


def test_a_list_of_paths_or_prompts_is_not_empty():
    for name, key in (("evaluate", "run"), ("recl", "run"), ("dashboard", "run"), ("generate", "prompt")):
        reported = {changed: refused for changed, _, refused in changes(name, [[]])}
        assert f"{key}=[]: should have 1 or more items" in reported[key]


def test_a_home_directory_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked_path("~/x") == f"{tmp_path}/x" and checked_path("~") == str(tmp_path)
    assert checked_path("~nobody-of-this-name/x") == f"{os.getcwd()}/~nobody-of-this-name/x"
    assert f"run={tmp_path}/x" in one("evaluate", "run=~/x") and f"run={tmp_path}/x" in one("generate", "run='~/x'")


def test_a_section_is_not_a_value():
    assert "run.dir, run.init_from, run.on_lane_change, run.seed" in one("train", "run=x", "data.dir=${oc.env:DATASET}")
    assert one("prepare", "corpus.name=nope").startswith("corpus.name=nope: should be 'stdlib'")


def test_a_missing_run_is_refused(tmp_path):
    assert one("evaluate", "run=nowhere").startswith("run=nowhere")
    assert one("generate").startswith("run")
    assert "no checkpoint" in one("generate", f"run={tmp_path}")


PROMPTS = ["def main(", "it's", "a=b, c: {d} [e]", "back\\slash", "new\nline", "${x}", "", '"""', "[1, 2", "'tis"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_text_whatever_it_holds(prompt):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("generate", [spell_out(f"prompt={prompt}")])
    assert OmegaConf.to_container(config, resolve=True)["prompt"] == prompt
