"""Print, or write to a file, what continues a prompt: txl-generate run=RUN_DIR prompt="def main("."""

from pathlib import Path

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import GenerateJob
from txl_dist.errors import ConfigError


def generate(job: GenerateJob) -> None:
    """Print each prompt and its continuation, a single text as it is sampled; or write them to files.

    Raises:
        UserError: where the checkpoint cannot be read, or a prompt cannot be encoded.
        ConfigError: where the run knows no such format.
    """
    from txl_dist.checkpoint.format import find_checkpoint  # with torch: not for --help
    from txl_dist.evaluation.continuation_files import (
        format_problems,
        numbered,
        tokens_wanted,
        write_file,
        written,
    )
    from txl_dist.evaluation.sampling import Completion, Sampler, complete
    from txl_dist.runs.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(job.run, find_checkpoint(job.run, job.checkpoint))
    prompts = job.prompt if job.prompt is not None else [read_standard_input("prompt")]
    completions = [Completion(tokenizer, prompt) for prompt in prompts]
    problems = list(format_problems(job.run, job.format, tokenizer, completions))
    if problems:
        raise ConfigError(problems)
    model, _ = load_model(job.run, job.checkpoint, job.model, job.average)
    streamed = len(completions) == 1 and job.out is None and job.format == "text"
    if streamed:
        print(completions[0].text, end="", flush=True)
    sampler = Sampler(job.temperature, job.top_k, job.top_p)
    max_tokens = tokens_wanted(job.max_tokens, job.format, tokenizer, completions)
    for pieces in complete(model, completions, sampler, job.seed, max_tokens):
        if streamed:
            print(pieces[0], end="", flush=True)
    if streamed:
        print()
    elif job.out is not None:
        for path, completion in zip(numbered(Path(job.out), len(completions)), completions, strict=True):
            print(write_file(path, job.format, tokenizer, completion))
    elif len(completions) == 1:
        print(written(completions[0], job.format))
    else:
        shown = [f"--- {i}\n{written(completion, job.format)}" for i, completion in enumerate(completions, 1)]
        print("\n\n".join(shown))


def main() -> None:
    command("generate", GenerateJob, generate)


if __name__ == "__main__":
    main()
