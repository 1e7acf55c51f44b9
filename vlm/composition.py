"""YAML groups + `base:` + overrides -> dataclasses of a schema, and back. All problems are found before any is raised.

The schema steers it. A field's metadata say what may stand there: `{"group": G, "registry": R}` a part that `use:` names (`"key"`: another word for that), or on a mapping such
parts by name; `{"group": G}` alone a file of configs/G; `{"bare": K}` a dataclass whose bare name N means `{K: N}`. Three fields mean the same in every schema, see LANGUAGE.

A bare name or a mapping with `base:` names the whole, so it replaces what a lower layer wrote there; a changed `use:` does too. Everything else is merged key by key.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import re
import sys
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm.errors import ConfigurationError
from vlm.registry import Registry

__all__ = ["CONFIGS", "ConfigurationProblems", "compose", "from_plain", "resolved", "to_plain"]

T = TypeVar("T")

CONFIGS = Path(__file__).parent / "configs"

LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    "stages": {"group": "stage", "every": "every_stage"},  # what stands under `every_stage` lies below each stage
    "train": {"rates": True},  # a tree of rates: a number N counts as {rest: N} where it meets a mapping
    "then": {"chain": True},  # of a part: the next part of the same registry
}


class ConfigurationProblems(ConfigurationError):
    """Everything that is wrong with a configuration. problems: one ConfigurationError each, in the order in which they were found."""

    def __init__(self, problems: Sequence[ConfigurationError], where: str):
        self.problems, self.where = list(problems), where
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in {where}", *(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))]))

    def __reduce__(self) -> Any:
        return type(self), (self.problems, self.where)


def compose(schema: type[T], config: str | Path, overrides: Sequence[str] = (), *, configs: Path = CONFIGS) -> T:
    """The `schema` that a YAML and dot-list overrides describe.

    Args:
        config: a YAML file, or the name of one in configs/run. overrides: `a.b.c=value`, the value in YAML. configs: the folder of the groups.

    `${key}` takes another value of the run. Where that key is known but not set, the text stays: a string that holds "${" is one that waits for a value (`data_root`).
    Raises ConfigurationProblems.
    """
    report = _Report()
    layers = _Layers(configs, report)
    root = _Slot(schema, group="run")
    built = _FAILED
    tree = layers.merge(root, None, {"base": str(config)}, _Source("the command line"), ())
    if tree is not _FAILED:
        file = layers.find("run", str(config), _Source("the command line"))
        if file and "name" in root.fields({}):
            tree.setdefault("name", file.stem)
        for override in overrides:
            tree = layers.override(root, tree, override)
        layers.spread(root, tree)
        _interpolate(root, tree, report)
        built = _Builder(report).build(root, tree, ())
    report.stop(str(config))
    return built  # type: ignore[return-value]


def resolved(instance: Any) -> dict[str, Any]:
    """A run as plain data with its defaults written out; composing it again gives an equal instance.

    `import` names the modules that brought its parts, files by their absolute path. Not for checkpoints: `to_plain` leaves it out.
    """
    plain = to_plain(instance)
    root, present = _Slot(type(instance)), _present(plain)
    for _, holder, key in _texts(plain):
        if not _waits(root, present, holder[key]):
            holder[key] = holder[key].replace("${", "\\${")
    imports = sorted({_IMPORTED[kind.__module__] for kind in _kinds(instance) if kind.__module__ in _IMPORTED})
    return {"import": imports, **plain} if imports else plain


def from_plain(schema: type | Registry, mapping: Mapping[str, Any]) -> Any:
    """An instance from what `to_plain` gave. schema: a dataclass, or the registry of a part that says `use:`.

    Safe for what others wrote: no file is read, and `base:` and `import:` are unknown keys. Raises ConfigurationProblems.
    """
    report = _Report()
    slot = _Slot(registry=schema) if isinstance(schema, Registry) else _Slot(schema)
    built = _Builder(report).build(slot, mapping, ())
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


def _kinds(value: Any) -> Iterator[type]:
    """The dataclasses that an instance is made of."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from _kinds(inner)


# What may stand where


