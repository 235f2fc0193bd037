"""Turn text into a dataset: python -m txl_dist.prepare corpus=text corpus.path=books tokenizer=sentencepiece"""

from pathlib import Path

from rich.table import Table

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import PrepareJob
from txl_dist.tracking.console import PlainConsole


def prepare(job: PrepareJob) -> None:
    """Write the dataset that `job` describes to `job.data.dir` unless it is there already, and show what it holds.

    Raises:
        UserError: if the text cannot be read or split, or the folder holds something else.
        RunError: if the folder cannot be written, or a process that tokenizes was killed.
    """
    from txl_dist.data.preparing.pipeline import make_dataset  # with numpy: not for --help

    if not make_dataset(job):
        print("Nothing to do: the dataset is there, made of the same text with the same settings.")
    show(Path(job.data.dir))


def show(folder: Path) -> None:
    """Print the size of each split, and the command that trains on the dataset."""
    from txl_dist.data.index import Index

    index = Index.open(str(folder))
    table = Table("split")
    for column in ("documents", "bytes", "tokens", "shards"):
        table.add_column(column, justify="right")
    for name, split in index.splits.items():
        numbers = (split.documents, split.bytes, split.tokens, len(split.shards))
        table.add_row(name, *("-" if number is None else f"{number:,}" for number in numbers))
    PlainConsole().print(table)
    print(f"{folder}: vocabulary {index.vocab_size:,}, fingerprint {index.fingerprint[:12]}")
    program = "torchrun --nproc_per_node=2 -m txl_dist.train"
    print(f"Next: {command_to_paste(program, '+experiment=quickstart', data__dir=folder)}")


def main() -> None:
    from txl_dist.cli import command  # here, because the processes that tokenize need no Hydra

    command("prepare", PrepareJob, prepare)


if __name__ == "__main__":
    main()
