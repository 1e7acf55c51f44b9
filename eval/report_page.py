"""`report.html` of a run, from its folder alone: one file that needs no network, and the same curves as PNG files in `pictures/`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.eval import report_asked, report_parts, report_sections
from vlm.eval.report_html import page
from vlm.eval.report_run import read_run
from vlm.train.config import RunSpec
from vlm.whole import write_whole

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["SMALL", "write_report"]

SMALL = 300_000_000
"""Parameters up to which the model before training is made again for the report, and models are asked at the end of training."""

Starting = Callable[[RunSpec], "tuple[VLM, VLMProcessor]"]


def write_report(run_folder: str | Path, *, starting: Starting | None = None, largest: int | None = None) -> Path:
    """Write `report.html` and its pictures into a run's folder, finished or not; returns the page.

    starting: makes the model before the first step, where the report is to show its answers; it is called for models of at most SMALL parameters.
    largest: parameters above which no model is loaded at all; default: any size. Raises CheckpointError for a folder without a run, ConfigurationError for parts that are not known here.
    """
    folder = Path(run_folder)
    written = read_run(folder)
    charts = report_sections.charts(written)
    rebuilt = (lambda: starting(written.run)) if starting is not None and (written.parameters or 0) <= SMALL else None
    asked = report_asked.ask(written, rebuilt, largest)
    inside, drawn = report_parts.parts(asked.figures)
    sections = [
        report_sections.curves(written, charts),
        report_asked.samples(written, asked),
        report_sections.accuracy(written),
        inside,
        report_sections.ledger(written),
        report_sections.data(written),
        report_sections.warnings(written),
        report_sections.speed(written),
        report_sections.machine(written),
    ]
    (folder / "pictures").mkdir(exist_ok=True)
    for name, data in ({f"{name}.png": chart.png() for name, chart in charts.items()} | drawn).items():
        (folder / "pictures" / name).write_bytes(data)
    write_whole(folder / "report.html", page(written.run.name, report_sections.head(written), sections))
    return folder / "report.html"
