"""Being asked to stop: SIGTERM, and SIGUSR1, which schedulers can be told to send some time before the end of a job. It is noted, and acted on at the boundary of a step."""

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["StopSignals"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While it is entered, signals are noted instead of ending the process; data workers, which are forked from it, live on as well. name: of the last one that came."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
