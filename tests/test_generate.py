"""Generation: greedy is the argmax of one long forward; lanes and seeds keep to themselves."""

import pytest
import torch

from txl_dist.config.schema import GenerateJob, LengthsConfig
from txl_dist.data.tokenizers import BytesTokenizer, WordTokenizer
from txl_dist.errors import UserError
from txl_dist.generate import Text, continuations, sample
from txl_dist.runs.load import load_model


@pytest.fixture(scope="module")
def trained(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("generate") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}", "train.max_steps=60")
    return run_dir


def job(run_dir, **changes):
    values = dict(
        prompt=None, max_tokens=30, temperature=0.0, top_k=0, top_p=1.0, seed=1, checkpoint=None, average=False
    )
    return GenerateJob(run=str(run_dir), model=LengthsConfig(None, 200, None, None), **(values | changes))


def tokens(run_dir, prompts, count=30, **changes):
    asked = job(run_dir, **changes)
    model, _ = load_model(asked.run, asked.checkpoint, asked.model)
    stream = continuations(model, prompts, asked)
    return [list(lane) for lane in zip(*(next(stream) for _ in range(count)), strict=True)]


def test_greedy_tokens_are_the_argmax_of_one_long_forward(trained):
    prompt = [256, *b"the and of the"]
    (generated,) = tokens(trained, [prompt])
    model, _ = load_model(str(trained), None, job(trained).model)
    whole = torch.tensor([[*prompt, *generated]])
    with torch.no_grad():
        log_probs, _ = model(whole, None, torch.arange(whole.size(1))[None], model.empty_memory(1))
    expected = log_probs[0, len(prompt) - 1 : -1]
    assert torch.equal(expected.argmax(-1), torch.tensor(generated))


def test_prompts_of_different_lengths_do_not_touch_each_other(trained):
    prompts = [[256], [256, *b"the and of the and of the and of the and"], [256, *b"and "]]
    together = tokens(trained, prompts, temperature=1.0)
    assert together == [tokens(trained, [prompt], temperature=1.0)[0] for prompt in prompts]


def test_the_seed_decides(trained):
    first, same, other = (tokens(trained, [[256]], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    "changes, allowed", [({"top_k": 2}, {0, 1}), ({"top_p": 0.45}, {0, 1}), ({"top_p": 0.3}, {0}), ({}, {0, 1, 2, 3})]
)
def test_sampling_keeps_to_the_likeliest(changes, allowed):
    log_probs = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    die = torch.Generator().manual_seed(0)
    asked = job("x", temperature=1.0, **changes)
    assert {sample(log_probs, asked, die) for _ in range(300)} == allowed


def test_temperature_sharpens():
    log_probs = torch.tensor([0.6, 0.4]).log()
    die = torch.Generator().manual_seed(0)
    draws = [sample(log_probs, job("x", temperature=0.25), die) for _ in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(0.4**4 / (0.4**4 + 0.6**4), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-40, 1e-9])
def test_a_temperature_next_to_zero_is_zero(temperature):
    log_probs = torch.tensor([-1e-3, -7.0, -float("inf")]).repeat(3)
    assert sample(log_probs, job("x", temperature=temperature), torch.Generator().manual_seed(0)) == 0


def test_a_prompt_is_bytes_to_the_tokenizer_of_bytes():
    tokenizer = BytesTokenizer()
    for prompt in (b"caf\xe9", "caf\udce9"):  # of standard input, and of an argument
        text = Text(tokenizer, prompt)
        assert text.prompt == [256, *b"caf\xe9"] and text.text == "caf"
        assert text.end() == "\ufffd"
    assert Text(tokenizer, "é\r\n").text == "é\r\n"


def test_a_prompt_of_words_is_utf8():
    tokenizer = WordTokenizer(["<eos>", "<unk>"])
    for prompt in (b"a caf\xe9", "a caf\udce9"):
        with pytest.raises(UserError, match=r"prompt: byte 6 \(0xE9\) is not UTF-8.*\(word\).*iconv"):
            Text(tokenizer, prompt)
    with pytest.raises(UserError, match="surrogate"):
        Text(tokenizer, "\ud800")


def test_the_command_reads_prompts_from_everywhere(run, trained):
    options = [f"run={trained}", "max_tokens=20", "temperature=0"]
    given = run("txl_dist.generate", *options, "prompt=the and").stdout
    assert given.startswith("the and") and len(given) > len("the and\n")
    assert run("txl_dist.generate", *options, stdin="the and").stdout == given
    several = run("txl_dist.generate", *options, 'prompt=["the and", "of"]').stdout
    assert given.strip() in several and "--- 2\nof" in several
