"""What lies where in a tar shard: its members, the samples that they form, and the file beside the shard that keeps both. Nothing is ever extracted."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm.errors import DataError

__all__ = ["COMPRESSED", "RECORDS", "Member", "ShardIndex", "Stamp", "index_of", "keep_index", "load_index", "parse_index", "read_index", "stamp_of"]

FORMAT = 1
"""Of index files. To be raised whenever the content, the grouping or the hash changes: older files are then made anew."""
BLOCK = 512
RECORDS = ("json", "txt", "caption")
"""Extensions of the member that says what is talked about; the first that is there counts."""
NAMED = 5
"""Skipped members of one kind that are named; the others are counted."""
LONGEST_NAME = 2**20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
Stamp = tuple[int, int]


class Member(NamedTuple):
    """A file in a shard: its name, without a "./" in front, and where its bytes lie."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Of its sample: the path up to the first dot of the base name."""
        return self.name[: len(self.name) - len(self.base)] + self.base.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows that dot, in lower case: "left.jpg"."""
        return self.base.partition(".")[2].lower()

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Samples of a shard, in the order in which each one's first member comes.

    Sample i has the members starts[i] to starts[i + 1], in the order of the shard; member j is called names[ends[j - 1] : ends[j]] (UTF-8) and is sizes[j] bytes from offsets[j] on.
    length: bytes of the (uncompressed) archive. digest: see `index_of`. junk: why members were skipped -> how many, and the names of the first. lost: (key, reason) of what is no sample.
    """

    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ends: NDArray[np.int64]
    names: bytes
    length: int
    digest: str
    junk: dict[str, tuple[int, list[str]]]
    lost: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, sample: int) -> list[Member]:
        """The members of a sample; they share a key."""
        return [self._member(number) for number in range(int(self.starts[sample]), int(self.starts[sample + 1]))]

    def names_of(self, sample: int) -> bytes:
        """The names of its members, one behind the other."""
        first, last = int(self.starts[sample]), int(self.starts[sample + 1])
        return self.names[int(self.ends[first - 1]) if first else 0 : int(self.ends[last - 1]) if last else 0]

    def _member(self, number: int) -> Member:
        begin = int(self.ends[number - 1]) if number else 0
        return Member(self.names[begin : int(self.ends[number])].decode("utf-8", "replace"), int(self.offsets[number]), int(self.sizes[number]))


def stamp_of(file: int | str) -> Stamp:
    """Size and time of change: what tells that a shard is not the one that was indexed."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


# ---- the file beside the shard -------------------------------------------------------------------------------------------


def load_index(path: str) -> tuple[ShardIndex, str | None]:
    """Index of a plain tar shard, from PATH.index where that belongs to the shard as it is now; else it is made, and kept there. Several processes may do so at once.

    Returns the index, and why it could not be kept (None: it was). Raises DataError for a shard that is missing, cut, damaged, compressed, or no tar file.
    """
    try:
        stamp = stamp_of(path)
        if (kept := read_index(path, stamp)) is not None:
            return kept, None
        with open(path, "rb") as file:
            index = index_of(file, stamp[0], path)
            if stamp_of(file.fileno()) != stamp:
                raise DataError(f"{path} was changed while its index was made", kind="unreadable file", cure="wait until it is whole, then start again")
    except OSError as error:
        raise DataError(f"the shard {path} cannot be read", kind="unreadable file", got=error.strerror, cure="set `file` (or data_root) to where it lies") from error
    return index, keep_index(path, stamp, index)


def _index_bytes(index: ShardIndex, stamp: Stamp) -> bytes:
    """The content of an index file: an uncompressed .npz without pickles."""
    facts = {"format": FORMAT, "stamp": stamp, "length": index.length, "digest": index.digest, "junk": index.junk, "lost": index.lost}
    arrays = {"starts": index.starts, "offsets": index.offsets, "sizes": index.sizes, "ends": index.ends}
    arrays |= {name: np.frombuffer(text, dtype=np.uint8) for name, text in (("facts", json.dumps(facts).encode()), ("names", index.names))}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def parse_index(content: bytes, stamp: Stamp | None) -> ShardIndex | None:
    """The index that `keep_index` wrote; None for one of another format, or damaged, or of a shard with another stamp. stamp: None where it is not known."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            facts: dict[str, Any] = json.loads(arrays["facts"].tobytes())
            if facts["format"] != FORMAT or (stamp is not None and tuple(facts["stamp"]) != stamp):
                return None
            starts, offsets, sizes, ends = (arrays[name].astype(np.int64) for name in ("starts", "offsets", "sizes", "ends"))
            names = arrays["names"].tobytes()
            junk = {reason: (int(count), list(named)) for reason, (count, named) in facts["junk"].items()}
            index = ShardIndex(starts, offsets, sizes, ends, names, int(facts["length"]), str(facts["digest"]), junk, [(key, reason) for key, reason in facts["lost"]])
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile):
        return None
    return index if _fits(index) else None


