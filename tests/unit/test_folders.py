"""Folders that appear whole, and replace others only then; files of records."""

from functools import partial
from pathlib import Path

import pytest

from vlm.errors import CheckpointError, ConfigurationError
from vlm.folders import new_folder, replace_folder
from vlm.whole import keep_records, records


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


def test_below_a_file_no_folder_is_made(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file" / "a" / "b", tmp_path / "file" / "a"):
        with pytest.raises(ConfigurationError, match=f"cannot be made. got the file {tmp_path / 'file'}; expected a folder"), new_folder(folder):
            pass


def test_lines_that_are_no_records_are_named(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2')
    assert records(file) == [{"step": 1}]
    for junk in (b"junk\n", b"[]\n", b"\xff\xfe\n"):
        file.write_bytes(b'{"step": 1}\n' + junk)
        for read in (records, partial(keep_records, wanted=bool)):
            with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged at line 2.*restore the file"):
                read(file)


def test_a_folder_replaces_another_and_what_an_interruption_left(tmp_path: Path):
    for name in ("new", "out", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
