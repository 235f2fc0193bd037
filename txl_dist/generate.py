"""Print text that continues a prompt: txl-generate run=RUN_DIR prompt="def main("."""

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import GenerateJob


def generate(job: GenerateJob) -> None:
    """Print each prompt and its continuation: a single one as it is sampled, several one after the other.

    Raises:
        UserError: where the checkpoint cannot be read, or a prompt cannot be encoded.
    """
    from txl_dist.evaluation.sampling import Completion, Sampler, complete  # with torch: not for --help
    from txl_dist.runs.load import load_model, load_tokenizer

    model, checkpoint = load_model(job.run, job.checkpoint, job.model, job.average)
    tokenizer = load_tokenizer(job.run, checkpoint)
    prompts = job.prompt if job.prompt is not None else [read_standard_input("prompt")]
    completions = [Completion(tokenizer, prompt) for prompt in prompts]
    streamed = len(completions) == 1
    if streamed:
        print(completions[0].text, end="", flush=True)
    sampler = Sampler(job.temperature, job.top_k, job.top_p)
    for pieces in complete(model, completions, sampler, job.seed, job.max_tokens):
        if streamed:
            print(pieces[0], end="", flush=True)
    if streamed:
        print()
    else:
        print("\n\n".join(f"--- {i}\n{completion.text}" for i, completion in enumerate(completions, 1)))


def main() -> None:
    command("generate", GenerateJob, generate)


if __name__ == "__main__":
    main()
