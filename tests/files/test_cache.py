"""Downloads are kept in the user's cache folder."""

import pytest

from txl_dist.files.cache import cache_folder


@pytest.mark.parametrize("given", [None, "", "relative", "~/cache"])
def test_downloads_are_kept_in_an_absolute_folder(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "txl_dist"
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / ".cache" / "txl_dist"