@dataclass(frozen=True)
class _Slot:
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

    def entry(self, name: str) -> "_Slot":
        if not self.named:
            return _Slot(self.entry_type)
        return replace(self, type=self.entry_type, every=None, implied=name if self.registry and self.key == "use" else None)

    def part(self, value: Mapping[str, Any]) -> Any:
        """Name of the part that a mapping describes."""
        return value.get(self.key, self.implied)

    def fields(self, value: Mapping[str, Any]) -> "dict[str, _Slot]":
        """Key -> slot, as far as the kind of `value` is known."""
        if self.registry:
            try:
                return _slots(self.registry.get(self.part(value)), self)
            except (ConfigurationError, TypeError):  # the builder says what is wrong
                return {}
        kind = next((t for t in (self.type, *get_args(self.type)) if dataclasses.is_dataclass(t)), None)
        return _slots(kind) if kind and not self.named else {}

    def child(self, value: Mapping[str, Any], key: str) -> "_Slot":
        if self.rates:
            return self
        if self.entry_type is not None:
            return self.entry(key)
        slots = self.fields(value)
        below = [slot.entry(key) for slot in slots.values() if slot.every == key]
        return below[0] if below else slots.get(key, _Slot())


def _slots(kind: Any, holder: _Slot | None = None) -> dict[str, _Slot]:
    """Field -> slot of a dataclass. holder: the slot of the part that it is."""
    hints = get_type_hints(kind)
    return {f.name: _slot(f, hints[f.name], holder) for f in dataclasses.fields(kind) if f.init}


def _slot(f: "dataclasses.Field[Any]", annotation: Any, holder: _Slot | None) -> _Slot:
    meta = {**LANGUAGE.get(f.name, {}), **f.metadata}
    registry = meta.get("registry")
    if isinstance(registry, str):
        registry = next(value for value in vars(importlib.import_module(registry)).values() if isinstance(value, Registry))
    required = f.default is MISSING and f.default_factory is MISSING
    slot = _Slot(annotation, meta.get("group"), registry, meta.get("key", "use"), bare=meta.get("bare"), required=required, default=None if f.default is MISSING else f.default)
    if meta.get("chain") and holder:
        return replace(slot, group=holder.group, registry=holder.registry, key=holder.key)
    mapping = _is_mapping(annotation)
    return replace(slot, rates=mapping and meta.get("rates", False), every=meta.get("every") if mapping else None, group=slot.group if mapping or "every" not in meta else None)


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


# What is found wrong


class _Mark:
    """A value that only composition knows."""


_FAILED = _Mark()  # the problem is written down
_REMOVED = _Mark()  # `null` took something away
Keys = tuple[str, ...]


class _Report:
    """Problems, each under the full path of its key and the place where that was written."""

    def __init__(self) -> None:
        self.problems: dict[str, ConfigurationError] = {}
        self.origins: dict[Keys, str] = {}
        self.lifted: dict[Keys, Keys] = {}  # path in a stage -> path under `every_stage` where its value was written

    def add(self, path: Keys, what: str, *, got: object = None, expected: object = None, cure: str | None = None) -> _Mark:
        path = self.written(path)
        origin = next((f" ({self.origins[path[:end]]})" for end in range(len(path), 0, -1) if path[:end] in self.origins), "")
        error = ConfigurationError(f"{'.'.join(path)}{origin}: {what}" if path else what, got=got, expected=expected, cure=cure)
        self.problems.setdefault(str(error), error)
        return _FAILED

    def written(self, path: Keys) -> Keys:
        """Where the user wrote what stands at `path`: there, or under `every_stage`."""
        return next((self.lifted[path[:end]] + path[end:] for end in range(len(path), 0, -1) if path[:end] in self.lifted), path)

    def refuse(self, path: Keys, error: ConfigurationError) -> _Mark:
        """Another's problem, with the path in front."""
        return self.add(path, error.what, got=error.got, expected=error.expected, cure=error.cure)

    def stop(self, where: str) -> None:
        if self.problems:
            raise ConfigurationProblems(list(self.problems.values()), where)


def _nearest(name: str, choices: Iterable[str], prefix: Keys = ()) -> str | None:
    near = difflib.get_close_matches(name, list(choices), 1)
    return f"did you mean {'.'.join((*prefix, near[0]))!r}?" if near else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("full_key:")[0].split())


