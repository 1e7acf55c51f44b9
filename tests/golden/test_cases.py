"""Every golden case of every folder: `make test-golden`."""

from pathlib import Path

import pytest

from tests.golden.case import Case
from tests.golden.runner import NotBuilt, folders, row_of, run


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_case(folder: Path) -> None:
    row = row_of(folder.name)
    if isinstance(row, NotBuilt):
        pytest.skip(row.reason)
    problems = run(Case(folder), row)
    assert not problems, "\n".join(problems)
