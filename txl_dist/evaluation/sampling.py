"""Sample continuations of prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from txl_dist.data.tokenizers import Tokenizer
from txl_dist.evaluation.encode import encode_text
from txl_dist.evaluation.reading import Memory, read_to_end
from txl_dist.evaluation.token_graph import token_reader
from txl_dist.models.base import LanguageModel
from txl_dist.models.layers.transfer import to_device

# Below it, log-probabilities divided by the temperature leave float32; it counts as 0: the likeliest token.
MIN_TEMPERATURE = 1e-6
FEW = 1000  # so many of the likeliest tokens are found faster than a token is drawn several times
BLOCK = 512  # weights that are drawn from as one, at first


@dataclass(frozen=True)
class Sampler:
    """Draws tokens at a temperature, among the `top_k` likeliest (0: all) and those that make up `top_p`.

    Tokens as likely as the last one that belongs to them belong to them, too. One token may be `never` drawn.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    never: int | None = None

    def draw(self, log_probs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw a token for each lane, at temperature 0 the likeliest one.

        Args:
            log_probs: [lanes, vocab_size], on any device.
            generators: one for each lane, on the CPU.

        Returns:
            int64 [lanes], on the device of log_probs.
        """
        if self.never is not None:
            log_probs = log_probs.clone()
            log_probs[:, self.never] = -torch.inf
        if self.temperature < MIN_TEMPERATURE:
            return log_probs.argmax(-1)
        probabilities = (log_probs / self.temperature).softmax(-1)
        if 0 < self.top_k <= FEW:
            likeliest = probabilities.topk(min(self.top_k, probabilities.size(-1))).values
            probabilities = probabilities * compared(torch.ge, probabilities, likeliest[:, -1:])
        tokens = draw_index(probabilities, generators)
        if self.top_p < 1 or self.top_k > FEW:
            self._draw_again(probabilities, tokens, generators)
        return tokens

    def _draw_again(self, probabilities: Tensor, tokens: Tensor, generators: Sequence[torch.Generator]) -> None:
        """Replace tokens that do not belong to the likeliest, until all of them do.

        A draw among tokens that include those that belong is, where it belongs, a draw among those that do. One that
        does not belong shows that they are likelier than it is. So nothing is sorted, and a few draws are enough.
        """
        largest_sum = self.top_p if self.top_p < 1 else torch.inf
        largest_count = self.top_k or torch.inf
        lanes = torch.arange(len(tokens), device=tokens.device)
        while True:
            drawn = probabilities.gather(1, tokens[lanes, None])
            is_likelier = compared(torch.gt, probabilities, drawn)
            likelier = probabilities * is_likelier
            belongs = (likelier.sum(-1) < largest_sum) & (is_likelier.sum(-1) < largest_count)
            refused = belongs.logical_not().nonzero().squeeze(1)
            if len(refused) == 0:
                break
            lanes = lanes[refused]
            probabilities = likelier[refused]
            tokens[lanes] = draw_index(probabilities, [generators[lane] for lane in lanes.tolist()])


def compared(comparison: Callable[..., Tensor], x: Tensor, bound: Tensor) -> Tensor:
    """Return 1 where a comparison holds and 0 elsewhere, in the dtype of x: on a CPU faster than bool."""
    return comparison(x, bound, out=torch.empty_like(x))


def draw_index(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw an index for each row in proportion to its weights, [rows, n] -> int64 [rows].

    First a block of weights, then one of these: sums are faster than cumulative sums, which no processor computes side
    by side.
    """
    blocks = F.pad(weights, (0, -weights.size(-1) % BLOCK)).unflatten(-1, (-1, BLOCK))
    block = draw_by_cumulation(blocks.sum(-1), generators)
    rows = torch.arange(len(weights), device=weights.device)
    return block * BLOCK + draw_by_cumulation(blocks[rows, block], generators)


def draw_by_cumulation(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw an index as `draw_index` does: the first whose cumulative weight exceeds a uniform share of the sum."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    shares = torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=generator) for generator in generators])
    thresholds = to_device(shares, weights.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0]


@torch.no_grad()
def continuations(
    model: LanguageModel, prompts: list[list[int]], sampler: Sampler, seed: int = 1
) -> Iterator[list[int]]:
    """Continue all prompts (lists of tokens) side by side, without end; yield the next token of each.

    Every prompt is a lane. Prompts of different lengths need no padding: each lane's memory holds its own last states,
    and `lookback` limits how far back it is used. A lane's samples depend on its prompt and the seed alone.
    """
    prefilled = []
    for _, of_one_length in groupby(prompts, key=len):
        tokens = torch.tensor(list(of_one_length))
        prefilled.append(read_to_end(model, tokens, Memory.empty(model, len(tokens))))
    log_probs = torch.cat([prompt_log_probs for prompt_log_probs, _ in prefilled])
    memory = Memory.join(prompt_memory for _, prompt_memory in prefilled)
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    read_token = token_reader(model, memory)
    while True:
        tokens = sampler.draw(log_probs, generators)
        yield tokens.tolist()
        log_probs = read_token(tokens)


def complete(
    model: LanguageModel, completions: Sequence["Completion"], sampler: Sampler, seed: int, max_tokens: int
) -> Iterator[list[str]]:
    """Continue prompts until all their documents have ended, or by `max_tokens`; yield the new text of each."""
    if completions and completions[0].never_drawn is not None:
        sampler = replace(sampler, never=completions[0].never_drawn)
    stream = continuations(model, [completion.prompt for completion in completions], sampler, seed)
    for tokens in islice(stream, max_tokens):
        yield [completion.add(token) for completion, token in zip(completions, tokens, strict=True)]
        if all(completion.ended for completion in completions):
            break
    yield [completion.finish() for completion in completions]


class Completion:
    """A prompt and the text that follows it, decoded token by token.

    Attributes:
        prompt: its tokens, after `<eos>` as at the start of a document.
        tokens: those of the prompt, without this `<eos>`, and all that follow in its document.
        text: the prompt and all that has been decoded.
        never_drawn: `<eos>`, where it does not stand in the data; else None.
        ended: whether the document has ended.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str | bytes):
        self.ended = False
        self.tokens = encode_text(tokenizer, prompt, "prompt")
        self.prompt = [tokenizer.eos, *self.tokens]
        self.never_drawn = None if tokenizer.ends_documents else tokenizer.eos
        # `<eos>` ends the text, unless it is the tokenizer's line end.
        self.end_token = tokenizer.eos if tokenizer.decode([tokenizer.eos]) == "" else None
        self.decoder = tokenizer.decoder()
        # The prompt is decoded, too, because what comes next may depend on it: a word wants a space before it.
        decoded = "".join(self.decoder.feed(token) for token in self.tokens)
        try:
            self.text = prompt.decode() if isinstance(prompt, bytes) else prompt
            self.text.encode()
        except UnicodeError:  # bytes that are not text: what can be shown of them
            self.text = decoded

    def add(self, token: int) -> str:
        """Return the text that one more token has settled; a multi-byte character waits for its last byte."""
        self.ended = self.ended or token == self.end_token
        if self.ended:
            return ""
        self.tokens.append(token)
        return self._append(self.decoder.feed(token))

    def finish(self) -> str:
        """Return the rest of the text, with characters that are incomplete."""
        return self._append(self.decoder.end())

    def _append(self, piece: str) -> str:
        self.text += piece
        return piece
