"""docs/troubleshooting.md quotes messages that the program has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OWN = PAGE.partition("## Messages of libraries")[0]
MESSAGES = [message for row in re.findall(r"^\| (`.*?`) \|", OWN, re.MULTILINE) for message in re.findall(r"`([^`]+)`", row)]


@pytest.fixture(scope="module")
def source() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for folder in ("vlm", "train", "eval") for path in sorted((ROOT / folder).rglob("*.py")))


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 30


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_says_so(message: str, source: str) -> None:
    """`...` stands for what is filled in."""
    parts = [part.strip(" :") for part in message.split("...")]
    missing = [part for part in parts if part and part not in source]
    assert not missing
