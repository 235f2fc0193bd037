"""Generation: greedy tokens are the argmax of one long forward; a lane depends on its prompt and seed alone."""

import itertools

import pytest
import torch

from tests.batches import batch
from txl_dist.data.tokenizers import BytesTokenizer, WordTokenizer
from txl_dist.errors import UserError
from txl_dist.evaluation import sampling
from txl_dist.evaluation.sampling import Completion, Sampler, continuations
from txl_dist.runs.load import load_model


@pytest.fixture(scope="module")
def trained_run(run, small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("generate") / "run"
    run("txl_dist.train", *small, f"run.dir={run_dir}", "train.max_steps=60")
    return run_dir


LENGTHS = {"mem_len": 200}


def sampled(run_dir, prompts, count=30, temperature=0.0, seed=1):
    model, _ = load_model(str(run_dir), None, LENGTHS)
    stream = continuations(model, prompts, Sampler(temperature), seed)
    return [list(lane) for lane in zip(*(next(stream) for _ in range(count)), strict=True)]


def test_greedy_tokens_are_the_argmax_of_one_long_forward(trained_run):
    prompt = [256, *b"the and of the"]
    (generated,) = sampled(trained_run, [prompt])
    model, _ = load_model(str(trained_run), None, LENGTHS)
    text = torch.tensor([[*prompt, *generated]])
    with torch.no_grad():
        log_probs, _ = model(batch(text, None, torch.arange(text.size(1))[None]), model.empty_memory(1))
    expected = log_probs[0, len(prompt) - 1 : -1]
    assert torch.equal(expected.argmax(-1), torch.tensor(generated))


def test_prompts_of_different_lengths_do_not_touch_each_other(trained_run):
    long = [[256, *b"the and of the and of the and of the and"], [256, *b"and the of and the of and the of and the"]]
    prompts = [[256], *long, [256, *b"and "]]
    together = sampled(trained_run, prompts, temperature=1.0)
    assert together == [sampled(trained_run, [prompt], temperature=1.0)[0] for prompt in prompts]


def test_the_seed_decides(trained_run):
    first, same, other = (sampled(trained_run, [[256]], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2))
    assert first == same != other


def drawn(log_probs, count, **options):
    """Draws of one lane."""
    generator = torch.Generator().manual_seed(0)
    return [Sampler(**options).draw(log_probs[None], [generator]).item() for _ in range(count)]


@pytest.mark.parametrize(
    "options, allowed", [({"top_k": 2}, {0, 1}), ({"top_p": 0.45}, {0, 1}), ({"top_p": 0.3}, {0}), ({}, {0, 1, 2, 3})]
)
def test_top_k_and_top_p_keep_the_likeliest(options, allowed):
    log_probs = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(drawn(log_probs, 300, **options)) == allowed


def sorted_way(log_probs, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is drawn from, by sorting the whole vocabulary."""
    probabilities = (log_probs.double() / temperature).softmax(-1)
    ordered = probabilities.sort(descending=True).values
    kept = ordered.cumsum(-1) - ordered < top_p
    kept[:, top_k or len(ordered[0]) :] = False
    least_likely = ordered.gather(1, kept.sum(-1, keepdim=True) - 1)
    belonging = probabilities * (probabilities >= least_likely)
    return belonging / belonging.sum(-1, keepdim=True)


COMBINATIONS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature, top_k, top_p in itertools.product((1.0, 0.5), (0, 9), (1.0, 0.8, 0.3, 1e-9))
]


@pytest.fixture(params=[(512, 1000), (16, 0)], ids=["as it is", "in blocks and draws again"])
def few(request, monkeypatch):
    """Blocks so large that one holds all, and all of top_k sorted; then small blocks, and nothing sorted."""
    for name, value in zip(("BLOCK", "FEW"), request.param, strict=True):
        monkeypatch.setattr(sampling, name, value)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.usefixtures("few")
def test_draws_follow_the_distribution_of_the_sorted_way(options):
    """Lanes side by side: any; one that cannot have most of the tokens; ties; nearly flat; flat."""
    lanes = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 2
    lanes[1, 5:] = -torch.inf
    lanes[2] = lanes[2].round()
    lanes[3] *= 1e-3
    lanes[4] = 0
    log_probs = lanes.log_softmax(-1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000 * 5)]
    draws = Sampler(**options).draw(log_probs.repeat(2000, 1), generators).view(2000, 5)
    for lane, probabilities in zip(draws.T, sorted_way(log_probs, **options), strict=True):
        shares = lane.bincount(minlength=40) / len(draws)
        torch.testing.assert_close(shares.double(), probabilities, rtol=0, atol=0.045)  # four standard deviations
        assert not shares[probabilities == 0].any()


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5000}, {"top_k": 5000, "top_p": 0.4}], ids=str)
def test_the_tokens_of_a_large_vocabulary_are_those_of_the_sorted_way(options):
    """Nothing else is drawn, and from each twentieth of what belongs as much as from the next one."""
    log_probs = (torch.randn(1, 30_011, generator=torch.Generator().manual_seed(3)) * 2).log_softmax(-1)
    (expected,) = sorted_way(log_probs, **options)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    draws = torch.cat([Sampler(**options).draw(log_probs, [generator]) for generator in generators])
    assert expected[draws].all()
    below = expected.cumsum(0)[draws] - torch.rand(2000, dtype=torch.float64) * expected[draws]
    shares = torch.histc(below, bins=20, min=0, max=1) / len(draws)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 20), rtol=0, atol=0.02)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_all_of_the_same_probability_are_kept(options):
    assert set(drawn(torch.zeros(7).log_softmax(-1), 300, **options)) == set(range(7))


def test_temperature_sharpens():
    log_probs = torch.tensor([0.6, 0.4]).log()
    share = sum(drawn(log_probs, 2000, temperature=0.25)) / 2000
    assert share == pytest.approx(0.4**4 / (0.4**4 + 0.6**4), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-40, 1e-9])
def test_a_temperature_next_to_zero_is_zero(temperature):
    log_probs = torch.tensor([-1e-3, -7.0, -float("inf")]).repeat(3)
    assert drawn(log_probs, 1, temperature=temperature) == [0]


def test_a_prompt_is_bytes_to_the_tokenizer_of_bytes():
    tokenizer = BytesTokenizer()
    for prompt in (b"caf\xe9", "caf\udce9"):  # from standard input, and from an argument
        completion = Completion(tokenizer, prompt)
        assert completion.prompt == [256, *b"caf\xe9"] and completion.text == "caf"
        assert completion.finish() == "\ufffd"
    assert Completion(tokenizer, "é\r\n").text == "é\r\n"


def test_a_prompt_of_words_is_utf8():
    tokenizer = WordTokenizer(["<eos>", "<unk>"])
    for prompt in (b"a caf\xe9", "a caf\udce9"):
        with pytest.raises(UserError, match=r"prompt: byte 6 \(0xE9\) is not UTF-8.*\(word\).*iconv"):
            Completion(tokenizer, prompt)
    with pytest.raises(UserError, match="surrogate"):
        Completion(tokenizer, "\ud800")


def test_the_command_reads_prompts_from_everywhere(run, trained_run):
    options = [f"run={trained_run}", "max_tokens=20", "temperature=0"]
    given = run("txl_dist.generate", *options, "prompt=the and").stdout
    assert given.startswith("the and") and len(given) > len("the and\n")
    assert run("txl_dist.generate", *options, stdin="the and").stdout == given
    several = run("txl_dist.generate", *options, 'prompt=["the and", "of"]').stdout
    assert given.strip() in several and "--- 2\nof" in several
