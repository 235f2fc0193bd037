"""Where a model is cut into stages."""

from itertools import accumulate, product

import pytest

from txl_dist.engine.pipeline import balance_layers


@pytest.mark.parametrize(
    "costs, stages, cut",
    [
        ([0, *[1] * 6, 0], 2, [3, 3]),
        ([0, *[1] * 12, 3.3], 4, [4, 4, 4, 0]),  # a softmax as costly as a stage has a stage for itself
        ([0, *[1] * 4, 2], 2, [3, 1]),
        ([4, *[1] * 6, 0], 2, [1, 5]),
        ([0, 1, 1, 0.1], 4, [0, 1, 1, 0]),
    ],
)
def test_stages_cost_alike(costs, stages, cut):
    assert balance_layers(costs, stages) == cut


def test_no_cut_has_a_cheaper_costliest_stage():
    """Against all cuts there are."""
    for costs in ([0, 3, 1, 4, 1, 5, 2], [2, 7, 1, 8, 2, 8], [0, 1, 1, 1, 1, 9], [5, 1, 1, 1]):
        for stages in (2, 3, 4):
            layers = len(costs) - 2
            cuts = [cut for cut in product(range(layers + 1), repeat=stages) if sum(cut) == layers]

            def costliest(cut, costs=costs):
                ends = [0, *(1 + end for end in accumulate(cut[:-1])), len(costs)]
                return max(sum(costs[start:end]) for start, end in zip(ends, ends[1:], strict=False))

            assert costliest(balance_layers(costs, stages)) == min(map(costliest, cuts)), (costs, stages)
