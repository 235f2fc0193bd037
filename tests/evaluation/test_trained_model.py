"""A trained model in Python: steps, scores and continuations, of a run and of other people's folders."""

import re
from pathlib import Path

import pytest
import torch

import txl_dist
from tests.conversion.third_party import convert_job, hugging_face_model, save_folder
from txl_dist.convert import convert
from txl_dist.errors import ConfigError, UserError

torch.set_num_threads(1)

PAGE = Path(__file__).parents[2] / "docs/python.md"
TEXT = "the and of the\nabcd"


@pytest.fixture(scope="module")
def run_dir(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}")
    return run_dir


@pytest.fixture(scope="module")
def trained(run_dir):
    return txl_dist.load(run_dir)


def test_steps_of_any_length_give_the_same(trained):
    """Within the memory of 24 tokens; two lanes side by side are each alone."""
    tokens = torch.cat([trained.encode(TEXT), trained.encode(TEXT[::-1])])
    expected, _ = trained.step(tokens)
    assert expected.shape == (2, 20, 257) and torch.allclose(expected.exp().sum(-1), torch.tensor(1.0))
    for lengths in ([1] * 20, [7, 1, 12], [19, 1]):
        parts, memory = [], None
        for part in tokens.split(lengths, dim=1):
            log_probs, memory = trained.step(part, memory)
            parts.append(log_probs)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained.step(tokens[1:])[0], expected[1:], rtol=1e-5, atol=1e-5)


def test_a_memory_is_read_on_from_once(trained):
    _, memory = trained.step(trained.encode("the"))
    copied = memory.copy()
    one, _ = trained.step(torch.tensor([[65]]), memory)
    with pytest.raises(RuntimeError, match=r"read on from already; .* copy\(\)"):
        trained.step(torch.tensor([[65]]), memory)
    trained.step(torch.tensor([[66]]), copied.copy())
    two, _ = trained.step(torch.tensor([[65]]), copied)
    assert torch.equal(one, two)


def test_scores_are_those_of_the_steps_and_of_the_command(trained, run_dir, run):
    log_probs, _ = trained.step(trained.encode(TEXT))
    expected = [log_probs[0, i, token].item() for i, token in enumerate(TEXT.encode())]
    assert [token.log_prob for token in trained.score(TEXT)] == pytest.approx(expected, rel=1e-5)


def test_continuations_are_those_of_the_command(trained, run_dir, run):
    options = {"max_tokens": 20, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "seed": 4}
    arguments = [f"{key}={value}" for key, value in options.items()]
    printed = run("txl_dist.generate", f"run={run_dir}", "prompt=the", *arguments).stdout
    one, two = trained.generate(["the", b"of"], **options)
    assert one + "\n" == printed and two.startswith("of") and [two] == trained.generate(["of"], **options)
    with pytest.raises(TypeError, match="give a list"):
        trained.generate("the")


def test_a_checkpoint_and_lengths_can_be_chosen(trained, run_dir):
    early = txl_dist.load(run_dir, checkpoint=10, mem_len=3, tgt_len=5)
    assert (early.config.mem_len, early.config.tgt_len, trained.config.mem_len) == (3, 5, 24)
    assert not torch.allclose(early.step(early.encode("a"))[0], trained.step(trained.encode("a"))[0])


def test_hugging_faces_folder_gives_their_numbers(tmp_path):
    """From where their first memory, of zeros, has no influence any more."""
    theirs = hugging_face_model(clamp_len=5)
    folder = save_folder(theirs, tmp_path / "hf")
    ours = txl_dist.load(folder, tgt_len=5)
    size = ours.tokenizer.vocab_size
    tokens = torch.randint(size, (2, 60), generator=torch.Generator().manual_seed(0))
    memory = mems = None
    for part in tokens.split(5, dim=1):
        log_probs, memory = ours.step(part, memory)
        with torch.no_grad():
            output = theirs(part, mems=mems)
        mems = output.mems
    torch.testing.assert_close(log_probs, output.prediction_scores.view_as(log_probs), rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob("*.partial")) and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_exported_folder_gives_the_runs_numbers(trained, run_dir, tmp_path):
    convert(convert_job(run=run_dir, to=tmp_path / "export"))
    exported = txl_dist.load(tmp_path / "export")
    torch.testing.assert_close(exported.step(exported.encode(TEXT))[0], trained.step(trained.encode(TEXT))[0])
    assert exported.config == trained.config


def test_what_cannot_be_loaded_is_said(run_dir, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        txl_dist.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="average=true: .* has kept none"):
        txl_dist.load(run_dir, average=True)
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    with pytest.raises(UserError, match="is not a run directory; checkpoint and average"):
        txl_dist.load(folder, checkpoint=3)


def test_the_page_runs(run_dir, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    scope = {}
    for block in blocks:
        exec(block.replace("runs/quickstart", str(run_dir)), scope)
    assert len(blocks) == 3 and capsys.readouterr().out
