"""A file or folder bears its final name only once it is complete."""

import os

import pytest

from txl_dist.errors import RunError, UserError
from txl_dist.files.atomic import atomic_file, lock_of_new_folder, new_folder


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "trace.json.gz"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        assert temporary.name.endswith(".json.gz")  # some writers choose the format by it
        temporary.write_text("half")
        raise RuntimeError("broken off")
    assert list(tmp_path.iterdir()) == []
    with atomic_file(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_is_named(full_disk):
    path = full_disk / "config.yaml"
    path.write_text("old")
    with pytest.raises(OSError, match="config.yaml") as error, atomic_file(path) as temporary:
        temporary.write_bytes(bytes(1 << 20))
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert [file.name for file in full_disk.iterdir()] == ["config.yaml"]


def build(folder, during=lambda lock: None):
    with lock_of_new_folder("to", folder, "testing") as lock, new_folder(folder, lock) as partial:
        (partial / "content").write_text("all of it")
        during(lock)


@pytest.mark.parametrize("name", ["new", "deep/er/new", "empty", "link"])
def test_a_folder_appears_with_its_content(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    before = {path.name for path in tmp_path.iterdir()}
    (tmp_path / ".new.partial").mkdir()  # of a process that was killed
    (tmp_path / ".new.partial/half").write_text("x")
    build(tmp_path / name, lambda lock: list((tmp_path / name).glob("*")) and pytest.fail("it is there already"))
    assert [path.name for path in (tmp_path / name).iterdir()] == ["content"]
    target = {"link": {"elsewhere"}, "deep/er/new": {"deep"}}.get(name, {name})
    assert {path.name for path in tmp_path.iterdir()} - {".new.partial"} == before | target


def test_a_folder_that_another_process_has_made_is_not_overwritten(tmp_path):
    def appear(lock):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "other").write_text("of another")

    with pytest.raises(UserError, match="new: is there already, and nothing is overwritten"):
        build(tmp_path / "new", appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "other"]


def test_a_process_that_has_lost_its_lock_touches_nothing(tmp_path):
    with pytest.raises(RunError, match="another process has taken over"):
        build(tmp_path / "new", lambda lock: lock.lost.set())
    assert [path.name for path in tmp_path.iterdir()] == [".new.partial"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file/new", "file/deep/new"):
        with pytest.raises(RunError, match=rf"to=.*/{name}: cannot be written: .*/file.*: Not a directory"):
            build(tmp_path / name)
    with pytest.raises(RunError, match=r"to=.*: cannot be written: .*new: No space left on device"):
        build(tmp_path / "new", lambda lock: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