# Layers: files, `base:`, overrides, `every_stage`


class _Whole(dict[Any, Any]):
    """A mapping that was named as a whole: it replaces what lies below."""


@dataclass(frozen=True)
class _Source:
    """Where a layer was written. chain: the files that lead to it."""

    name: str
    folder: Path | None = None
    chain: tuple[Path, ...] = ()


@dataclass
class _Layers:
    configs: Path
    report: _Report

    def merge(self, slot: _Slot, below: Any, above: Any, source: _Source | None, path: Keys) -> Any:
        """`above` laid on `below`, its names expanded first. source: None where that is done."""
        if source and path:
            self.report.origins[path] = source.name
        if isinstance(above, str) and slot.bare:
            above = {slot.bare: above}
        if isinstance(above, str) and slot.whole:
            above = {"base": above}
        if isinstance(above, Mapping) and "base" in above and slot.whole and source:
            below = self.base(slot, above["base"], source, path)
            above = {key: value for key, value in above.items() if key != "base"}
        elif isinstance(above, _Whole):
            below = _Whole()
        if below is _FAILED:
            return _FAILED
        if slot.rates and isinstance(below, Mapping) and _number(above) is not None:
            above = {"rest": above}
        if isinstance(above, Mapping):
            return self._merge_mappings(slot, below, above, source, path)
        return _REMOVED if above is None and below is not None else above

    def _merge_mappings(self, slot: _Slot, below: Any, above: Mapping[Any, Any], source: _Source | None, path: Keys) -> dict[Any, Any]:
        if slot.rates and isinstance(below, (int, float, str)):
            below = {"rest": below}
        merged = type(below)(below) if isinstance(below, dict) else {}
        key = slot.bare or (slot.key if slot.registry and not slot.named else None)
        if key in above and merged and above[key] != merged.get(key, slot.implied):
            merged.clear()
        known = {**merged, **above}
        for name, value in above.items():
            merged[name] = self.merge(slot.child(known, str(name)), merged.get(name), value, source, (*path, str(name)))
        return merged

    def base(self, slot: _Slot, name: Any, source: _Source, path: Keys) -> Any:
        """What a name stands for: a path, a file of the group, a registered part."""
        if not isinstance(name, str):
            return self.report.add(path, "`base:` takes one name", got=repr(name), expected="a path or a name")
        file = self.find(slot.group or "", name, source)
        if file:
            return self.load(slot, file, source, path)
        presets = sorted(preset.stem for preset in (self.configs / (slot.group or "")).glob("*.yaml"))
        expected = f"a YAML file, or one of configs/{slot.group}: {', '.join(presets) or '(none)'}"
        if slot.registry and not _is_path(name):
            try:
                slot.registry.get(name)
                return _Whole({slot.key: name})
            except ConfigurationError:
                presets += slot.registry.names()
                expected += f"; or a registered {slot.registry.axis}: {', '.join(slot.registry.names())}"
        return self.report.add(path, f"there is no file {name!r}" if _is_path(name) else f"nothing is called {name!r}", expected=expected, cure=_nearest(name, presets))

    def find(self, group: str, name: str, source: _Source) -> Path | None:
        """The file that a name means: a path from the file that says it or from the working directory, else configs/GROUP/NAME.yaml."""
        folders = [folder for folder in (source.folder, Path.cwd()) if folder]
        places = [folder / Path(name).expanduser() for folder in folders] if _is_path(name) else [self.configs / group / f"{name}.yaml"]
        return next((place.resolve() for place in places if place.is_file()), None)

    def load(self, slot: _Slot, file: Path, source: _Source, path: Keys) -> Any:
        """A file's content, its `import:` done and its `base:` below it."""
        chain = (*source.chain, file)
        if file in source.chain:
            return self.report.add(path, "`base:` goes round", got=" -> ".join(map(str, chain)), cure="take one of them out")
        try:
            content = OmegaConf.to_container(OmegaConf.load(file))
        except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
            return self.report.add(path, f"{file} cannot be read: {_one_line(error)}", cure="mend the YAML")
        if not isinstance(content, dict):
            return self.report.add(path, f"{file} holds no mapping", got=type(content).__name__, expected="lines of `key: value`")
        inside = _Source(str(file), file.parent, chain)
        modules = content.pop("import", None) or ()
        for entry in [modules] if isinstance(modules, str) else modules:
            try:
                _import(str(entry), file.parent)
            except ConfigurationError as error:
                self.report.origins["import",] = inside.name
                self.report.refuse(("import",), error)
        merged = self.merge(slot, None, content, inside, path)
        return merged if merged is _FAILED else _Whole(merged)

    def override(self, root: _Slot, tree: Any, text: str) -> Any:
        """The tree with `a.b.c=value` laid on it."""
        dotted, equals, value = text.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            self.report.add((), f"the override {text!r} cannot be read", expected="a.b.c=value")
            return tree
        if path[0] in ("base", "import"):
            self.report.add((), f"{path[0]!r} cannot be set on the command line", cure="write a YAML file that says it")
            return tree
        try:
            nested: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index,call-overload]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            self.report.add((), f"the override {text!r} cannot be read: {_one_line(error)}", cure="quote the value")
            return tree
        for key in reversed(path):
            nested = {key: nested}
        return tree if self._creates_stage(root, tree, nested) else self.merge(root, tree, nested, _Source("command line"), ())

    def _creates_stage(self, root: _Slot, tree: Mapping[str, Any], nested: Mapping[str, Any]) -> bool:
        created = False
        for name in [name for name, slot in root.fields({}).items() if slot.every and isinstance(nested.get(name), Mapping)]:
            stages = tree.get(name)
            known = [stage for stage, content in stages.items() if content is not _REMOVED] if isinstance(stages, Mapping) else []
            for stage in [stage for stage in nested[name] if stage not in known]:
                created = True
                self.report.origins[name, stage] = "command line"
                self.report.add((name, stage), "the command line cannot create a stage", expected=f"one of {', '.join(known)}", cure=_nearest(stage, known, (name,)))
        return created

    def spread(self, root: _Slot, tree: dict[str, Any]) -> None:
        """Lay every stage on `every_stage`, and take that off."""
        for name, slot in root.fields({}).items():
            every = tree.pop(slot.every, None) if slot.every else None
            stages = tree.get(name)
            if not isinstance(every, Mapping) or not isinstance(stages, dict):
                continue
            for stage, content in stages.items():
                if isinstance(content, Mapping):
                    self._lift(every, content, (name, stage), (str(slot.every),))
                    stages[stage] = self.merge(slot.entry(stage), dict(every), dict(content), None, (name, stage))

    def _lift(self, every: Mapping[str, Any], stage: Mapping[str, Any], path: Keys, written: Keys) -> None:
        """Remember what a stage has from `every_stage`, so that a problem is reported where it can be mended, and once."""
        for key, value in every.items():
            if key not in stage:
                self.report.lifted[*path, key] = (*written, key)
            elif isinstance(value, Mapping) and isinstance(stage[key], Mapping):
                self._lift(value, stage[key], (*path, key), (*written, key))


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


