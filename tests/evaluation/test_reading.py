"""Reading a text to its end gives the last one of the distributions, and the memory, that reading all of it gives."""

import pytest
import torch

from tests.evaluation.test_token_graph import CASES, make
from txl_dist.evaluation.reading import Memory, read, read_to_end


@pytest.mark.parametrize("case", CASES)
def test_the_last_distribution_alone_is_that_of_all_of_them(case):
    model = make(case)
    begin, text, rest = torch.randint(40, (3, 2, 30), generator=torch.Generator().manual_seed(0))  # several segments
    memory = read_to_end(model, begin, Memory.empty(model, 2))[1]
    *_, (expected, expected_memory) = read(model, text, memory.copy())
    log_probs, memory = read_to_end(model, text, memory)
    torch.testing.assert_close(log_probs, expected[:, -1])
    assert memory.position.tolist() == expected_memory.position.tolist() == [60, 60]
    for later, expected_later in zip(read(model, rest, memory), read(model, rest, expected_memory), strict=True):
        torch.testing.assert_close(later[0], expected_later[0])
