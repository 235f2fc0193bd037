"""Overrides arrive as they were meant, and those that cannot be read are refused in plain words."""

import random
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from txl_dist.config.overrides import CONF, HYDRA_SETTINGS, CommandLine, spell_out, spell_path, spell_text
from txl_dist.config.quoting import command_to_paste
from txl_dist.errors import ConfigError, UserError

PIECES = [
    *"'\"\\[]{}$(),=:;#%@~+-*?!&|<>^`/ab1\n\t\r ",
    "\\\\",
    "${",
    "${x}",
    "null",
    "true",
    "1e3",
    "é",
    "книга",
    "😀",
    "\udce9",
]


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)


def value(name, key, typed):
    config = composed(name, spell_out(f"{key}={typed}"))
    for part in key.lstrip("+").split("."):
        config = config[part]
    return config


def strings(seed, count):
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 10))) for _ in range(count)]


def arrived(spelled):
    """Compose all values at once, each under a key of its own."""
    config = composed("generate", *(f"++t{i}={value}" for i, value in enumerate(spelled)))
    return [config[f"t{i}"] for i in range(len(spelled))]


def test_texts_arrive_to_the_letter_whatever_they_hold():
    texts = [text for text in strings(1, 2000) if spell_text(text, many=True) != text]  # the others are quoted already
    assert len(texts) > 1990
    assert arrived([spell_text(text, many=True) for text in texts]) == texts


def test_paths_arrive_to_the_letter_unless_they_are_grammar():
    paths = [path for path in strings(2, 500) if "${" not in path and spell_path(path, False, False) != path]
    assert len(paths) > 350
    assert arrived([spell_path(path, False, False) for path in paths]) == paths


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("'quoted'", "quoted"),
        ('"it\'s"', "it's"),
        (r"'it\'s'", "it's"),
        ('["one", "two"]', ["one", "two"]),
        ("[see note]", "[see note]"),
        ("[Verse 1] la [Chorus]", "[Verse 1] la [Chorus]"),
        ('["one", two]', '["one", two]'),
        ("ends with \\", "ends with \\"),
        ("a \\\\", "a \\\\"),
        (r"\${x}", r"\${x}"),
        ("null", "null"),
        ("???", "???"),
        ("one,two", "one,two"),
    ],
)
def test_a_prompt_is_a_list_only_of_quoted_texts(typed, meant):
    assert value("generate", "prompt", typed) == meant


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("'~/x'", "~/x"),
        ("[a,b]", ["a", "b"]),
        ("['a b', c]", ["a b", "c"]),
        ("[v=1, книга, it's]", ["v=1", "книга", "it's"]),
        ("${oc.env:PLACE}/a", "there/a"),
        ("[${oc.env:PLACE,x},b]", ["there", "b"]),
        ("книга/${oc.env:PLACE}", "книга/there"),
        ("'v=1/${oc.env:PLACE}'", "v=1/there"),
        ("a${b", "a${b"),
        (r"a\,b", "a,b"),
        ("a,b", "a,b"),
        ("1e3", "1e3"),
        ("2024", "2024"),
        ("lr=1,mem=2 (old) #3 @x 50%", "lr=1,mem=2 (old) #3 @x 50%"),
        ("runs/[ab]*", "runs/[ab]*"),
        ("null", None),
    ],
)
def test_a_path_is_taken_literally_and_hydras_grammar_still_works(monkeypatch, typed, meant):
    monkeypatch.setenv("PLACE", "there")
    assert value("evaluate", "run", typed) == meant


@pytest.mark.parametrize(
    "name, key",
    [("evaluate", "data_dir"), ("convert", "from"), ("convert", "to"), ("convert", "tokenizer_from")]
    + [("train", "run.dir"), ("train", "data.dir"), ("train", "tracking.name"), ("generate", "run")]
    + [("prepare", "corpus.path"), ("prepare", "corpus.train"), ("prepare", "tokenizer.model"), ("recl", "run")],
)
def test_all_keys_of_paths_are_read_alike(name, key):
    assert value(name, key, "v=1 книга's") == value(name, f"+{key}", "v=1 книга's") == "v=1 книга's"


def test_a_comma_separates_values_only_in_a_sweep():
    assert CommandLine(["run.dir=a,b"]).spelled == ["++run.dir='a,b'"]
    assert CommandLine(["run.dir=a,b", "-m"]).spelled == ["++run.dir=a,b"]
    assert CommandLine(["-m", "run.dir=é,b"]).spelled == ["++run.dir='é','b'"]
    sweep = OverridesParser.create().parse_override(CommandLine(["-m", "run.dir=v=1,'a,b'"]).spelled[0])
    assert list(map(str, sweep.sweep_string_iterator())) == ["'v=1'", "'a,b'"]


