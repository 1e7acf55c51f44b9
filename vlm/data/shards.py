"""Tar shards as files: which ones a name means, how each is read, and a writer of new ones in the convention of WebDataset."""

import bz2
import glob
import gzip
import http.client
import io
import itertools
import lzma
import os
import re
import tarfile
import urllib.error
import warnings
import zlib
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Self

from vlm.data.pictures import is_address
from vlm.data.remote import opener
from vlm.data.tarindex import COMPRESSED, Member, ShardIndex, Stamp, index_of, keep_index, load_index, parse_index, read_index, stamp_of
from vlm.errors import DataError

__all__ = ["Shard", "ShardWriter", "find_shards"]

LARGEST = 2**32
"""Bytes of a shard that is read whole, packed and unpacked."""
PIECE = 2**22
SECONDS = 60.0
"""How long a host may stay silent."""
TRIES = 3
SUFFIXES = (".tar",)
STREAMED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNPACKERS = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}


# ---- which shards --------------------------------------------------------------------------------------------------------


def find_shards(file: str, *, stream: bool = False, remote: bool = False) -> "list[Shard]":
    """The shards that `file` means: one, those in a folder, or those of a pattern, both by name; or a range in its own order, `{000000..000012}` or `{train,val}`.

    Raises DataError where there is none, where one of a range is missing, and for addresses without `remote` and `stream`.
    """
    if os.path.isfile(file):
        return [Shard(file, stream)]
    if os.path.isdir(file):
        suffixes = STREAMED if stream else SUFFIXES
        found = sorted(os.path.join(file, name) for name in os.listdir(file) if name.endswith(STREAMED) and not name.startswith("."))
        if closed := [path for path in found if not path.endswith(suffixes)]:
            raise DataError(f"{file} holds compressed shards", got=f"{len(closed)}, the first: {closed[0]}", cure="unpack them once, or set `stream: true`")
        if not found:
            raise DataError(f"the folder {file} holds no shards", expected=f"files called *{', *'.join(suffixes)}")
        return [Shard(path, stream) for path in found]
    paths = _expanded(file)
    if any(map(is_address, paths)):
        if not (remote and stream):
            raise DataError(f"the shards {file} are not files", cure="fetch them before training; or set `remote: true` and `stream: true`")
        return [Shard(path, stream) for path in paths]
    paths = [path for one in paths for path in (sorted(glob.glob(one)) if glob.has_magic(one) and not os.path.exists(one) else [one])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        got = f"{len(missing)} of {len(paths)} are missing, the first: {missing[0]}" if missing else "no file fits"
        raise DataError(f"the shards {file} are not there", got=got, cure="set `file` (or data_root) to where they lie")
    return [Shard(path, stream) for path in paths]


def _expanded(name: str) -> list[str]:
    """`a{08..10}b{x,y}` -> all of them, as a shell writes them; as many digits as the first number has."""
    texts = re.split(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", name)
    choices = [[text] if place % 2 == 0 else _choices(text) for place, text in enumerate(texts)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = numbers.groups()
        if int(last) < int(first) or int(last) - int(first) > 10**6:
            raise DataError(f"the range {{{text}}} of shards makes no sense", expected="the smaller number first, at most a million shards")
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return text.split(",")


# ---- one shard -----------------------------------------------------------------------------------------------------------


class Shard:
    """One shard: a plain tar file; or, where it is streamed, also a compressed one or an address.

    unkept: why its index could not be kept beside it, None where it was; known after `index`.
    """

    def __init__(self, path: str, stream: bool):
        self.path, self.stream = path, stream
        self.unkept: str | None = None
        self._stamp: Stamp | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def index(self) -> ShardIndex:
        """Its index: the one beside it, where that is its own; else made from its headers, or from all of a compressed or remote one (which is said). Raises DataError."""
        if is_address(self.path):
            return self._remote_index()
        try:
            self._stamp = stamp_of(self.path)
            with open(self.path, "rb") as file:
                packed = self.stream and _packing(file.read(8)) is not None
        except OSError as error:
            raise self._unread(error) from error
        if not packed:
            index, self.unkept = load_index(self.path)
            return index
        if (kept := read_index(self.path, self._stamp)) is not None:
            return kept
        index = self._counted()
        self.unkept = keep_index(self.path, self._stamp, index)
        return index

    def member(self, member: Member) -> bytes:
        """The bytes of a member of a plain tar file; nothing else is read."""
        try:
            with open(self.path, "rb", buffering=max(2, member.size)) as file:  # not more than the member is read
                if stamp_of(file.fileno()) != self._stamp:
                    raise self._changed()
                file.seek(member.offset)
                return file.read(member.size)
        except OSError as error:
            raise self._unread(error) from error

    def whole(self, index: ShardIndex) -> bytes:
        """The unpacked archive. Raises DataError where it is not the one that was indexed."""
        data = self._unpacked()
        if index_of(io.BytesIO(data), len(data), self.path).digest != index.digest:
            raise self._changed()
        return data

    def _remote_index(self) -> ShardIndex:
        try:
            kept = parse_index(_fetched(f"{self.path}.index"), None)
        except OSError:
            kept = None
        if kept is not None:
            return kept
        self.unkept = "remote"
        return self._counted()

    def _counted(self) -> ShardIndex:
        warnings.warn(f"{self.path} has no index beside it, so all of it is read to know its samples", stacklevel=6)
        data = self._unpacked()
        return index_of(io.BytesIO(data), len(data), self.path)

    def _unpacked(self) -> bytes:
        try:
            data = _fetched(self.path) if is_address(self.path) else _read(self.path)
        except OSError as error:
            raise self._unread(error) from error
        packing = _packing(data[:8])
        if packing not in UNPACKERS:
            return data  # of zstd too: the index says that it is no tar file, and what it is
        whole = bytearray()
        try:
            with UNPACKERS[packing](io.BytesIO(data)) as file:
                _pour(file, whole, self.path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            index_of(io.BytesIO(whole), len(whole), self.path)  # raises where a member was lost, and says which was the last whole one
            raise DataError(f"{self.path} is cut or damaged", kind="unreadable file", got=f"{len(data):,} bytes of {packing}: {error}", cure="fetch or write it again") from error
        return bytes(whole)

    def _unread(self, error: OSError) -> DataError:
        return DataError(f"the shard {self.path} cannot be read", kind="unreadable file", got=error.strerror or error, cure="set `file` (or data_root) to where it lies")

    def _changed(self) -> DataError:
        return DataError(
            f"{self.path} was changed after it had been opened",
            kind="unreadable file",
            cure="start again; a shard must not change during a run, nor differ from the index beside it",
        )


def _packing(front: bytes) -> str | None:
    return next((kind for magic, kind in COMPRESSED.items() if front.startswith(magic)), None)


def _read(path: str) -> bytes:
    data = bytearray()
    with open(path, "rb") as file:
        _pour(file, data, path)
    return bytes(data)


def _pour(file: BufferedIOBase, into: bytearray, shard: str) -> None:
    """Reads to the end, within the limit: what a few packed bytes become, or a host sends, is known only then."""
    while piece := file.read1(PIECE):  # what came before a break is not lost
        into += piece
        if len(into) > LARGEST:
            raise DataError(
                f"{shard} is too large to be streamed", kind="too large", expected=f"at most {LARGEST:,} bytes", cure="write smaller shards, or read plain ones without `stream`"
            )


def _fetched(address: str, tries: int = TRIES) -> bytes:
    """The bytes at an address. A transfer that breaks is tried again. Raises OSError."""
    try:
        return _fetched_once(address)
    except urllib.error.HTTPError as error:
        if error.code < 500 or tries == 1:
            raise
    except OSError:
        if tries == 1:
            raise
    return _fetched(address, tries - 1)


def _fetched_once(address: str) -> bytes:
    data = bytearray()
    try:
        with opener().open(address, timeout=SECONDS) as answer:
            _pour(answer, data, address)
            if answer.length:
                raise ConnectionError(f"{answer.length:,} bytes are missing")
    except (http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    return bytes(data)


# ---- new shards ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Fills FOLDER/PREFIX-000000.tar, PREFIX-000001.tar, ...; each is written beside and renamed when it is whole, and the same samples give the same bytes.

    with ShardWriter(folder, prefix="train", per_shard=1000) as out:
        out.write("0001", {"json": record, "0.jpg": picture})

    Args:
        folder: made where it is not there. prefix: what the shards are called.
        per_shard, per_shard_bytes: a shard ends with as many samples, or where another one would make it larger, whichever comes first. A shard must fit into memory to be streamed.

    Where the `with` ends by an error, the shard that was being written is not left.
    Raises DataError for a shard that is there already, and for keys and extensions that would not come back as they were given.
    """

    def __init__(self, folder: str | Path, *, prefix: str, per_shard: int = 1000, per_shard_bytes: int = 2**28):
        self.folder, self.prefix, self.per_shard, self.per_shard_bytes = Path(folder), prefix, per_shard, per_shard_bytes
        self.paths: list[Path] = []
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a sample. key: a path without a dot in its last part, new in this shard. members: extension -> content, written in this order."""
        self._check(key, members)
        if self._tar is not None and (len(self._keys) >= self.per_shard or self._tar.offset + sum(map(len, members.values())) > self.per_shard_bytes):
            self._finish()
        if key in self._keys:
            raise DataError(f"two samples of {self._path} are called {key!r}", cure="give each a key of its own")
        if self._tar is None:
            self._tar = self._begin()
        self._keys.add(key)
        for extension, content in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")  # mode 0644, time and owner 0
            header.size = len(content)
            self._tar.addfile(header, io.BytesIO(content))

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.paths):06d}.tar"

    @property
    def _partial(self) -> Path:
        return self._path.with_name(f".{self._path.name}.{os.getpid()}")

    def _begin(self) -> tarfile.TarFile:
        if self._path.exists():
            raise DataError(f"{self._path} is there already", cure="name another folder, or delete it")
        return tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        os.replace(self._partial, self._path)
        load_index(str(self._path))
        self.paths.append(self._path)
        self._tar, self._keys = None, set()

    def _check(self, key: str, members: Mapping[str, bytes]) -> None:
        for extension in members:
            member = Member(f"{key}.{extension}", 0, 0)
            whole = (member.key, member.extension) == (key, extension) and all(key.split("/")) and not any(part.startswith(".") for part in key.split("/"))
            if not whole or not extension or not member.name.isprintable():
                raise DataError(
                    f"the sample {key!r} cannot have a member {extension!r} in a tar shard",
                    expected="a key without a dot in its last part nor in front of a part, extensions in lower case without a slash",
                    cure="replace what is in the way, by %2E for a dot for instance",
                )
        if not members:
            raise DataError(f"the sample {key!r} has no members")
