"""Tar shards in the convention of WebDataset: by random access through an index of each shard, or streamed, whole shards at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vlm.data import register
from vlm.data.base import Reader, Source
from vlm.data.jsonfile import parsed
from vlm.data.mixture import WINDOW
from vlm.data.pictures import ADDRESS, picture_below
from vlm.data.record import form_of, refused_key, sample_of
from vlm.data.sample import Picture, Sample
from vlm.data.shards import Shard, find_shards
from vlm.data.tarindex import NAMED, RECORDS, Member, ShardIndex
from vlm.errors import DataError

__all__ = ["TarReader", "TarSource"]

PICTURES = frozenset(("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"))
"""Last words of the extensions of members that are pictures."""
LARGEST_RECORD = 64 * 2**20
KEPT = 2**30
"""Bytes of streamed shards that a reader keeps at most, the one in use aside."""


@register("tar")
@dataclass(frozen=True, kw_only=True)
class TarSource(Source):
    """Tar shards. A sample is the members that share a name up to the first dot of the base name, wherever in the shard they lie.

    Its record is the member `json` (any form that `sample_of` knows), else `txt` or `caption`, the caption of its pictures; beside these a `json` of no known form is metadata. A record
    names pictures by member, by extension ("left.jpg") or by path below `images`; where it names none, it has all its picture members, in the order of the shard.

    file: a shard, a folder of them, a pattern (`train-*.tar`), or a range (`train-{000000..000012}.tar`). images: the folder of pictures that are no members; without it no file is read.
    on_bad: with `stream`, bad samples are left to the step that meets them. remote: shards may be addresses too, with `stream`.
    stream: read each shard from front to back into memory, compressed ones too (gzip, bzip2, xz), in an order that takes few shards at a time. Every worker of every rank reads every shard.
    """

    stream: bool = False

    def parts(self) -> list[str]:
        return [shard.path for shard in find_shards(self.file, stream=self.stream, remote=self.remote)]

    def open(self) -> "TarReader":
        """Reads the indexes of the shards, and writes those that are missing or stale to SHARD.index. Raises DataError for shards that are missing, cut, damaged, or no tar files."""
        return TarReader(self)


class TarReader(Reader[TarSource]):
    """The samples of tar shards. Random access reads a record by its place and leaves its pictures where they are; a streamed reader keeps the last shards.

    bad: members that are no sample by their names, and what `on_bad: skip` found. warnings: empty shards, members that were skipped, captions of several pictures, indexes that could not be kept.
    """

    records = "samples"

    def __init__(self, source: TarSource):
        self.source = source
        self.shards = find_shards(source.file, stream=source.stream, remote=source.remote)
        self._indexes = [shard.index() for shard in self.shards]
        self._ends = np.cumsum([len(index) for index in self._indexes])
        self._beyond = picture_below(source.images or ".", remote=source.remote)
        self._held: dict[int, bytes] = {}
        if source.stream:
            self.blocks = tuple(len(index) for index in self._indexes if len(index))
        self.warnings = tuple(_warnings(self.shards, self._indexes, source.stream))
        lost = [DataError(f"{shard.path}, sample {key}: {reason}") for shard, index in zip(self.shards, self._indexes, strict=True) for key, reason in index.lost]
        self.keep(int(self._ends[-1]), lost, look=not source.stream, empty="; ".join(self.warnings))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}

    def file_hash(self) -> str:
        """SHA-256 over the shards' base names and digests (`index_of`), in hexadecimal: no picture is read for it. The time of change does not count, so a copy is the same data."""
        parts = ([shard.path.rpartition("/")[2], index.digest] for shard, index in zip(self.shards, self._indexes, strict=True))
        return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()

    def sample(self, record: int) -> Sample:
        place = int(np.searchsorted(self._ends, record, side="right"))
        index = self._indexes[place]
        members = index.members(record - int(self._ends[place]) + len(index))
        key, where = members[0].key, f"{self.shards[place].path}, sample {members[0].key}"
        read, picture = self._ways(place)
        content, notes = _record(members, where, read)
        pictures = [picture(member) for member in members if _is_picture(member)]
        if pictures and not _names_pictures(content):
            notes += ("caption of several pictures",) * (len(pictures) > 1 and form_of(content) == "caption")
            content = {**content, "images": pictures}
        if content.get("id") is None:
            content = {**content, "id": key}
        found = partial(self._picture, members, picture)
        sample = sample_of(content, number=record, where=where, picture=found, prepend=self.source.missing_placeholder == "prepend")
        return replace(sample, notes=sample.notes + notes)

    def _ways(self, place: int) -> tuple[Callable[[Member], bytes], Callable[[Member], Picture]]:
        """How members of a shard are read, and become pictures."""
        shard = self.shards[place]
        if not self.source.stream:
            return shard.member, lambda member: Picture(shard.path, member.offset, member.size, member=member.name)
        data = self._shard(place)
        return (
            lambda member: data[member.offset : member.offset + member.size],
            lambda member: Picture(shard.path, size=member.size, data=data[member.offset : member.offset + member.size], member=member.name),
        )

    def _shard(self, place: int) -> bytes:
        """The bytes of a streamed shard. Where there is no room for another, those go that were asked for longest ago."""
        data = self._held.pop(place, None)
        if data is None:
            room = KEPT - self._indexes[place].length
            while self._held and sum(map(len, self._held.values())) > room:
                del self._held[next(iter(self._held))]
            data = self.shards[place].whole(self._indexes[place])
        self._held[place] = data
        return data

    def _picture(self, members: Sequence[Member], picture: Callable[[Member], Picture], value: Any, where: str) -> Picture:
        """What a record calls a picture: a member of its own by name, extension or base name, else what lies in the folder of pictures or in the record itself."""
        name = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
        if not isinstance(name, str):
            return self._beyond(value, where)
        spellings = [{member.name: member for member in members}, {member.extension: member for member in members}, {member.base: member for member in members}]
        for known, spelling in zip(spellings, (name.removeprefix("./"), name.lower(), name.rpartition("/")[2]), strict=True):
            if spelling in known:
                return picture(known[spelling])
        if self.source.images is None and not ADDRESS.match(name):
            raise DataError(
                f"{where}: no member is the picture {name[:80]!r}",
                kind="missing picture",
                got=f"the members {', '.join(member.base for member in members)}",
                cure="name a member or its extension; or set `images` to the folder of pictures that are no members",
            )
        return self._beyond(value, where)