def _fits(index: ShardIndex) -> bool:
    """Whether every number lies where it can: a damaged index must not read beside the members."""
    rows = [index.starts, index.ends]
    rising = all(row.ndim == 1 and bool((np.diff(row, prepend=0) >= 0).all()) for row in rows) and len(index.starts) > 0
    if not rising or not len(index.offsets) == len(index.sizes) == len(index.ends) == index.starts[-1] or index.starts[0] != 0:
        return False
    inside = (index.offsets >= 0) & (index.sizes >= 0) & (index.offsets + index.sizes <= index.length)
    return bool(inside.all()) and (int(index.ends[-1]) if len(index.ends) else 0) == len(index.names)


def read_index(path: str, stamp: Stamp) -> ShardIndex | None:
    """The index kept beside the shard `path`, None where there is none for the shard with this stamp."""
    try:
        with open(f"{path}.index", "rb") as file:
            return parse_index(file.read(), stamp)
    except OSError:
        return None


def keep_index(path: str, stamp: Stamp, index: ShardIndex) -> str | None:
    """Writes PATH.index beside and renames it. Returns why that was not possible, None where it was. A folder that is marked read-only stays as it is, also for root."""
    if not os.stat(os.path.dirname(path) or ".").st_mode & 0o222:
        return "the folder is read-only"
    partial = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.index.{os.urandom(4).hex()}")
    try:
        with open(partial, "wb") as file:
            file.write(_index_bytes(index, stamp))
        os.replace(partial, f"{path}.index")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        return error.strerror or type(error).__name__
    return None


# ---- one pass over the headers -------------------------------------------------------------------------------------------


def index_of(file: BinaryIO, length: int, shard: str) -> ShardIndex:
    """Index of an uncompressed tar archive (ustar, GNU or pax) of `length` bytes, made from its headers.

    The digest is a SHA-256 over every header, every record (json, txt, caption) whole, and the last block of every other member. It costs nothing beside the headers, and any change of texts, names, sizes or
    order shows; of pictures, what leaves their size, their header and their last 512 bytes alone does not. (A PNG ends in checksums of its pixels.)

    shard: what messages call it. Raises DataError for an archive that is cut (with the byte where it ends and the last whole member), damaged, compressed, or none.
    """
    scan = _Scan(file, length, shard)
    members = list(scan.members())
    samples, lost = _grouped(members, scan.skip)
    rows = [member for sample in samples for member in sample]
    names = [member.name.encode() for member in rows]
    return ShardIndex(
        _int64([0, *np.cumsum([len(sample) for sample in samples])]),
        _int64([member.offset for member in rows]),
        _int64([member.size for member in rows]),
        _int64(np.cumsum([len(name) for name in names])),
        b"".join(names),
        length,
        scan.digest.hexdigest(),
        scan.junk,
        lost,
    )


def _int64(values: Any) -> NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)


