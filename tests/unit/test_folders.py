"""Folders that appear whole, and replace others only then."""

from pathlib import Path

import pytest

from vlm.errors import ConfigurationError
from vlm.folders import new_folder, replace_folder


def test_new_folder_never_writes_over_another(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("one")
    assert (tmp_path / "out" / "x").read_text() == "one"
    with pytest.raises(ConfigurationError, match="holds something already"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(KeyError), new_folder(tmp_path / "other"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_replaces_another_and_what_an_interruption_left(tmp_path: Path):
    for name in ("new", "out", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
