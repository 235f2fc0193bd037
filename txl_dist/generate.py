"""Text that goes on from a prompt: `python -m txl_dist.generate run=RUN_DIR prompt="def main("`."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from txl_dist.cli import command
from txl_dist.config import GenerateJob
from txl_dist.data.tokenizers import Tokenizer, load
from txl_dist.evaluate import trained_model
from txl_dist.models.transformer_xl import TransformerXL


def generate(job: GenerateJob) -> None:
    """Print each prompt and what follows: one prompt as it comes, several one after the other."""
    model, _, _ = trained_model(job)
    tokenizer = load(Path(job.run) / "tokenizer")
    prompts = job.prompt if job.prompt is not None else [sys.stdin.read()]
    tokens = continuations(model, [prompt_tokens(tokenizer, prompt) for prompt in prompts], job, tokenizer.eos)
    ends = tokenizer.decode([tokenizer.eos]) == ""  # `<eos>` ends the text, unless it is the tokenizer's line end
    texts, decoders, open_lanes = list(prompts), [tokenizer.decoder() for _ in prompts], set(range(len(prompts)))
    alone = len(prompts) == 1
    print(prompts[0] if alone else "", end="", flush=True)
    for step in islice(tokens, job.max_tokens):
        for lane in sorted(open_lanes):
            if ends and step[lane] == tokenizer.eos:
                open_lanes.remove(lane)
                continue
            text = decoders[lane].feed(step[lane])
            texts[lane] += text
            print(text if alone else "", end="", flush=True)
        if not open_lanes:
            break
    rest = [decoder.end() for decoder in decoders]
    print(rest[0] if alone else "\n\n".join(f"--- {i + 1}\n{text}{rest[i]}" for i, text in enumerate(texts)))


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """`<eos>`, as before every document, and the prompt."""
    return [tokenizer.eos, *tokenizer.encode(prompt.encode(), end=False).tolist()]


@torch.no_grad()
def continuations(model: TransformerXL, prompts: list[list[int]], job: GenerateJob, eos: int) -> Iterator[list[int]]:
    """Sample on from prompts side by side, one token of each at a time, without end.

    Every prompt is a lane. Prompts of different lengths need no padding: each lane's memory holds its own last states,
    and `reach` tells how far back it goes. A lane's samples depend on its prompt and the seed alone.
    """
    device = next(model.parameters()).device
    read = [prefill(model, prompt, device) for prompt in prompts]
    log_probs = torch.cat([each for each, _ in read])
    memory = [torch.cat(layer) for layer in zip(*(states for _, states in read), strict=True)]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    dice = [torch.Generator().manual_seed(job.seed) for _ in prompts]
    while True:
        tokens = [sample(row, job, die) for row, die in zip(log_probs.cpu(), dice, strict=True)]
        yield tokens
        inputs = torch.tensor(tokens, device=device)[:, None]
        log_probs, memory = model(inputs, None, lengths[:, None], memory)
        log_probs, lengths = log_probs[:, -1], lengths + 1


def prefill(model: TransformerXL, prompt: list[int], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Read a prompt, segment by segment: log-probabilities of the next token [1, vocab_size], and the memory."""
    memory = model.empty_memory(1)
    for start in range(0, len(prompt), model.config.tgt_len):
        segment = torch.tensor([prompt[start : start + model.config.tgt_len]], device=device)
        reach = torch.arange(start, start + segment.size(1), device=device)[None]
        log_probs, memory = model(segment, None, reach, memory)
    return log_probs[:, -1], memory


def sample(log_probs: Tensor, job: GenerateJob, die: torch.Generator) -> int:
    """Draw from [vocab_size] log-probabilities at a temperature, among the top_k and the top_p likeliest tokens."""
    if job.temperature == 0:
        return int(log_probs.argmax())
    ordered, tokens = (log_probs / job.temperature).log_softmax(-1).sort(descending=True)
    probabilities = ordered.exp()
    kept = probabilities.cumsum(-1) - probabilities < job.top_p  # the likeliest one is always kept
    if job.top_k:
        kept[job.top_k :] = False
    return int(tokens[torch.multinomial(probabilities * kept, 1, generator=die)])


def main() -> None:
    command("generate", GenerateJob, generate)


if __name__ == "__main__":
    main()
