"""What README.md and the pages of docs/ show holds: commands parse and compose, make targets and links exist.

Commands are those of fenced blocks marked `sh`, and those of code spans that begin like one. A word in capitals, such
as RUN_DIR, is a placeholder: it stands where a text may stand, so it composes like any other text. Nothing is trained.
"""

import re
import runpy
import subprocess
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch.distributed.run import get_args_parser

from txl_dist.config.initial_model import INIT_FROM
from txl_dist.config.overrides import CONF, CommandLine
from txl_dist.models import registry
from txl_dist.models.config import ModelConfig

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("benchmarks/*.md")])
METRICS_PAGE = runpy.run_path(str(REPO / "docs" / "generate_metrics.py"))
REFERENCE = runpy.run_path(str(REPO / "docs" / "generate_configuration.py"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\s*(python |torchrun |deepspeed |srun |sbatch |make |txl-)")
OTHERS = {"git", "pip", "pre-commit"}  # programs whose arguments are not checked

# Bash expands a block as a user's shell would: loops, variables, quotes. Commands are not found, and printed instead.
RECORD = r"""
set -eu
PATH=/nowhere
cd() { :; }
command_not_found_handle() { printf '%s\0' "$@" $'\1'; }
"""


def blocks(language):
    for page in PAGES:
        text = page.read_text()
        for block in FENCE.finditer(text):
            if block[1] == language:
                line = text.count("\n", 0, block.start()) + 1
                yield pytest.param(block[2], id=f"{page.relative_to(REPO)}:{line}")


def commands_in(script, folder):
    """Return the commands that a script would run in a checkout, each as the list of its words."""
    program = folder / "txl_dist" / "cli.py"
    program.parent.mkdir(exist_ok=True)
    program.touch()
    script = RECORD + script.replace(".venv/bin/", "")
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, env={})
    assert not done.returncode and not done.stderr, done.stderr
    return [command.split("\0")[:-1] for command in done.stdout.split("\1\0")[:-1]]


def check(words):
    """Refuse a command that would not start."""
    program, *arguments = words
    if program.startswith("txl-"):
        check_job(program.removeprefix("txl-"), arguments)
    elif program == "make":
        assert set(arguments) <= set(re.findall(r"^([\w./]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    elif program == "python":
        check_python(arguments)
    elif program == "torchrun":
        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module
        check_python(["-m", parsed.training_script, *parsed.training_script_args])
    elif program == "deepspeed":
        assert arguments[0] == "--module"
        check_python(["-m", *arguments[1:]])
    elif program == "srun":
        check_python(arguments[arguments.index("python") + 1 :])
    elif program == "sbatch":
        script, *overrides = [word for word in arguments if not word.startswith("-")]
        assert (REPO / script).is_file()
        check_job(Path(script).stem, overrides)
    else:
        assert program in OTHERS, f"{program}: is not a command that this test knows"


def check_python(arguments):
    if arguments[0] != "-m":
        assert (REPO / arguments[0]).is_file(), arguments[0]
    elif arguments[1].startswith("txl_dist."):
        check_job(arguments[1].removeprefix("txl_dist."), arguments[2:])
    else:
        assert find_spec(arguments[1]), arguments[1]
        assert all((REPO / word).exists() for word in arguments[2:] if "/" in word)


def check_job(name, arguments):
    """Compose a command's config and read it by the schema. Without arguments it is only named."""
    line = CommandLine(arguments)
    line.for_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, line.spelled)
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=bool(arguments))
    values = {f"{key}_" if key == "from" else key: value for key, value in values.items()}
    if values.get("model", {}).get("name") == INIT_FROM:  # whose model a page does not know
        models = [OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(CONF.glob("model/*.yaml"))]
        given = values["model"].keys() - {"name"}
        values["model"] = next(model for model in models if given <= model.keys() and "n_layer" in model)
    TypeAdapter(REFERENCE["COMMANDS"][name]).validate_python(values)


def slugs(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("script", blocks("sh"))
def test_commands_of_a_block_start(script, tmp_path, other_package, monkeypatch):
    monkeypatch.syspath_prepend(other_package)
    commands = commands_in(script, tmp_path)
    assert commands
    for words in commands:
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_commands_within_the_text_start(page, tmp_path):
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))
    for span in filter(COMMAND.match, spans):
        for words in commands_in(span, tmp_path):
            check(words)


@pytest.mark.parametrize("block", blocks(""))
def test_commands_stand_in_marked_blocks(block):
    assert not [line for line in block.splitlines() if COMMAND.match(line)], "mark the block with sh"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles(code):
    compile(code, "a page", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_the_reference_of_the_configuration_is_current():
    assert REFERENCE["PAGE"].read_text() == REFERENCE["generate"](), "run python docs/generate_configuration.py"


def test_the_page_of_metrics_is_current():
    assert METRICS_PAGE["PAGE"].read_text() == METRICS_PAGE["generate"](), "run python docs/generate_metrics.py"


def named_in(command):
    """Return the commands in whose chapters the keys of one are explained."""
    return [command, "train"] if command == "plan" else [command]


def test_the_reference_names_every_key_of_the_schema():
    page = REFERENCE["PAGE"].read_text()
    for name, job in REFERENCE["COMMANDS"].items():
        chapters = [page.partition(f"\n## {command}\n")[2].partition("\n## ")[0] for command in named_in(name)]
        missing = [key for key in keys_of(job) if f"| `{key}` |" not in "".join(chapters)]
        assert not missing


def keys_of(kind, prefix=""):
    """Yield the dotted keys of a config class, those of all choices of a group included."""
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        key = prefix + field.name.removesuffix("_")
        classes = [choice for choice in (hint, *get_args(hint)) if is_dataclass(choice)]
        if hint is ModelConfig:
            classes = [registry.find(name).Config for name in registry.names()]
        for config_class in classes:
            yield from keys_of(config_class, f"{key}.")
        if not classes and not (field.name == "name" and get_origin(hint) is Literal):  # the choice of a group
            yield key


def test_the_layout_names_every_module_and_no_other():
    text = (REPO / "docs" / "architecture.md").read_text()
    layout = re.search(r"^```\n(txl_dist/\n.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    modules = [path for path in (REPO / "txl_dist").rglob("*.py") if path.parent.name != "hub"]
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in modules}
    assert names <= set(re.findall(r"\w+", layout))
    files = {path.name for folder in ("txl_dist", "docs") for path in (REPO / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", layout)) <= files
