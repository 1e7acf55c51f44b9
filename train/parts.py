"""What `vlm list` prints: all parts and configurations there are."""

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm.composition import CONFIGS
from vlm.prompt import TEMPLATES
from vlm.registry import Registry

__all__ = ["Parts", "parts_table"]


@dataclass
class Parts:
    """What `vlm list` prints: title -> rows of name and one line."""

    tables: dict[str, list[tuple[str, str]]]

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        for title, rows in self.tables.items():
            table = Table(title=title, title_justify="left", show_header=False)
            for name, line in rows:
                table.add_row(Text(name), Text(line))
            console.print(table if rows else Text(f"{title}: none yet"))


def parts_table() -> Parts:
    """Registered parts of every axis with what their docstring says first, prompts, and the configurations of every group with their first comment line."""
    from vlm import connectors, data, encoders, llm, objectives

    axes: list[Registry] = [encoders.registry, connectors.registry, llm.registry, objectives.registry, data.readers]
    tables = {f"{axis.axis}s": [(name, _told(axis, name)) for name in axis.names()] for axis in axes}
    tables["prompts"] = [(name, f"needs {', '.join(template.needs)}" if template.needs else "for any tokenizer with an end token") for name, template in TEMPLATES.items()]
    tables["prompts"].append(("tokenizer", "the tokenizer's own chat template"))
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        if files:
            tables[f"configs/{folder.name}"] = [(file.stem, _first_line(file.read_text(encoding="utf-8")).lstrip("# ")) for file in files]
    return Parts(tables)


def _told(axis: Registry, name: str) -> str:
    """First line about a part: of its file, where it has one of its own, else of its class."""
    spec = axis.get(name)
    text = (sys.modules[spec.__module__] if spec.__module__ == f"{axis.package}.{name}" else spec).__doc__ or ""
    return "" if text.startswith(f"{spec.__name__}(") else _first_line(text)  # what a dataclass writes for want of a docstring


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