_IMPORTED: dict[str, str] = {}
"""Module -> the `import:` entry that brought it."""


def _import(entry: str, folder: Path) -> None:
    """A module by name, or a file ./parts.py from `folder`; each is loaded once per process.

    Raises ConfigurationError where there is none; what it raises itself goes through: a traceback of the user's own code says more.
    """
    before = set(sys.modules)
    if entry.endswith(".py"):
        file = (folder / Path(entry).expanduser()).resolve()
        entry, name = str(file), f"vlm_import_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
        if not file.is_file():
            raise ConfigurationError(f"there is no file {file}", cure="give the path from the YAML that says it")
        if name not in sys.modules:
            _load_file(name, file)
    else:
        name = entry
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigurationError(f"there is no module {error.name!r}", cure="install it, or give a file: ./parts.py") from error
    for module in {name} | set(sys.modules) - before:
        if not module.startswith("vlm."):
            _IMPORTED.setdefault(module, entry)


def _load_file(name: str, file: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


# Interpolation


_REFERENCE = re.compile(r"(?<!\\)\$\{([\w.]+)\}")


def _interpolate(root: _Slot, tree: dict[str, Any], report: _Report) -> None:
    """Replace, in place, every `${key}` but those whose key is not set."""
    present = {**{name: slot.default for name, slot in root.fields({}).items() if isinstance(slot.default, (str, int, float))}, **_present(tree)}
    config = OmegaConf.create(present)
    for path, holder, key in _texts(tree):
        text = holder[key]
        if _waits(root, present, text):
            continue
        try:
            node: Any = config
            for step in path:
                node = node[step]
            holder[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            missing = [name for name in _REFERENCE.findall(text) if OmegaConf.select(config, name, throw_on_resolution_failure=False) is None]
            near = _nearest(missing[0], root.fields({})) if missing else None
            holder[key] = report.add(tuple(map(str, path)), f"{text!r} cannot be resolved: {_one_line(error)}", cure=near)


def _waits(root: _Slot, present: Mapping[str, Any], text: str, seen: Keys = ()) -> bool:
    """Whether a text names a key of the run that has no value."""
    for reference in _REFERENCE.findall(text):
        slot, value, known = root, present, reference not in seen
        for key in reference.split("."):
            inside: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
            known = known and (key in inside or key in slot.fields(inside))
            slot, value = slot.child(inside, key), inside.get(key)
        if known and (value is None or (isinstance(value, str) and _waits(root, present, value, (*seen, reference)))):
            return True
    return False


def _texts(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """(path, holder, key) of every text with an interpolation."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, (dict, list)):
            yield from _texts(value, (*path, key))
        elif isinstance(value, str) and "${" in value:
            yield (*path, key), tree, key


def _present(value: Any) -> Any:
    """A copy without what is null or marked."""
    if isinstance(value, Mapping):
        return {key: _present(inner) for key, inner in value.items() if inner is not None and not isinstance(inner, _Mark)}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


# Dataclasses from the tree


@dataclass
class _Builder:
    report: _Report

    def build(self, slot: _Slot, raw: Any, path: Keys) -> Any:
        """The value of a slot, or _FAILED with the problem written down."""
        if raw is _FAILED:
            return _FAILED
        if raw is _REMOVED:
            raw = None
        if slot.rates:
            return self._rates(raw if _number(raw) is None else {"rest": raw}, path)
        if slot.named:
            return self._named(slot, raw, path)
        if slot.registry and (raw is not None or slot.required):
            return self._part(slot, slot.registry, raw, path)
        return self._typed(slot.type, raw, path)

    def _named(self, slot: _Slot, raw: Any, path: Keys) -> Any:
        if not isinstance(raw, Mapping):
            return self._wrong(path, raw, "a mapping by name")
        built: dict[str, Any] = {}
        for name, value in raw.items():
            if value is None:
                cure = f"leave {name!r} out, or write {{}} for its defaults"
                built[name] = self.report.add((*path, str(name)), "null takes it away, but there is nothing to take away", cure=cure)
            elif value is not _REMOVED:
                built[name] = self.build(slot.entry(name), value, (*path, str(name)))
        return self._whole(built, path)

    def _part(self, slot: _Slot, registry: Registry, raw: Any, path: Keys) -> Any:
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

    def _fill(self, kind: type, slots: Mapping[str, _Slot], raw: Mapping[Any, Any], path: Keys) -> Any:
        known = [*slots, *(slot.every for slot in slots.values() if slot.every)]
        for key in raw:
            if key not in slots:
                holder = self.report.written((*path, str(key)))[:-1]
                self.report.add((*path, str(key)), "there is no such key", expected=f"one of {', '.join(known)}", cure=_nearest(str(key), known, holder))
        values: dict[str, Any] = {}
        for name, slot in slots.items():
            emptied = raw.get(name) is None or raw[name] is _REMOVED
            if emptied and not slot.required and (name not in raw or _is_mapping(slot.type)):
                continue
            if name not in raw:
                values[name] = self.report.add((*path, name), "is missing", expected=f"a {slot.registry.axis}" if slot.registry else _say(slot.type))
            else:
                values[name] = self.build(slot, raw[name], (*path, name))
        if any(value is _FAILED for value in values.values()):
            return _FAILED
        try:
            return kind(**values)
        except ConfigurationError as error:
            return self.report.refuse(path, error)

    def _rates(self, raw: Any, path: Keys) -> Any:
        if isinstance(raw, Mapping):
            return self._whole({name: self._rates(value, (*path, str(name))) for name, value in raw.items() if value is not None and value is not _REMOVED}, path)
        number = _number(raw)
        if raw is _FAILED or raw == "frozen":
            return raw
        return self._wrong(path, raw, "a rate, `frozen`, or a mapping of them") if number is None else number

    def _typed(self, annotation: Any, raw: Any, path: Keys) -> Any:
        """A value of a type that needs no registry."""
        origin, args = get_origin(annotation) or annotation, get_args(annotation)
        if annotation is Any:
            return _copy(raw)
        if origin in (Union, types.UnionType):
            return self._union(args, raw, path)
        if origin is Literal:
            found = [arg for arg in args if type(arg) is type(raw) and arg == raw]
            return found[0] if found else self._wrong(path, raw, _say(annotation), _nearest(str(raw), map(str, args)))
        if dataclasses.is_dataclass(annotation) and isinstance(raw, Mapping):
            return self._fill(origin, _slots(annotation), raw, path)
        if _is_mapping(annotation) and isinstance(raw, Mapping):
            return self._mapping((args or (str, Any))[1], raw, path)
        if origin in (list, tuple, Sequence) and isinstance(raw, (list, tuple)):
            return self._sequence(annotation, raw, path)
        if annotation is float and _number(raw) is not None:
            return _number(raw)
        if isinstance(origin, type) and isinstance(raw, origin) and (origin is bool or not isinstance(raw, bool)):
            return raw
        return self._wrong(path, raw, _say(annotation), f"quote it: '{raw}'" if annotation is str and isinstance(raw, (int, float)) else None)

    def _union(self, members: Sequence[Any], raw: Any, path: Keys) -> Any:
        structured = [member for member in members if _is_mapping(member) or dataclasses.is_dataclass(member)]
        if isinstance(raw, Mapping) and len(structured) == 1:
            return self._typed(structured[0], raw, path)
        for member in sorted(members, key=lambda member: type(raw) is not member):
            found = _Builder(_Report())._typed(member, raw, path)
            if found is not _FAILED:
                return found
        return self._wrong(path, raw, " or ".join(map(_say, members)))

    def _mapping(self, annotation: Any, raw: Mapping[Any, Any], path: Keys) -> Any:
        kept = raw if annotation is Any else {key: value for key, value in raw.items() if value is not None and value is not _REMOVED}
        return self._whole({key: self.build(_Slot(annotation), value, (*path, str(key))) for key, value in kept.items()}, path)

    def _sequence(self, annotation: Any, raw: Sequence[Any], path: Keys) -> Any:
        kind, args = get_origin(annotation) or annotation, get_args(annotation) or (Any, ...)
        fixed = kind is tuple and args[-1] is not Ellipsis
        if fixed and len(raw) != len(args):
            return self._wrong(path, raw, f"a list of {len(args)}: {', '.join(map(_say, args))}")
        built = [self.build(_Slot(args[index if fixed else 0]), value, (*path, str(index))) for index, value in enumerate(raw)]
        if any(value is _FAILED for value in built):
            return _FAILED
        return built if kind is list else tuple(built)

    def _whole(self, built: dict[Any, Any], path: Keys) -> Any:
        """A mapping by name, if all of it was built."""
        for key in [key for key in built if not isinstance(key, str)]:
            built[key] = self._wrong(path, key, "names that are text", f"quote it: '{key}'")
        return _FAILED if any(value is _FAILED for value in built.values()) else built

    def _wrong(self, path: Keys, raw: Any, expected: str, cure: str | None = None) -> Any:
        return self.report.add(path, "wrong type or value", got="null" if raw is None else f"{raw!r} ({type(raw).__name__})", expected=expected, cure=cure)


def _number(raw: Any) -> float | None:
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
    return None if raw is _REMOVED else raw


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
