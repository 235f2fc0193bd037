"""Text that goes on from a prompt: `python -m txl_dist.generate run=RUN_DIR prompt="def main("`."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import GenerateJob
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.layers.state import LayerState, concat_lanes
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.runs.load import encode_text, load_model, load_tokenizer

COLDEST = 1e-6  # below it, log-probabilities divided by the temperature leave float32: the likeliest token it is


def generate(job: GenerateJob) -> None:
    """Print each prompt and what follows: one prompt as it comes, several one after the other."""
    model, checkpoint = load_model(job.run, job.checkpoint, job.model, job.average)
    tokenizer = load_tokenizer(job.run, checkpoint)
    prompts = job.prompt if job.prompt is not None else [read_standard_input("prompt")]
    texts = [Text(tokenizer, prompt) for prompt in prompts]
    shown = texts if len(texts) == 1 else []
    for text in shown:
        print(text.text, end="", flush=True)
    for tokens in islice(continuations(model, [text.prompt for text in texts], job), job.max_tokens):
        new = [text.add(token) for text, token in zip(texts, tokens, strict=True)]
        for _, piece in zip(shown, new, strict=False):
            print(piece, end="", flush=True)
        if all(text.ended for text in texts):
            break
    rest = [text.end() for text in texts]
    print(rest[0] if shown else "\n\n".join(f"--- {i}\n{text.text}" for i, text in enumerate(texts, 1)))


class Text:
    """A prompt and what is added to it, token by token. `prompt`: its tokens, after `<eos>` as in a document."""

    def __init__(self, tokenizer: Tokenizer, prompt: str | bytes):
        self.ended = False
        self.prompt = [tokenizer.eos, *encode_text(tokenizer, prompt, "prompt")]
        # `<eos>` ends the text, unless it is the tokenizer's line end.
        self.last = tokenizer.eos if tokenizer.decode([tokenizer.eos]) == "" else None
        self.decoder = tokenizer.decoder()
        # What comes next may depend on what was before: a word wants a space before it.
        decoded = "".join(self.decoder.feed(token) for token in self.prompt[1:])
        try:
            self.text = prompt.decode() if isinstance(prompt, bytes) else prompt
            self.text.encode()
        except UnicodeError:  # of bytes that are not text, what can be shown
            self.text = decoded

    def add(self, token: int) -> str:
        """The text that has become settled by one more token."""
        self.ended = self.ended or token == self.last
        return self._grown("" if self.ended else self.decoder.feed(token))

    def end(self) -> str:
        """The rest of the text."""
        return self._grown(self.decoder.end())

    def _grown(self, piece: str) -> str:
        self.text += piece
        return piece


@torch.no_grad()
def continuations(model: TransformerXL, prompts: list[list[int]], job: GenerateJob) -> Iterator[list[int]]:
    """Sample on from prompts side by side, one token of each at a time, without end.

    Every prompt is a lane. Prompts of different lengths need no padding: each lane's memory holds its own last states,
    and `reach` tells how far back it goes. A lane's samples depend on its prompt and the seed alone.
    """
    read = [prefill(model, prompt) for prompt in prompts]
    log_probs = torch.cat([each for each, _ in read])
    memory = concat_lanes(states for _, states in read)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rng = [torch.Generator().manual_seed(job.seed) for _ in prompts]
    while True:
        tokens = [sample(row, job, die) for row, die in zip(log_probs.cpu(), rng, strict=True)]
        yield tokens
        inputs = torch.tensor(tokens)[:, None]
        log_probs, memory = model(inputs, None, lengths[:, None], memory)
        log_probs, lengths = log_probs[:, -1], lengths + 1


def prefill(model: TransformerXL, prompt: list[int]) -> tuple[Tensor, list[LayerState]]:
    """Read a prompt, segment by segment: log-probabilities of the next token [1, vocab_size], and the memory."""
    memory = model.empty_cache(1)
    for start in range(0, len(prompt), model.config.tgt_len):
        segment = torch.tensor([prompt[start : start + model.config.tgt_len]])
        lookback = torch.arange(start, start + segment.size(1))[None]
        log_probs, memory = model(segment, None, lookback, memory)
    return log_probs[:, -1], memory


def sample(log_probs: Tensor, job: GenerateJob, die: torch.Generator) -> int:
    """Draw from [vocab_size] log-probabilities at a temperature, among the top_k and the top_p likeliest tokens."""
    if job.temperature < COLDEST:
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