def _is_picture(member: Member) -> bool:
    return member.extension.rpartition(".")[2] in PICTURES


def _record(members: Sequence[Member], where: str, read: Callable[[Member], bytes]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """A sample's record, and what should be counted of how it was found."""
    known = {member.extension: member for member in members}
    first, *others = (known[extension] for extension in RECORDS if extension in known)
    record = _content(first, where, read)
    if others and not (isinstance(record, Mapping) and (form_of(record) or refused_key(record))):
        return _content(others[0], where, read), ("caption beside metadata",)
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {first.base} is not an object", kind="not JSON", got=type(record).__name__, expected="an object with `conversations` or `messages`")
    return record, ()


def _content(member: Member, where: str, read: Callable[[Member], bytes]) -> Any:
    if member.size > LARGEST_RECORD:
        raise DataError(f"{where}: {member.base} is too large for a record", kind="too large", got=f"{member.size:,} bytes", expected=f"at most {LARGEST_RECORD:,}")
    try:
        text = read(member).decode("utf-8-sig")
        return parsed(text, f"{where}: {member.base}") if member.extension == "json" else {"caption": text.strip()}
    except UnicodeDecodeError as error:
        cure = "re-save it as UTF-8; encodings are not guessed"
        raise DataError(
            f"{where}: {member.base} is not UTF-8 at byte {error.start}", kind="not JSON", got=f"0x{error.object[error.start]:02x}, {error.reason}", cure=cure
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: {member.base} is not JSON at line {error.lineno} column {error.colno}", kind="not JSON", got=error.msg, cure="mend it, or `on_bad: skip`"
        ) from None


def _names_pictures(record: Mapping[str, Any]) -> bool:
    """Whether a record says which pictures it has: under `image` or `images`, or within the parts of a message."""
    if record.get("image") is not None or record.get("images") is not None:
        return True
    messages = record.get("messages")
    contents = [row.get("content") for row in messages if isinstance(row, Mapping)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    return any(part.get(key) is not None for part in parts for key in ("image", "path", "url", "image_url"))


def _warnings(shards: Sequence[Shard], indexes: Sequence[ShardIndex], stream: bool) -> Iterator[str]:
    if empty := [shard.name for shard, index in zip(shards, indexes, strict=True) if not len(index) and not index.junk and not index.lost]:
        yield f"{_count(len(empty), 'shard')} without members: {_listed(empty, len(empty))}"
    junk: dict[str, tuple[int, list[str]]] = {}
    for shard, index in zip(shards, indexes, strict=True):
        found = dict(index.junk)
        for key, reason in index.lost:
            count, named = found.get(reason, (0, []))
            found[reason] = count + 1, [*named, key]
        for reason, (count, named) in found.items():
            before, others = junk.get(reason, (0, []))
            junk[reason] = before + count, [*others, *(f"{name} in {shard.name}" for name in named)][:NAMED]
    for reason, (count, named) in junk.items():
        yield f"{count:,} left out, {reason}: {_listed(named, count)}"
    if crowded := [f"{key} in {shard.name}" for shard, index in zip(shards, indexes, strict=True) for key in _crowded(index)]:
        count = "1 caption is" if len(crowded) == 1 else f"{len(crowded):,} captions are"
        yield f"{count} learnt of several pictures together; take those that are no part of it out of the shards, or name the others in a json: {_listed(crowded, len(crowded))}"
    if unkept := [(shard.name, shard.unkept) for shard in shards if shard.unkept]:
        yield f"{_count(len(unkept), 'index')} could not be kept beside the shards and will be made at every start: {_listed([f'{name} ({reason})' for name, reason in unkept], len(unkept))}"
    largest = sum(sorted((index.length for index in indexes), reverse=True)[: WINDOW + 1])
    if stream and largest > KEPT:
        yield f"{WINDOW + 1} shards in use may take {largest:,} bytes, and {KEPT:,} are kept: shards will be read again and again; write smaller ones"


def _crowded(index: ShardIndex) -> Iterator[str]:
    """Keys of the samples whose text, without a json, is the caption of several pictures. Told by names alone, and quickly for what has a json."""
    for sample in np.flatnonzero(np.diff(index.starts) > 2).tolist():
        if b".json" not in index.names_of(sample).lower() and sum(map(_is_picture, members := index.members(sample))) > 1:
            yield members[0].key


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what.removesuffix('ex')}{'ices' if what.endswith('ex') else 's'}"


def _listed(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:NAMED]) + (f" and {count - min(NAMED, len(names)):,} more" if count > min(NAMED, len(names)) else "")
