"""Checkpoints in and out: `python -m txl_dist.convert from=PATH run=RUN_DIR`, `... run=RUN_DIR to=FOLDER`.

In: a model of Hugging Face, the authors or NVIDIA becomes a run of step 0, with weights and a tokenizer and nothing
else. Out: a run becomes a folder that transformers 5 loads with trust_remote_code=True, the model's code included.
"""

from pathlib import Path

from txl_dist.cli import command
from txl_dist.config.schema import ConvertJob
from txl_dist.files.atomic import lock_of_new_folder


def convert(job: ConvertJob) -> None:
    """Import or export a checkpoint; the new folder takes its name when it is complete."""
    from txl_dist.conversion.exporting import export_checkpoint  # with torch: not for --help
    from txl_dist.conversion.importing import import_checkpoint

    key = "run" if job.from_ is not None else "to"
    folder = Path(getattr(job, key))
    with lock_of_new_folder(key, folder, "converting a checkpoint") as lock:
        if job.from_ is not None:
            import_checkpoint(job, Path(job.from_), folder, lock)
        else:
            export_checkpoint(job, folder, lock)


def main() -> None:
    """Run the command line."""
    command("convert", ConvertJob, convert)


if __name__ == "__main__":
    main()
