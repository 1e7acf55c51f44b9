"""Pictures that a part has to show of itself in a run's report, and what it is shown for them."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlm.features import Features

__all__ = ["Figure", "Seen", "drawn"]

DPI = 120


@dataclass(frozen=True)
class Seen:
    """A few pictures as a trained model sees them.

    names: of the pictures, as figures call them. pictures: (H, W, 3) uint8, after cropping, padding and resizing: the token at row r, column c of a grid lies over that part of the array.
    features: without a graph; to an encoder what it gives, at the levels that the first connector reads; to a connector what it is handed; to an adaptation what the encoder gives.
    """

    names: Sequence[str]
    pictures: "Sequence[NDArray[np.uint8]]"
    features: "Features"


@dataclass(frozen=True)
class Figure:
    """One picture of the report. draw: is handed an empty matplotlib figure of `size` inches, and fills it. caption: what is seen, with the numbers that the drawing leaves out."""

    title: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (8.0, 4.0)

    def png(self) -> bytes:
        """The drawn picture as the bytes of a PNG file."""
        return drawn(self.draw, self.size)


def drawn(draw: Callable[[Any], None], size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> bytes:
    """What `draw` fills an empty matplotlib figure of `size` inches with, as the bytes of a PNG file. layout: None takes half the time, and leaves the places of things to `draw`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout=layout)
    FigureCanvasAgg(canvas)
    draw(canvas)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
