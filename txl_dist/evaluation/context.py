"""Relative effective context length (Dai et al. 2019, section 4.4 and appendix C): how far back context helps.

Models are compared with each other: a longer context counts where it makes a loss smaller than the best that any of
them reaches with the shorter one. RECL is the shortest context beyond which a longer one gains less than 1 %.

    b(c, t)   = min_i l_i(c, t)                            the best loss of token t with context c
    f_i(c, c') = mean of min(b(c, t), l_i(c', t))          over the hardest share r of the tokens, by b(c, t)
    g_i(c, c') = 1 - exp(f_i(c, c')) / exp(f_i(c, c))      the gain of model i from c to c' = c + step
"""

from collections.abc import Callable

import numpy as np

from txl_dist.checkpoint.format import find_checkpoint
from txl_dist.config.schema import ReclJob
from txl_dist.data.samples import SampleReader
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.likelihood import losses_in_context
from txl_dist.runs.load import load_model, open_data

RATIOS = (0.1, 0.5, 1.0)  # r: the shares of the hardest tokens
MIN_GAIN = 0.01


def check_data(job: ReclJob, runs: list[str]) -> None:
    """Open the data of all runs before anything is computed.

    Raises:
        ConfigError: with every run whose data cannot be read, or are not those of the first run.
    """
    problems: list[str] = []
    fingerprints: dict[str, str] = {}
    for run in runs:
        try:
            index = open_data(run, find_checkpoint(run, None), job.split, job.data_dir)
        except UserError as error:
            problems += [f"run={run}: {line}" for line in str(error).splitlines()]
            continue
        fingerprints[run] = index.fingerprint
        tokens = index.splits[job.split].tokens
        if job.max_context > tokens:
            problems.append(
                f"max_context={job.max_context}: the split {job.split} of {run} has only {tokens:,} tokens; "
                "give a shorter context"
            )
    first = next(iter(fingerprints), None)
    for run, fingerprint in fingerprints.items():
        if first is not None and fingerprint != fingerprints[first]:
            problems.append(f"run={run}: was trained on other data than {first}; compare runs of the same data")
    if problems:
        raise ConfigError(problems)


def context_losses(job: ReclJob, run: str, contexts: range, advance: Callable[[int], None]) -> list[np.ndarray]:
    """Compute the losses of a run's latest checkpoint with each context, at positions evenly spread over the split.

    Args:
        contexts: lengths in tokens.
        advance: called with each length when it is done.

    Returns:
        For each context float64 [positions], in nats.
    """
    model, checkpoint = load_model(run)
    index = open_data(run, checkpoint, job.split, job.data_dir)
    split = index.splits[job.split]
    stream = SampleReader(index, job.split).tokens(0, split.tokens).astype(np.int64)
    positions = np.linspace(0, split.tokens - 1, min(job.positions, split.tokens)).astype(np.int64)
    starts = split.document_starts
    reset = checkpoint.config["data"]["reset_memory"]
    batches = np.array_split(positions, -(-len(positions) // job.num_lanes))
    losses = []
    for context in contexts:
        parts = [losses_in_context(model, stream, batch, context, index.eos, starts, reset) for batch in batches]
        losses.append(np.concatenate(parts))
        advance(context)
    return losses


def effective_lengths(losses: np.ndarray, contexts: range) -> list[list[int]]:
    """Compute RECL of each model at each of RATIOS: the paper's table 8.

    Args:
        losses: [models, contexts, positions], in nats.
    """
    return [[effective_length(losses, model, contexts, ratio) for ratio in RATIOS] for model in range(len(losses))]


def effective_length(losses: np.ndarray, model: int, contexts: range, ratio: float) -> int:
    """Return the first context whose next one gains this model less than MIN_GAIN; if all gain more, the last."""
    for i in range(len(contexts) - 1):
        baseline = losses[:, i].min(axis=0)
        hardest = np.argsort(-baseline, kind="stable")[: max(1, round(ratio * len(baseline)))]
        short, long = (np.minimum(baseline, losses[model, at])[hardest].mean() for at in (i, i + 1))
        if 1 - np.exp(long - short) < MIN_GAIN:
            return contexts[i]
    return contexts[-1]
