"""Adaptive input and softmax on their own; test_transformer_xl.py compares them with the reference."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from txl_dist.models.layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

torch.set_num_threads(1)

VOCAB, D_MODEL = 30, 8
CASES = {
    "full": {},
    "clusters": {"cutoffs": [10, 12, 25]},
    "narrowing clusters": {"cutoffs": [10, 12, 25], "div_val": 2},
    "nothing tied": {"cutoffs": [10, 25], "div_val": 2, "tie_weights": False, "tie_projections": False},
}


def build(
    cutoffs: Sequence[int] = (), div_val: int = 1, tie_weights: bool = True, tie_projections: bool = True
) -> tuple[AdaptiveEmbedding, AdaptiveSoftmax]:
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(VOCAB, D_MODEL, list(cutoffs), div_val)
    softmax = AdaptiveSoftmax(embedding, tie_weights, tie_projections)
    for parameter in dict.fromkeys([*embedding.parameters(), *softmax.parameters()]):
        nn.init.normal_(parameter)
    return embedding.double(), softmax.double()


def hidden_and_all_tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, VOCAB, D_MODEL, dtype=torch.float64, generator=generator)
    return hidden, torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(2)])


@pytest.mark.parametrize("case", CASES)
def test_probabilities_sum_to_one(case):
    _, softmax = build(**CASES[case])
    log_probs = softmax(hidden_and_all_tokens()[0], None)
    assert log_probs.shape == (2, VOCAB, VOCAB)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, VOCAB, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_nll_is_the_targets_log_probability(case):
    _, softmax = build(**CASES[case])
    hidden, targets = hidden_and_all_tokens()
    expected = -softmax(hidden, None).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(softmax(hidden, targets), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_position_that_is_not_scored_has_no_loss_and_no_gradient(case):
    _, softmax = build(**CASES[case])
    hidden, targets = hidden_and_all_tokens()
    targets[:, ::2] = -100
    hidden.requires_grad_()
    nll = softmax(hidden, targets)
    nll.sum().backward()
    assert not nll[:, ::2].any() and (nll[:, 1::2] > 0).all()
    assert not hidden.grad[:, ::2].any() and hidden.grad[:, 1::2].any(-1).all()


def test_clusters_are_chosen_in_their_order():
    """The head's outputs after the first cluster's tokens are the second cluster, the third, ..."""
    _, softmax = build(cutoffs=[10, 12, 25])
    with torch.no_grad():
        for parameter in softmax.parameters():
            parameter.zero_()
        softmax.cluster_bias.copy_(torch.tensor([2.0, 3.0, 4.0]).log())
    probs = softmax(torch.zeros(1, 1, D_MODEL, dtype=torch.float64), None).exp().flatten()
    sums = [part.sum().item() for part in probs.split([10, 2, 13, 5])]
    assert sums == pytest.approx([10 / 19, 2 / 19, 3 / 19, 4 / 19])


@pytest.mark.parametrize("case", CASES)
def test_a_token_is_embedded_by_its_row_and_projection(case):
    embedding, _ = build(**CASES[case])
    cutoffs, div_val = CASES[case].get("cutoffs", []), CASES[case].get("div_val", 1)
    _, tokens = hidden_and_all_tokens()
    embedded = embedding(tokens)
    for token, row in zip(tokens.flatten(), embedded.flatten(0, 1), strict=True):
        cluster = sum(int(token) >= cutoff for cutoff in cutoffs) if div_val > 1 else 0
        expected = getattr(embedding, f"table_{cluster}")[token - ([0, *cutoffs][cluster])]
        if div_val > 1:
            expected = getattr(embedding, f"projection_{cluster}") @ expected
        torch.testing.assert_close(row, expected * D_MODEL**0.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("present", [range(0, 10), range(10, 12), range(12, 25), range(25, 30)], ids=str)
def test_clusters_without_tokens_have_gradients_of_zero(case, present):
    """Not None: ZeRO waits for the gradient of every parameter on every rank."""
    embedding, softmax = build(**CASES[case])
    tokens = torch.tensor([[*present]])
    softmax(embedding(tokens), tokens).sum().backward()
    gradients = {name: p.grad for module in (embedding, softmax) for name, p in module.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    for start, size in list(zip(softmax.starts, softmax.sizes, strict=True))[1:]:
        in_use = bool(softmax.bias.grad[start : start + size].any())
        assert in_use == any(start <= token < start + size for token in present)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("tie_projections", [True, False])
def test_parameters_are_tied_as_asked(tie_weights, tie_projections):
    embedding, softmax = build(cutoffs=[10, 25], div_val=2, tie_weights=tie_weights, tie_projections=tie_projections)
    shared = {name for name, p in embedding.named_parameters() if softmax.get_parameter(name) is p}
    assert shared == ({"table_0", "table_1", "table_2"} if tie_weights else set()) | (
        {"projection_1", "projection_2"} if tie_projections else set()
    )
    assert [tuple(p.shape) for p in embedding.parameters()] == [
        (10, 8), (8, 8), (15, 4), (8, 4), (5, 2), (8, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("outside", [-1, VOCAB])
@pytest.mark.parametrize("case", CASES)
def test_a_token_outside_the_vocabulary_is_an_error(case, outside):
    embedding, softmax = build(**CASES[case])
    tokens = torch.tensor([[1, outside]])
    with pytest.raises(IndexError):
        embedding(tokens)
    with pytest.raises(IndexError):
        softmax(torch.zeros(1, 2, D_MODEL, dtype=torch.float64), tokens)
