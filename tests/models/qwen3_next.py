"""What transformers 5 computes of the gated delta rule: python qwen3_next.py INPUT OUTPUT, where that is installed.

Its code asks for float32 in several places; here it gets float64 instead, so that differences are of the formulas.
"""

import sys

import torch
from torch.overrides import TorchFunctionMode
from transformers import Qwen3NextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)


class Float64(TorchFunctionMode):
    """Read float64 wherever the code says float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **kwargs or {})


def rule(function, tokens, state):
    """Outputs, the state behind, and the gradients of all that is read, where the loss is the sum of all squares."""
    inputs = {name: value.requires_grad_() for name, value in tokens.items()}
    heads_second = {name: value.transpose(1, 2) for name, value in inputs.items()}
    initial = state.requires_grad_()
    result, final = function(**heads_second, initial_state=initial, output_final_state=True)
    loss = result.square().sum() + final.square().sum()
    gradients = torch.autograd.grad(loss, [*inputs.values(), initial])
    return [x.detach() for x in (result.transpose(1, 2), final, *gradients)]


def layer(sizes, weights, first, second):
    """Outputs of two segments and the states between and behind them; the gradients of the first one's square."""
    config = Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"], **sizes)
    module = Qwen3NextGatedDeltaNet(config, 0).double()
    module.load_state_dict(weights)
    result = module(first)
    result.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    outputs, states = [], []
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for segment in (first, *second):
            outputs.append(module(segment, cache_params=cache))
            kept = cache.layers[0]
            states.append((kept.recurrent_states[0].clone(), kept.conv_states[0].clone()))
    return {"outputs": outputs, "states": states, "gradients": gradients}


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = torch.load(sys.argv[1])
    with Float64():
        results = {
            "chunks": rule(torch_chunk_gated_delta_rule, asked["tokens"], asked["state"]),
            "tokens": rule(torch_recurrent_gated_delta_rule, asked["tokens"], asked["state"]),
            "layer": layer(**asked["layer"]),
        }
    torch.save(results, sys.argv[2])
