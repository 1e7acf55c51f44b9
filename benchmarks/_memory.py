"""Peak memory of a piece of work, counted tensor by tensor: what an allocator keeps, or the system takes back late, is not in it."""

import itertools
from collections.abc import Callable
from typing import Any

__all__ = ["peak"]


def peak(work: Callable[[], object]) -> int:
    """Largest number of bytes that tensors held at once during `work`, above those that they held at its start. Told by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))
