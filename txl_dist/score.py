"""Print the log-probability of every token of a text: txl-score run=RUN_DIR text="It was a"."""

import json
import warnings
from math import exp
from typing import TYPE_CHECKING, Any

from rich.table import Table

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import ScoreJob
from txl_dist.tracking.console import PlainConsole

if TYPE_CHECKING:
    from txl_dist.evaluation.scoring import TokenScore


def score(job: ScoreJob) -> None:
    """Print a table, or one JSON object.

    Raises:
        UserError: where the checkpoint cannot be read, or the text cannot be encoded.
    """
    from txl_dist.evaluation.scoring import Scorer  # with torch: not for --help

    scorer = Scorer.open(job.run, job.checkpoint, job.model, job.average)
    text = job.text if job.text is not None else read_standard_input("text")
    likeliest = []
    if job.context == "both":
        scores = scorer.read_both_sides(text)
    else:
        scores, log_probs = scorer.read(text)
        likeliest = scorer.likeliest(log_probs, job.next)
    total = sum(token.log_prob for token in scores)
    if job.format == "json":
        tokens = [token._asdict() for token in scores]
        print(json.dumps({"log_prob": total, "tokens": tokens, "next": [token._asdict() for token in likeliest]}))
        return
    console = PlainConsole()
    console.print(table("token", scores))
    console.print(f"\n{len(scores):,} tokens, log-probability {total:,.4f} nats\n")
    if likeliest:
        console.print(table("next token", likeliest))


def table(title: str, scores: "list[TokenScore]") -> Table:
    """Make a table with one row per token."""
    rows = Table(title, "number", "log-probability", "probability", box=None, padding=(0, 3, 0, 0))
    for column in rows.columns[1:]:
        column.justify = "right"
    for token in scores:
        rows.add_row(repr(token.text), f"{token.token}", f"{token.log_prob:.4f}", f"{exp(token.log_prob):.4f}")
    return rows


def __getattr__(name: str) -> Any:
    """Import `Scorer` and `TokenScore` from their former place, for one version."""
    if name not in ("Scorer", "TokenScore"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from txl_dist.evaluation import scoring

    warnings.warn(f"import {name} from txl_dist.evaluation.scoring", DeprecationWarning, stacklevel=2)
    return getattr(scoring, name)


def main() -> None:
    command("score", ScoreJob, score)


if __name__ == "__main__":
    main()
