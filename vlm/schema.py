"""From annotations to typed instances: what a dataclass says may stand where, plain data -> its instance, and back. All problems are found before any is raised.

A field's metadata say what may stand there: `{"group": G, "registry": R}` a part that `use:` names (`"key"`: another word for that), or on a mapping such parts by name;
`{"group": G}` alone a file of configs/G; `{"bare": K}` a dataclass whose bare name N means `{K: N}`. Three fields mean the same in every schema, see LANGUAGE.
"""

import dataclasses
import difflib
import importlib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlm.errors import ConfigurationError, VLMError
from vlm.registry import Registry

__all__ = ["FAILED", "REMOVED", "ConfigurationProblems", "Keys", "Mark", "Report", "Slot", "build", "from_plain", "nearest", "number", "to_plain"]

LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    "stages": {"group": "stage", "every": "every_stage"},  # what stands under `every_stage` lies below each stage
    "train": {"rates": True},  # a tree of rates: a number N counts as {rest: N} where it meets a mapping
    "then": {"chain": True},  # of a part: the next part of the same registry
}


class ConfigurationProblems(ConfigurationError):
    """Everything that is wrong with a configuration and what it names. problems: one error each, in the order in which they were found."""

    def __init__(self, problems: Sequence[VLMError], where: str):
        self.problems, self.where = list(problems), where
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in {where}", *(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))]))

    def __reduce__(self) -> Any:
        return type(self), (self.problems, self.where)


def from_plain(schema: type | Registry, mapping: Mapping[str, Any]) -> Any:
    """An instance from what `to_plain` gave. schema: a dataclass, or the registry of a part that says `use:`.

    Safe for what others wrote: no file is read, and `base:` and `import:` are unknown keys. Raises ConfigurationProblems.
    """
    report = Report()
    slot = Slot(registry=schema) if isinstance(schema, Registry) else Slot(schema)
    built = build(slot, mapping, (), report)
    report.stop(schema.axis if isinstance(schema, Registry) else schema.__name__)
    return built


def to_plain(spec: Any) -> dict[str, Any]:
    """A Spec as plain data (what YAML and JSON can hold), with the name under which it is registered."""
    return _plain(spec, "use")


