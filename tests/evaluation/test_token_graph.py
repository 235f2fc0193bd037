"""Reading a token in place, recorded once and replayed at the same addresses, as a CUDA graph is, gives what Python
computes. On a GPU so does the graph itself.
"""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.test_contract import TESTS, build, find, make_config
from txl_dist.evaluation.reading import Memory, read, read_to_end
from txl_dist.evaluation.token_graph import TokenGraph, TokenStep, caches, token_reader

torch.set_num_threads(1)

MEM_LEN = 12
PROMPTS = [[1, 2, 3], [4], [39, 30, 20, 10, 0] * 4]  # shorter than the memory, and longer
CASES = {
    "relative": ("transformer_xl", {}),
    "shaw, same length": ("transformer_xl", {"attention": "shaw", "same_length": True, "pre_lnorm": True}),
    "clusters": ("transformer_xl", {"cutoffs": [10, 25], "div_val": 2}),
    "one width": ("transformer_xl", {"cutoffs": [10, 25], "clamp_len": 5}),
    "xlnet": ("xlnet", {}),
}


class Recorder(TorchDispatchMode):
    """Record operators with the tensors that they read and write; replay them at the same addresses."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        for operator, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor written in place
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def make(case):
    name, options = CASES[case]
    path = TESTS.parent / f"conf/model/{name}.yaml"
    return build(find(path), make_config(path, mem_len=MEM_LEN, **options)).eval()


def after_prompts(model):
    return Memory.join(read_to_end(model, torch.tensor([prompt]), Memory.empty(model, 1))[1] for prompt in PROMPTS)


@pytest.fixture
def recorded_graphs(monkeypatch):
    """Recorders in place of CUDA's graphs, and nothing in place of its streams."""

    @contextmanager
    def record_graph(graph, capture_error_mode):
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    standing_in = {"CUDAGraph": Recorder, "graph": record_graph, "stream": lambda stream: nullcontext()}
    standing_in |= dict.fromkeys(("Stream", "current_stream"), lambda: stream)
    for name, stand_in in standing_in.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def stream_of_tokens():
    """More tokens than are remembered, for each lane."""
    return torch.randint(40, (3 * MEM_LEN, len(PROMPTS)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_is_recorded_once_reads_every_token(case, recorded_graphs):
    model, on_gpu = make(case), make(case)
    if case == "clusters":  # a GPU does not count tokens
        on_gpu.embedding.embed_by_cluster = on_gpu.embedding.embed_by_all
    read_token = token_reader(model, after_prompts(model))
    replay_token = TokenGraph(on_gpu, after_prompts(model))
    for tokens in stream_of_tokens():
        torch.testing.assert_close(replay_token(tokens), read_token(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_token_is_the_same_to_the_device(case):
    """The same operators, none of which sends anything to Python or to another device; and nothing is left behind."""
    model = make(case).to("meta")
    step = TokenStep(model, len(PROMPTS))
    step.read()
    static = {id(tensor) for tensor in [step.lookback, *(cache.states for cache in caches(step.states))]}
    operators = []
    for _ in range(3):
        with Recorder() as recorder:
            log_probs = step.read()
        operators.append([str(operator) for operator, *_ in recorder.calls])
        assert {tensor.device.type for tensor in tensors(recorder.calls)} == {"meta"}
        results = [weakref.ref(tensor) for *_, result in recorder.calls for tensor in tensors(result)]
        del recorder, log_probs
        gc.collect()
        assert {id(result()) for result in results if result() is not None} <= static
    assert operators[0] == operators[1] == operators[2]
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & set(operators[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_graph_reads_what_python_reads(case):
    model = make(case).cuda()
    read_token = token_reader(model, after_prompts(model))
    assert isinstance(read_token, TokenGraph)
    memory = after_prompts(model)
    for tokens in stream_of_tokens():
        [(log_probs, memory)] = read(model, tokens[:, None], memory)
        torch.testing.assert_close(read_token(tokens.cuda()), log_probs[:, -1], rtol=1e-10, atol=1e-10)
