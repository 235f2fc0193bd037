"""Turn text into a dataset: python -m txl_dist.prepare corpus=text corpus.path=books tokenizer=sentencepiece"""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import PrepareJob
from txl_dist.tracking.console import PlainConsole

if TYPE_CHECKING:
    from txl_dist.data.index import Index


EXPERIMENTS = {"labels": "sst2", "scores": "sst2", "answers": "squad2"}  # for each kind of examples


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
    """Print the size of each split, how often each label occurs, and the command that trains on the dataset."""
    from txl_dist.data.index import Index

    index = Index.open(str(folder))
    console = PlainConsole()
    console.print(size_table(index))
    if index.examples is not None and index.examples.kind != "scores":
        console.print(label_table(index))
    print(f"{folder}: vocabulary {index.vocab_size:,}, fingerprint {index.fingerprint[:12]}")
    program = "torchrun --nproc_per_node=2 -m txl_dist.train"
    experiment = "quickstart" if index.examples is None else EXPERIMENTS[index.examples.kind]
    print(f"Next: {command_to_paste(program, f'+experiment={experiment}', data__dir=folder)}")


def size_table(index: "Index") -> Table:
    """Return how much each split holds; no bytes of examples, because a passage stands in many of them."""
    columns = {"documents": "documents", "bytes": "bytes", "tokens": "tokens"}
    if index.examples is not None:
        columns = {"examples": "documents", "tokens": "tokens"}
    table = Table("split", *(Column(name, justify="right") for name in [*columns, "shards"]))
    for name, split in index.splits.items():
        numbers = [*(getattr(split, attribute) for attribute in columns.values()), len(split.shards)]
        table.add_row(name, *("-" if number is None else f"{number:,}" for number in numbers))
    return table


def label_table(index: "Index") -> Table:
    """Return how many examples of each split have each label, or an answer."""
    counts = [index.label_counts(name) for name in index.splits]
    table = Table("label", *(Column(name, justify="right") for name in index.splits))
    for label in counts[0]:
        table.add_row(label, *(f"{split[label]:,}" for split in counts))
    return table


def main() -> None:
    from txl_dist.cli import command  # here, because the processes that tokenize need no Hydra

    command("prepare", PrepareJob, prepare)


if __name__ == "__main__":
    main()