def _plain(value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(value):
        own = {f.name: _plain(getattr(value, f.name), f.metadata.get("key", "use")) for f in dataclasses.fields(value) if f.init}
        name = getattr(value, "use", None)
        return {key: name, **own} if isinstance(name, str) else own
    if isinstance(value, Mapping):
        return {k: _plain(v, key) for k, v in value.items()}
    return [_plain(v, key) for v in value] if isinstance(value, (list, tuple)) else value


# ---- what may stand where --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """What may stand at one place, read from a field's annotation and metadata. implied: name of the entry, which is the part's where `use:` is absent."""

    type: Any = Any
    group: str | None = None
    registry: Registry | None = None
    key: str = "use"
    implied: str | None = None
    bare: str | None = None
    rates: bool = False
    every: str | None = None
    required: bool = True
    default: Any = None

    @property
    def entry_type(self) -> Any:
        """Annotation of a mapping's values; None where this is no mapping."""
        return (get_args(self.type) or (str, Any))[1] if _is_mapping(self.type) else None

    @property
    def named(self) -> bool:
        """A mapping of parts or dataclasses by name; `null` takes an entry away."""
        return self.entry_type is not None and (self.registry is not None or dataclasses.is_dataclass(self.entry_type))

    @property
    def whole(self) -> bool:
        """A place that a file of the group fills."""
        return self.group is not None and not self.named

    def entry(self, name: str) -> "Slot":
        """The slot of a mapping's value."""
        if not self.named:
            return Slot(self.entry_type)
        return replace(self, type=self.entry_type, every=None, implied=name if self.registry and self.key == "use" else None)

    def part(self, value: Mapping[str, Any]) -> Any:
        """Name of the part that a mapping describes."""
        return value.get(self.key, self.implied)

    def fields(self, value: Mapping[str, Any]) -> "dict[str, Slot]":
        """Key -> slot, as far as the kind of `value` is known."""
        if self.registry:
            try:
                return _slots(self.registry.get(self.part(value)), self)
            except (ConfigurationError, TypeError):  # the builder says what is wrong
                return {}
        kind = next((t for t in (self.type, *get_args(self.type)) if dataclasses.is_dataclass(t)), None)
        return _slots(kind) if kind and not self.named else {}

    def child(self, value: Mapping[str, Any], key: str) -> "Slot":
        """The slot below `key` of a mapping `value`; one that takes anything where the key is unknown."""
        if self.rates:
            return self
        if self.entry_type is not None:
            return self.entry(key)
        slots = self.fields(value)
        below = [slot.entry(key) for slot in slots.values() if slot.every == key]
        return below[0] if below else slots.get(key, Slot())


def _slots(kind: Any, holder: Slot | None = None) -> dict[str, Slot]:
    """Field -> slot of a dataclass. holder: the slot of the part that it is."""
    hints = get_type_hints(kind)
    return {f.name: _slot(f, hints[f.name], holder) for f in dataclasses.fields(kind) if f.init}


def _slot(f: "dataclasses.Field[Any]", annotation: Any, holder: Slot | None) -> Slot:
    meta = {**LANGUAGE.get(f.name, {}), **f.metadata}
    registry = meta.get("registry")
    if isinstance(registry, str):
        registry = next(value for value in vars(importlib.import_module(registry)).values() if isinstance(value, Registry))
    required = f.default is MISSING and f.default_factory is MISSING
    slot = Slot(annotation, meta.get("group"), registry, meta.get("key", "use"), bare=meta.get("bare"), required=required, default=None if f.default is MISSING else f.default)
    if meta.get("chain") and holder:
        return replace(slot, group=holder.group, registry=holder.registry, key=holder.key)
    mapping = _is_mapping(annotation)
    return replace(slot, rates=mapping and meta.get("rates", False), every=meta.get("every") if mapping else None, group=slot.group if mapping or "every" not in meta else None)


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


# ---- what is found wrong ---------------------------------------------------------------------------------------------


class Mark:
    """Stands in a tree where no value is."""


FAILED = Mark()
"""What should stand here is wrong, and that is written down."""
REMOVED = Mark()
"""`null` took away what stood here."""
Keys = tuple[str, ...]


class Report:
    """Problems, each under the full path of its key and the place where that was written."""

    def __init__(self) -> None:
        self.problems: dict[str, ConfigurationError] = {}
        self.origins: dict[Keys, str] = {}
        self.lifted: dict[Keys, Keys] = {}  # path in a stage -> path under `every_stage` where its value was written

    def add(self, path: Keys, what: str, *, got: object = None, expected: object = None, cure: str | None = None) -> Mark:
        """Write a problem down, once; gives FAILED, to stand where a value would."""
        path = self.written(path)
        origin = next((f" ({self.origins[path[:end]]})" for end in range(len(path), 0, -1) if path[:end] in self.origins), "")
        error = ConfigurationError(f"{'.'.join(path)}{origin}: {what}" if path else what, got=got, expected=expected, cure=cure)
        self.problems.setdefault(str(error), error)
        return FAILED

    def written(self, path: Keys) -> Keys:
        """Where the user wrote what stands at `path`: there, or under `every_stage`."""
        return next((self.lifted[path[:end]] + path[end:] for end in range(len(path), 0, -1) if path[:end] in self.lifted), path)

    def refuse(self, path: Keys, error: ConfigurationError) -> Mark:
        """Another's problem, with the path in front."""
        return self.add(path, error.what, got=error.got, expected=error.expected, cure=error.cure)

    def stop(self, where: str) -> None:
        """Raises ConfigurationProblems where anything was found."""
        if self.problems:
            raise ConfigurationProblems(list(self.problems.values()), where)


def nearest(name: str, choices: Iterable[str], prefix: Keys = ()) -> str | None:
    """The cure of a name that was nearly right. prefix: the path in front of it."""
    near = difflib.get_close_matches(name, list(choices), 1)
    return f"did you mean {'.'.join((*prefix, near[0]))!r}?" if near else None


# ---- instances -------------------------------------------------------------------------------------------------------


def build(slot: Slot, raw: Any, path: Keys, report: Report) -> Any:
    """The value of a slot from plain data, or FAILED with the problems written down."""
    return _Builder(report).build(slot, raw, path)


@dataclass
class _Builder:
    report: Report

    def build(self, slot: Slot, raw: Any, path: Keys) -> Any:
        if raw is FAILED:
            return FAILED
        if raw is REMOVED:
            raw = None
        if slot.rates:
            return self._rates(raw if number(raw) is None else {"rest": raw}, path)
        if slot.named:
            return self._named(slot, raw, path)
        if slot.registry and (raw is not None or slot.required):
            return self._part(slot, slot.registry, raw, path)
        return self._typed(slot.type, raw, path)

    def _named(self, slot: Slot, raw: Any, path: Keys) -> Any:
        if not isinstance(raw, Mapping):
            return self._wrong(path, raw, "a mapping by name")
        built: dict[str, Any] = {}
        for name, value in raw.items():
            if value is None:
                cure = f"leave {name!r} out, or write {{}} for its defaults"
                built[name] = self.report.add((*path, str(name)), "null takes it away, but there is nothing to take away", cure=cure)
            elif value is not REMOVED:
                built[name] = self.build(slot.entry(name), value, (*path, str(name)))
        return self._whole(built, path)

    def _part(self, slot: Slot, registry: Registry, raw: Any, path: Keys) -> Any:
        if not isinstance(raw, Mapping):
            return self._wrong(path, raw, f"a mapping whose `{slot.key}:` names a registered {registry.axis}")
        name = slot.part(raw)
        if not isinstance(name, str):
            return self.report.add(path, f"no `{slot.key}:` says which {registry.axis} it is", got=name, expected=f"one of {', '.join(registry.names())}", cure=f"set {slot.key}")
        try:
            kind = registry.get(name)
        except ConfigurationError as error:
            return self.report.refuse((*path, slot.key), error)
        return self._fill(kind, _slots(kind, slot), {key: value for key, value in raw.items() if key != slot.key}, path)

    def _fill(self, kind: type, slots: Mapping[str, Slot], raw: Mapping[Any, Any], path: Keys) -> Any:
        known = [*slots, *(slot.every for slot in slots.values() if slot.every)]
        for key in raw:
            if key not in slots:
                holder = self.report.written((*path, str(key)))[:-1]
                self.report.add((*path, str(key)), "there is no such key", expected=f"one of {', '.join(known)}", cure=nearest(str(key), known, holder))
        values: dict[str, Any] = {}
        for name, slot in slots.items():
            emptied = raw.get(name) is None or raw[name] is REMOVED
            if emptied and not slot.required and (name not in raw or _is_mapping(slot.type)):
                continue
            if name not in raw:
                values[name] = self.report.add((*path, name), "is missing", expected=f"a {slot.registry.axis}" if slot.registry else _say(slot.type))
            else:
                values[name] = self.build(slot, raw[name], (*path, name))
        if any(value is FAILED for value in values.values()):
            return FAILED
        try:
            return kind(**values)
        except ConfigurationError as error:
            return self.report.refuse(path, error)

    def _rates(self, raw: Any, path: Keys) -> Any:
        if isinstance(raw, Mapping):
            return self._whole({name: self._rates(value, (*path, str(name))) for name, value in raw.items() if value is not None and value is not REMOVED}, path)
        if raw is FAILED or raw == "frozen":
            return raw
        rate = number(raw)
        return self._wrong(path, raw, "a rate, `frozen`, or a mapping of them") if rate is None else rate

    def _typed(self, annotation: Any, raw: Any, path: Keys) -> Any:
        """A value of a type that needs no registry."""
        origin, args = get_origin(annotation) or annotation, get_args(annotation)
        if annotation is Any:
            return _copy(raw)
        if origin in (Union, types.UnionType):
            return self._union(args, raw, path)
        if origin is Literal:
            found = [arg for arg in args if type(arg) is type(raw) and arg == raw]
            return found[0] if found else self._wrong(path, raw, _say(annotation), nearest(str(raw), map(str, args)))
        if dataclasses.is_dataclass(annotation) and isinstance(raw, Mapping):
            return self._fill(origin, _slots(annotation), raw, path)
        if _is_mapping(annotation) and isinstance(raw, Mapping):
            return self._mapping((args or (str, Any))[1], raw, path)
        if origin in (list, tuple, Sequence) and isinstance(raw, (list, tuple)):
            return self._sequence(annotation, raw, path)
        if annotation is float and number(raw) is not None:
            return number(raw)
        if isinstance(origin, type) and isinstance(raw, origin) and (origin is bool or not isinstance(raw, bool)):
            return raw
        return self._wrong(path, raw, _say(annotation), f"quote it: '{raw}'" if annotation is str and isinstance(raw, (int, float)) else None)

    def _union(self, members: Sequence[Any], raw: Any, path: Keys) -> Any:
        structured = [member for member in members if _is_mapping(member) or dataclasses.is_dataclass(member)]
        if isinstance(raw, Mapping) and len(structured) == 1:
            return self._typed(structured[0], raw, path)
        for member in sorted(members, key=lambda member: type(raw) is not member):
            found = _Builder(Report())._typed(member, raw, path)
            if found is not FAILED:
                return found
        return self._wrong(path, raw, " or ".join(map(_say, members)))

    def _mapping(self, annotation: Any, raw: Mapping[Any, Any], path: Keys) -> Any:
        kept = raw if annotation is Any else {key: value for key, value in raw.items() if value is not None and value is not REMOVED}
        return self._whole({key: self.build(Slot(annotation), value, (*path, str(key))) for key, value in kept.items()}, path)

    def _sequence(self, annotation: Any, raw: Sequence[Any], path: Keys) -> Any:
        kind, args = get_origin(annotation) or annotation, get_args(annotation) or (Any, ...)
        fixed = kind is tuple and args[-1] is not Ellipsis
        if fixed and len(raw) != len(args):
            return self._wrong(path, raw, f"a list of {len(args)}: {', '.join(map(_say, args))}")
        built = [self.build(Slot(args[index if fixed else 0]), value, (*path, str(index))) for index, value in enumerate(raw)]
        if any(value is FAILED for value in built):
            return FAILED
        return built if kind is list else tuple(built)

    def _whole(self, built: dict[Any, Any], path: Keys) -> Any:
        """A mapping by name, if all of it was built."""
        for key in [key for key in built if not isinstance(key, str)]:
            built[key] = self._wrong(path, key, "names that are text", f"quote it: '{key}'")
        return FAILED if any(value is FAILED for value in built.values()) else built

    def _wrong(self, path: Keys, raw: Any, expected: str, cure: str | None = None) -> Any:
        return self.report.add(path, "wrong type or value", got="null" if raw is None else f"{raw!r} ({type(raw).__name__})", expected=expected, cure=cure)


def number(raw: Any) -> float | None:
    """A number, also one that YAML gave as text (`1e-3`)."""
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return float(raw)
    if isinstance(raw, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", raw):
        return float(raw)
    return None


def _copy(raw: Any) -> Any:
    """Plain data without marks."""
    if isinstance(raw, Mapping):
        return {key: _copy(value) for key, value in raw.items()}
    if isinstance(raw, (list, tuple)):
        return [_copy(value) for value in raw]
    return None if raw is REMOVED else raw


def _say(annotation: Any) -> str:
    """A type in words."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_say, args))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is type(None):
        return "null"
    if _is_mapping(annotation) or dataclasses.is_dataclass(annotation):
        return "a mapping"
    return "a list" if origin in (list, tuple, Sequence) else getattr(origin, "__name__", str(origin))