class _Scan:
    """A walk along the headers of an archive. junk: what was skipped, see `ShardIndex`."""

    def __init__(self, file: BinaryIO, length: int, shard: str):
        self.file, self.length, self.shard = file, length, shard
        self.junk: dict[str, tuple[int, list[str]]] = {}
        self.digest = hashlib.sha256()
        self.last = "none"

    def skip(self, reason: str, name: str) -> None:
        count, named = self.junk.get(reason, (0, []))
        self.junk[reason] = count + 1, [*named, name] if len(named) < NAMED else named

    def members(self) -> Iterator[Member]:
        """All regular files with an extension, in order."""
        position = 0
        long_name: str | None = None
        everywhere: dict[str, str] = {}
        here: dict[str, str] = {}
        while position < self.length:
            header = self._header(position)
            if header is None:
                self._see_the_end(position)
                return
            begin = position + BLOCK + self._sparse_tables(header, position)
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                text = self._text(header, begin)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = text.split(b"\0")[0].decode("utf-8", "backslashreplace")
                elif header.type == tarfile.XGLTYPE:
                    everywhere |= self._pax(text, position)
                elif header.type != tarfile.GNUTYPE_LONGLINK:
                    here = self._pax(text, position)
                position = begin + _padded(header.size)
                continue
            facts = everywhere | here
            header.name = facts.get("GNU.sparse.name", facts.get("path", long_name or header.name))
            header.size = self._number(facts.get("size", header.size), position)
            stored = header.size if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES else 0
            if begin + stored > self.length:
                raise self._cut()
            self.last, long_name, here = header.name, None, {}
            if (name := self._kept(header, facts)) is not None:
                yield Member(name, begin, stored)
            position = begin + _padded(stored)
        if self.length:
            raise self._cut()

    def _header(self, position: int) -> tarfile.TarInfo | None:
        """The header at a position; None for a block of zeros. What lies in front of it, the end of a member, goes into the digest."""
        front = min(position, BLOCK)
        self.file.seek(position - front)
        blocks = self.file.read(front + BLOCK)
        self.digest.update(blocks)
        block = blocks[front:]
        if len(block) < BLOCK:
            raise self._cut() if position else self._no_tar(block)
        if not any(block):
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            if not position:
                raise self._no_tar(block) from None
            raise self._damaged(position, str(error)) from None

    def _sparse_tables(self, header: tarfile.TarInfo, position: int) -> int:
        """Bytes of the tables behind the header of an old GNU sparse file."""
        if header.type != tarfile.GNUTYPE_SPARSE:
            return 0
        tables = 0
        self.file.seek(position + 482)
        more = self.file.read(1) == b"\1"
        while more:
            self.file.seek(position + BLOCK + tables + 504)
            tables += BLOCK
            more = self.file.read(1) == b"\1"
        return tables

    def _kept(self, header: tarfile.TarInfo, facts: dict[str, str]) -> str | None:
        """The name of a member that may belong to a sample; None where it is skipped."""
        name = header.name
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        base = name.rpartition("/")[2]
        if header.isdir() or not base:
            reason = "directory"
        elif header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in facts):
            reason = "sparse file"
        elif header.islnk() or header.issym():
            reason = "link"
        elif not header.isreg():
            reason = "no regular file"
        elif any(part.startswith(".") for part in name.split("/")):
            reason = "hidden file"
        elif not base.partition(".")[2]:
            reason = "no extension"
        else:
            if base.partition(".")[2].lower() in RECORDS:
                self._digest_record(header.size)
            return name
        self.skip(reason, name)
        return None

    def _digest_record(self, size: int) -> None:
        """A record, which begins where the file stands: behind its header."""
        left = size
        while left and (piece := self.file.read(min(left, 2**20))):
            self.digest.update(piece)
            left -= len(piece)

    def _text(self, header: tarfile.TarInfo, begin: int) -> bytes:
        """The content of a header that speaks of the next one."""
        if header.size > LONGEST_NAME or header.size < 0:
            raise self._damaged(begin - BLOCK, f"a name of {header.size:,} bytes")
        if begin + header.size > self.length:
            raise self._cut()
        self.file.seek(begin)
        text = self.file.read(header.size)
        self.digest.update(text)
        return text

    def _pax(self, text: bytes, position: int) -> dict[str, str]:
        """Records `length key=value newline` of a pax header (POSIX.1-2001, pax), up to the zeros that some programs fill it with."""
        facts: dict[str, str] = {}
        while text and text[0]:
            digits, _, _ = text.partition(b" ")
            length = self._number(digits.decode("ascii", "replace"), position)
            key, equals, value = text[len(digits) + 1 : length - 1].partition(b"=")
            if not equals or text[length - 1 : length] != b"\n":
                raise self._damaged(position, "a pax header that cannot be read")
            facts[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
            text = text[length:]
        return facts

    def _number(self, value: str | int, position: int) -> int:
        """A size, which is no negative number: a walk must go forward."""
        if isinstance(value, int) and value >= 0:
            return value
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
            return int(value)
        raise self._damaged(position, f"a size of {str(value)[:40]!r}")

    def _see_the_end(self, position: int) -> None:
        """From a block of zeros on, all must be zero: behind it other readers find nothing."""
        self.file.seek(position)
        while piece := self.file.read(2**20):
            if piece.count(0) < len(piece):
                raise DataError(
                    f"{self.shard} goes on behind the end of its archive, which is at byte {position:,}",
                    kind="unreadable file",
                    got=f"the last member before is {self.last}",
                    expected="zeros up to the end of the file",
                    cure="shards that were joined are to be listed one by one; if this one was not, its middle is damaged: fetch it again",
                )

    def _cut(self) -> DataError:
        return DataError(
            f"{self.shard} is cut: it ends at byte {self.length:,} in the middle of the archive",
            kind="unreadable file",
            got=f"the last whole member is {self.last}",
            expected="two blocks of zeros at the end",
            cure="fetch or write it again",
        )

    def _damaged(self, position: int, got: str) -> DataError:
        return DataError(
            f"{self.shard} is damaged at byte {position:,}: no header of a tar archive",
            kind="unreadable file",
            got=f"{got}; the last whole member is {self.last}",
            cure="fetch or write it again",
        )

    def _no_tar(self, block: bytes) -> DataError:
        for magic, kind in COMPRESSED.items():
            if block.startswith(magic):
                cure = "unpack it once (random access needs a plain tar)" + ("" if kind == "zstd" else ", or read it with `stream: true`")
                return DataError(f"{self.shard} is compressed with {kind}", kind="unreadable file", expected="a plain tar file", cure=cure)
        return DataError(
            f"{self.shard} is not a tar file",
            kind="unreadable file",
            got=f"{self.length:,} bytes that begin with {block[:24]!r}",
            cure="look into it: a page with an error, perhaps; fetch it again",
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# ---- members -> samples --------------------------------------------------------------------------------------------------


def _grouped(members: Iterable[Member], skip: Any) -> tuple[list[list[Member]], list[tuple[str, str]]]:
    """Members of one key, wherever they lie, are one sample (the convention of WebDataset). Of two with one name the later counts, as when unpacking; the earlier is reported to `skip`."""
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        group = groups.setdefault(member.key, {})
        if (earlier := group.pop(member.extension, None)) is not None:
            skip("twice in the shard (the last one counts)", earlier.name)
        group[member.extension] = member
    samples, lost = [], []
    for key, group in groups.items():
        if any(extension in group for extension in RECORDS):
            samples.append(list(group.values()))
        else:
            lost.append((key, _why_lost(group)))
    return samples, lost


def _why_lost(group: Iterable[str]) -> str:
    """Why members are no sample, from their extensions: with a dot in the base name, parts of several samples bear one key."""
    fronts = {extension.rpartition(".")[0] for extension in group if extension.rpartition(".")[2] in RECORDS}
    if not fronts:
        return f"no {', '.join(RECORDS[:-1])} or {RECORDS[-1]} among its members ({', '.join(group)})"
    if len(fronts) == 1:
        return f"a dot in the base name: its record counts as {next(iter(fronts))}.*, not as a record"
    return f"dots in the base name: {len(fronts)} samples fell together"