@pytest.mark.parametrize(
    "typed, flags",
    [
        (["a=1", "--multirun", "b=2"], ["--multirun"]),
        (["a=1", "--cfg", "job", "b=2", "--resolve"], ["--cfg", "job", "--resolve"]),
        (["a=1", "--config-dir=x", "b=2"], ["--config-dir=x"]),
        (["a=1", "b=2", "--config-dir", "c=3", "-cn", "name"], ["--config-dir", "c=3", "-cn", "name"]),
        (["--info", "defaults", "a=1", "b=2"], ["--info", "defaults"]),
        (["--info", "a=1", "b=2"], ["--info=all"]),
        (["a=1", "b=2", "-i"], ["-i"]),
        (["--local_rank=3", "a=1", "b=2", "-h"], ["-h"]),
    ],
)
def test_flags_may_stand_anywhere(typed, flags):
    assert CommandLine(typed).for_hydra() == ["++a=1", "++b=2", *HYDRA_SETTINGS, *flags]


def test_shell_completion_leaves_the_arguments_alone():
    assert CommandLine(["--shell-completion", "install=bash"]).for_hydra() == ["install=bash", "--shell-completion"]


@pytest.mark.parametrize("typed", [["--nope"], ["--cfg"], ["--cfg", "x"], ["a=1", "-x=5"]])
def test_flags_that_hydra_does_not_know_are_refused_without_a_usage(typed, capsys):
    with pytest.raises(UserError, match="--hydra-help lists all flags"):
        CommandLine(typed)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("typed", [["--resolve"], ["--cfg", "job", "--multirun"], ["-m", "--info"]])
def test_flags_that_do_not_go_together_are_refused(typed):
    with pytest.raises(UserError, match="--"):
        CommandLine(typed)


def test_all_overrides_that_cannot_be_read_are_reported_at_once():
    typed = ["model.n_layer=4=5", "my", "=3", "é=1", "model..x=1", "seed=f(1)", "optimizer=null", "a.b=" + "9" * 5000]
    with pytest.raises(ConfigError) as refused:
        CommandLine(typed).for_hydra()
    assert len(refused.value.problems) == len(typed)
    for override, problem in zip(typed, refused.value.problems, strict=True):
        assert problem.startswith(override[:200]) and "++" not in problem, problem
    assert refused.value.problems[0].endswith("\"model.n_layer='4=5'\"")
    assert "adam, adamw, lamb" in refused.value.problems[6]


@pytest.mark.parametrize(
    "typed, words",
    [
        ("optimizer=sgd", "optimizer=sgd: is not one of the choices: adam, adamw, lamb"),
        ("optimizer=", "optimizer=: is not one of the choices: adam, adamw, lamb"),
        ("+experiment=nope", "experiment=nope: is not one of the choices: ablation"),
        ("run.dir=${nope}", "run.dir=${nope}: Interpolation key 'nope' not found"),
        ("run.dir=${oc.env:NOT_SET}", "run.dir=${oc.env:NOT_SET}: Environment variable 'NOT_SET' not found"),
        ("run.dir=${run.dir}", "run.dir=${run.dir}: Recursive interpolation"),
        ("model.n_layer=1,2", "model.n_layer=1,2: is several values; "),
        ("optimizer=adam,lamb", "optimizer=adam,lamb: is several values; "),
        ("model.cutoffs.0=3", "model.cutoffs.0=3"),
        ("model.cutoffs.x=3", "model.cutoffs.x=3"),
        ("~nope", "~nope: "),
        ("model.n_layer=range(1,3)", "model.n_layer=range(1,3)"),
        ("experiment=ptb", "+experiment=ptb"),
    ],
)
def test_what_hydra_refuses_is_reported_in_plain_words_as_it_was_typed(typed, words):
    line = CommandLine([typed])
    with pytest.raises(ConfigError) as refused, line.errors_described():
        composed("train", *line.for_hydra()[:-5])
    (problem,) = refused.value.problems
    assert words in problem
    for raw in ("++", "object_type", "full_key", "hydra.cc", "Exception", "KeyError", "\n"):
        assert raw not in problem


def test_a_plus_before_a_key_that_exists_is_accepted():
    assert value("train", "+model.n_layer", "3") == 3


def test_what_is_printed_can_be_pasted():
    paths = ["r/plain", "my run", "it's", 'a "b"', "é книга", "v=1", "a,b", "[x]", "~x", "a\\", "null", "${x}", "$HOME"]
    paths += ["`ls`", "a!b", "(x)", " x ", "a\nb", "choice(a,b)", "'x'", "#", "a;b", "\\'", *strings(3, 200)]
    for path in filter(None, paths):
        program, module, override = shlex.split(command_to_paste("python -m", "module", run=path))[1:]
        assert (program, module) == ("-m", "module")
        parsed = OverridesParser.create().parse_override(spell_out(override)).value()
        config = OmegaConf.create({"run": parsed})
        assert OmegaConf.to_container(config, resolve=True)["run"] == path, path
