"""The command convert: directions, folders, modes of files, and commands on an imported run."""

import json
import os

import pytest

from tests.conversion.third_party import convert_job, hugging_face_model, import_run, refusal, save_folder
from txl_dist.convert import convert


def test_directions_and_folders(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    assert "from, to" in refusal(None, tmp_path / "run")
    assert "from, to" in refusal(folder, tmp_path / "run", to=tmp_path / "out")
    assert "there is no such" in refusal(tmp_path / "nowhere", tmp_path / "run")
    assert f"run={folder}: is there already" in refusal(folder, folder)
    run_dir = import_run(folder, tmp_path / "run")
    assert "is there already" in refusal(None, run_dir, to=folder)
    message = refusal(None, run_dir, to=tmp_path / "out", tokenizer_from="x", model={"cutoffs": [3]})
    assert "tokenizer_from=x" in message and "model.cutoffs" in message
    assert "run=" in refusal(None, tmp_path / "none", to=tmp_path / "out")
    assert "model.mem_len=0" in refusal(None, run_dir, to=tmp_path / "out", model={"mem_len": 0})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_imported_run_is_evaluated_inspected_and_generated_from(run, tmp_path):
    """On data prepared with the imported words; with other data, and for training, it is refused."""
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    run_dir = tmp_path / "run"
    assert "parameters" in run("txl_dist.convert", f"from={folder}", f"run={run_dir}").stdout
    text = "".join(f"w{i % 13} w{i % 7}\nother w{i % 40}\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    prepared = ["corpus=text", f"corpus.path={tmp_path / 'text.txt'}", "corpus.valid_share=0.2", "tokenizer=word"]
    vocab = f"tokenizer.vocab={run_dir / 'tokenizer' / 'vocab.txt'}"
    run("txl_dist.prepare", *prepared, vocab, f"data.dir={tmp_path / 'data'}")
    run("txl_dist.prepare", *prepared, f"data.dir={tmp_path / 'other'}")
    command = ["txl_dist.evaluate", f"run={run_dir}", "split=valid", "format=json", "num_lanes=2"]
    result = json.loads(run(*command, f"data_dir={tmp_path / 'data'}").stdout)
    assert result["step"] == 0 and 0 < result["loss"] < 20
    assert "tokenizer" in run(*command, f"data_dir={tmp_path / 'other'}", expect=2).stderr
    assert "data_dir: is missing" in run(*command, expect=2).stderr
    inspected = run("txl_dist.inspect", f"run={run_dir}", "verify=true").stdout
    assert str(folder) in inspected and "vocabulary of 50" in inspected
    facts = json.loads(run("txl_dist.inspect", f"run={run_dir}", "format=json").stdout)
    assert facts["imported"]["from"] == str(folder) and facts["holds"].keys() == {"weights"}
    assert run("txl_dist.generate", f"run={run_dir}", "prompt=w1 w2", "max_tokens=5").stdout.startswith("w1 w2 ")
    train = ["txl_dist.train", f"run.dir={run_dir}", f"data.dir={tmp_path / 'data'}", "tracking.mode=disabled"]
    done = run(*train, "data.num_lanes=2", expect=2)
    assert "imported" in done.stderr and "Traceback" not in done.stderr
    # With the dataset given at the import, evaluate finds it by itself.
    run("txl_dist.convert", f"from={folder}", f"run={tmp_path / 'third'}", f"tokenizer_from={tmp_path / 'data'}")
    assert json.loads(run(command[0], f"run={tmp_path / 'third'}", *command[2:]).stdout)["loss"] == result["loss"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_an_import_and_an_export_have_the_modes_of_any_new_file(umask, mode, tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    before = os.umask(umask)
    try:
        import_run(folder, tmp_path / "run")
        convert(convert_job(run=tmp_path / "run", to=tmp_path / "out"))
    finally:
        os.umask(before)
    files = [path for name in ("run", "out") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 8 and {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)}
