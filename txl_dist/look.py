"""Write a page that shows what memory and attention do in a text: txl-look run=RUN_DIR text="It was a"."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import LookJob
from txl_dist.errors import UserError

if TYPE_CHECKING:
    from txl_dist.evaluation.attention import ObservedText
    from txl_dist.evaluation.scoring import Scorer


def look(job: LookJob) -> None:
    """Write the page, and print what it shows.

    Raises:
        UserError: where the checkpoint cannot be read, or the text is empty or cannot be encoded.
    """
    from txl_dist.evaluation.attention import observe_text  # with torch: not for --help
    from txl_dist.evaluation.encode import encode_text
    from txl_dist.evaluation.scoring import Scorer
    from txl_dist.files.atomic import atomic_file
    from txl_dist.pages.page import render
    from txl_dist.runs.load import load_model, load_tokenizer

    model, checkpoint = load_model(job.run, job.checkpoint, job.model, job.average)
    scorer = Scorer(model, load_tokenizer(job.run, checkpoint))
    text = job.text if job.text is not None else read_standard_input("text")
    tokens = encode_text(scorer.tokenizer, text, "text")
    if not tokens:
        raise UserError("text: has no token to look at; give a longer one")
    observed = observe_text(model, scorer.tokenizer.eos, tokens[: job.max_tokens])
    data = {"run": job.run, "step": checkpoint.step, **page_data(scorer, tokens, observed)}
    page = render(f"{Path(job.run).name}: what the memory does", data, ["look.css"], ["look.js"])
    with atomic_file(Path(job.to)) as path:
        path.write_text(page, "utf-8")
    if len(tokens) > job.max_tokens:
        print(f"The text has {len(tokens):,} tokens: it is cut after max_tokens={job.max_tokens}.")
    loss, alone = (-log_probs.mean().item() for log_probs in (observed.log_probs, observed.alone))
    print(f"loss with memory {loss:.4f}, without {alone:.4f} nats per token")
    print(f"{job.to}: {decimal(len(page))}; open it in a browser")


def page_data(scorer: "Scorer", tokens: list[int], observed: "ObservedText") -> dict[str, Any]:
    """Return what pages/look.js shows of a text, of which the first tokens have been observed."""
    log_probs = observed.log_probs.tolist()
    scores = scorer.describe(tokens[: len(log_probs)], log_probs)
    config = scorer.model.config
    return {
        "text_tokens": len(tokens),
        "tgt_len": config.tgt_len,
        "mem_len": config.lookback,
        "tokens": [score.text for score in scores],
        "loss": [round(-score.log_prob, 4) for score in scores],
        "alone": [round(-log_prob, 4) for log_prob in observed.alone.tolist()],
        "attention": observed.attention and observed.attention.to_json(),
    }


def main() -> None:
    command("look", LookJob, look)


if __name__ == "__main__":
    main()
