"""The contract of a data source: a Spec that says where data lie, and a reader that gives their samples by index."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np

from vlm.data.pictures import ADDRESS, check_pictures
from vlm.data.sample import Sample
from vlm.errors import DataError

__all__ = ["Reader", "Source"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where data lie. A subclass says what `file` and `images` may be, and what it adds.

    samples: their number, for planning where the file is not there.
    missing_placeholder: a sample with pictures and no `<image>` is an error, or gets one `<image>` and a newline per picture before its first question.
    on_bad: a bad record is an error when it is read; or `open` looks at every record, leaves out those that are bad or miss a picture, and lists them in `Reader.bad`.
    remote: pictures may be http and https addresses, fetched whenever their sample is read.
    """

    use: ClassVar[str]

    file: str
    images: str | None = None
    samples: int | None = None
    missing_placeholder: Literal["error", "prepend"] = "error"
    on_bad: Literal["error", "skip"] = "error"
    remote: bool = False

    def there(self) -> bool:
        """Whether something lies at `file`: a file, a folder, a match of a pattern or range; of an address it is assumed."""
        return bool(ADDRESS.match(self.file)) or Path(self.file).exists() or bool(glob.glob(re.sub(r"\{[^}]*\}", "*", self.file)))

    def absolute(self) -> Self:
        """The same source, to be opened from any directory: its local paths made absolute."""
        local = {name: os.path.abspath(path) for name in ("file", "images") if (path := getattr(self, name)) is not None and not ADDRESS.match(path)}
        return replace(self, **local)

    def parts(self) -> list[str]:
        """The files that `file` means, in their order; each can be the `file` of a source of its own. Raises DataError, as `open` does, where it is clear that they cannot be read as one source."""
        if Path(self.file).is_dir():
            return sorted(str(path) for path in Path(self.file).iterdir() if path.is_file())
        return [self.file] if Path(self.file).exists() else sorted(glob.glob(self.file))

    def open(self) -> "Reader[Any]":
        """Finds the records, without reading their pictures. Raises DataError for data that are missing, empty or damaged."""
        raise NotImplementedError


S = TypeVar("S", bound=Source)


class Reader(Generic[S]):
    """Random access to the samples of a source. It holds where they lie, not the samples: cheap to fork and to pickle.

    bad: what was left out, one error per record. warnings: what else a user should see. blocks: samples per shard of a reader that reads whole shards, for the order of a mixture; None where any
    order will do. records: what the source calls its records.
    """

    records: ClassVar[str] = "records"
    source: S
    bad: tuple[DataError, ...] = ()
    warnings: tuple[str, ...] = ()
    blocks: tuple[int, ...] | None = None

    def sample(self, record: int) -> Sample:
        """The sample of a record, by its number among all. Raises DataError with file, record, numbers and cure."""
        raise NotImplementedError

    def file_hash(self) -> str:
        """SHA-256 of the data, in hexadecimal: another one where a run would see other samples."""
        raise NotImplementedError

    def keep(self, count: int, bad: Sequence[DataError] = (), *, look: bool = True, empty: str) -> None:
        """Settle which of `count` records are the samples; the last thing that `__init__` does.

        bad: what is left out already. look: whether `on_bad: skip` looks at the records now. empty: what is told where there is none. Raises DataError where nothing is left.
        """
        left_out = list(bad)
        numbers = [number for number in range(count) if self._holds(number, left_out)] if look and self.source.on_bad == "skip" else range(count)
        self._numbers = np.array(numbers, dtype=np.int64)
        self.bad = tuple(left_out)
        if not len(self):
            got = f"{len(left_out)} bad {self.records}, the first: {left_out[0]}" if left_out else empty
            raise DataError(f"{self.source.file} holds no samples", kind=left_out[0].kind if left_out else "empty", got=got)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`. Raises DataError as `sample` does; IndexError beyond the end."""
        return self.sample(int(self._numbers[index]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _holds(self, number: int, bad: list[DataError]) -> bool:
        try:
            check_pictures(self.sample(number))
        except DataError as error:
            bad.append(error)
            return False
        return True
