"""YAML layers -> a run: groups, `base:`, `use:`, overrides, `every_stage`, `import:`, interpolation. schema.py makes instances of the result.

A bare name or a mapping with `base:` names the whole, so it replaces what a lower layer wrote there; a changed `use:` does too. Everything else is merged key by key.
"""

import dataclasses
import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm.errors import ConfigurationError
from vlm.schema import FAILED, REMOVED, ConfigurationProblems, Keys, Mark, Report, Slot, build, from_plain, nearest, number, to_plain

__all__ = ["CONFIGS", "ConfigurationProblems", "compose", "from_plain", "import_parts", "resolved", "to_plain"]

T = TypeVar("T")

CONFIGS = Path(__file__).parent / "configs"


def compose(schema: type[T], config: str | Path, overrides: Sequence[str] = (), *, configs: Path = CONFIGS, allow_import: bool = True) -> T:
    """The `schema` that a YAML and dot-list overrides describe.

    Args:
        config: a YAML file, or the name of one in configs/run. overrides: `a.b.c=value`, the value in YAML. configs: the folder of the groups.
        allow_import: False for a YAML that others may have written (a run's folder): its `import:` is not followed, so parts of one's own must be known already (import_parts).

    `${key}` takes another value of the run. Where that key is known but not set, the text stays: a string that holds "${" is one that waits for a value (`data_root`).
    Raises ConfigurationProblems.
    """
    report = Report()
    layers = _Layers(configs, report, allow_import)
    root, caller = Slot(schema, group="run"), _Source("the command line")
    built: Any = FAILED
    tree = layers.merge(root, None, {"base": str(config)}, caller, ())
    if tree is not FAILED:
        file = layers.find("run", str(config), caller)
        if file and "name" in root.fields({}):
            tree.setdefault("name", file.stem)
        for override in overrides:
            tree = layers.override(root, tree, override)
        layers.spread(root, tree)
        layers.refuse_idle(overrides)
        _interpolate(root, tree, report)
        built = build(root, tree, (), report)
    if report.problems and layers.withheld:
        cure = "if you trust that code, import it before: `vlm --import FILE ...`, or `import` in Python"
        report.add((), f"{config} is data, so the code that its `import:` names was not run", got=", ".join(layers.withheld), cure=cure)
    report.stop(str(config))
    return built


def resolved(instance: Any) -> dict[str, Any]:
    """A run as plain data with its defaults written out; composing it again gives an equal instance.

    `import` names the modules that brought its parts, files by their absolute path, for whoever composes it as a configuration of their own. Not for checkpoints: `to_plain` leaves it out.
    """
    plain = to_plain(instance)
    root, present = Slot(type(instance)), _present(plain)
    for _, holder, key in _texts(plain):
        if not _waits(root, present, holder[key]):
            holder[key] = holder[key].replace("${", "\\${")
    imports = sorted({_IMPORTED[kind.__module__] for kind in _kinds(instance) if kind.__module__ in _IMPORTED})
    return {"import": imports, **plain} if imports else plain


def _kinds(value: Any) -> Iterator[type]:
    """The dataclasses that an instance is made of."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from _kinds(inner)


# ---- layers ----------------------------------------------------------------------------------------------------------


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
    """Reads and merges. withheld: `import:` entries that were not followed. idle: `every_stage` -> what each stage says itself."""

    configs: Path
    report: Report
    allow_import: bool
    withheld: list[str] = field(default_factory=list)
    idle: dict[str, dict[str, Mapping[Any, Any]]] = field(default_factory=dict)

    def merge(self, slot: Slot, below: Any, above: Any, source: _Source | None, path: Keys) -> Any:
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
        if below is FAILED:
            return FAILED
        if slot.rates and isinstance(below, Mapping) and number(above) is not None:
            above = {"rest": above}
        if isinstance(above, Mapping):
            return self._merge_mappings(slot, below, above, source, path)
        return REMOVED if above is None and below is not None else above

    def _merge_mappings(self, slot: Slot, below: Any, above: Mapping[Any, Any], source: _Source | None, path: Keys) -> dict[Any, Any]:
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

    def base(self, slot: Slot, name: Any, source: _Source, path: Keys) -> Any:
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
        return self.report.add(path, f"there is no file {name!r}" if _is_path(name) else f"nothing is called {name!r}", expected=expected, cure=nearest(name, presets))

    def find(self, group: str, name: str, source: _Source) -> Path | None:
        """The file that a name means: a path from the file that says it or from the working directory, else configs/GROUP/NAME.yaml."""
        folders = [folder for folder in (source.folder, Path.cwd()) if folder]
        places = [folder / Path(name).expanduser() for folder in folders] if _is_path(name) else [self.configs / group / f"{name}.yaml"]
        return next((place.resolve() for place in places if place.is_file()), None)

    def load(self, slot: Slot, file: Path, source: _Source, path: Keys) -> Any:
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
        self._import([modules] if isinstance(modules, str) else modules, inside)
        merged = self.merge(slot, None, content, inside, path)
        return merged if merged is FAILED else _Whole(merged)

    def _import(self, entries: Iterable[Any], source: _Source) -> None:
        for entry in map(str, entries):
            try:
                if self.allow_import:
                    import_parts([entry], source.folder)
                else:
                    self.withheld.append(entry)
            except ConfigurationError as error:
                self.report.origins["import",] = source.name
                self.report.refuse(("import",), error)

    def override(self, root: Slot, tree: Any, text: str) -> Any:
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

    def _creates_stage(self, root: Slot, tree: Mapping[str, Any], nested: Mapping[str, Any]) -> bool:
        created = False
        for name in [name for name, slot in root.fields({}).items() if slot.every and isinstance(nested.get(name), Mapping)]:
            stages = tree.get(name)
            known = [stage for stage, content in stages.items() if content is not REMOVED] if isinstance(stages, Mapping) else []
            for stage in [stage for stage in nested[name] if stage not in known]:
                created = True
                self.report.origins[name, stage] = "command line"
                self.report.add((name, stage), "the command line cannot create a stage", expected=f"one of {', '.join(known)}", cure=nearest(stage, known, (name,)))
        return created

    def spread(self, root: Slot, tree: dict[str, Any]) -> None:
        """Lay every stage on `every_stage`, and take that off."""
        for name, slot in root.fields({}).items():
            every = tree.pop(slot.every, None) if slot.every else None
            stages = tree.get(name)
            if slot.every and isinstance(stages, dict):
                self.idle[slot.every] = {stage: dict(content) for stage, content in stages.items() if isinstance(content, Mapping)}
            if not isinstance(every, Mapping) or not isinstance(stages, dict):
                continue
            for stage, content in stages.items():
                if isinstance(content, Mapping):
                    self._lift(every, content, (name, stage), (str(slot.every),))
                    stages[stage] = self.merge(slot.entry(stage), dict(every), dict(content), None, (name, stage))

    def refuse_idle(self, overrides: Sequence[str]) -> None:
        """An override of `every_stage` that no stage takes, because each has a value of its own, would do nothing without a word."""
        for keys in (tuple(override.partition("=")[0].strip().split(".")) for override in overrides):
            if keys[0] not in self.idle or len(keys) < 2:
                continue
            stages = self.idle[keys[0]]
            if stages and all(_has(stage, keys[1:]) for stage in stages.values()):
                cure = f"override {' and '.join('.'.join(('stages', name, *keys[1:])) for name in stages)}"
                self.report.origins[keys] = "command line"
                self.report.add(keys, "this override changes nothing: every stage has a value of its own", cure=cure)

    def _lift(self, every: Mapping[str, Any], stage: Mapping[str, Any], path: Keys, written: Keys) -> None:
        """Remember what a stage has from `every_stage`, so that a problem is reported where it can be mended, and once."""
        for key, value in every.items():
            if key not in stage:
                self.report.lifted[*path, key] = (*written, key)
            elif isinstance(value, Mapping) and isinstance(stage[key], Mapping):
                self._lift(value, stage[key], (*path, key), (*written, key))


def _has(content: Any, keys: Keys) -> bool:
    for key in keys:
        if not isinstance(content, Mapping):
            return True  # a bare name or number stands for the whole mapping
        if key not in content:
            return False
        content = content[key]
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("full_key:")[0].split())


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


# ---- code of one's own ------------------------------------------------------------------------------------------------


_IMPORTED: dict[str, str] = {}
"""Module -> the `import:` entry that brought it."""


def import_parts(entries: Iterable[str], folder: Path | None = None) -> None:
    """Run modules that register parts: by name, or files ./parts.py from `folder` (default: the working directory). Each is loaded once per process.

    Raises ConfigurationError where there is none; what it raises itself goes through: a traceback of the user's own code says more.
    """
    for entry in entries:
        before = set(sys.modules)
        if entry.endswith(".py"):
            file = (folder or Path.cwd()).joinpath(Path(entry).expanduser()).resolve()
            entry, name = str(file), _load_file(file)
        else:
            name = _load_module(entry)
        for module in {name} | set(sys.modules) - before:
            if not module.startswith("vlm."):
                _IMPORTED.setdefault(module, entry)


def _load_module(name: str) -> str:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"there is no module {error.name!r}", cure="install it, or give a file: ./parts.py") from error
    return name


def _load_file(file: Path) -> str:
    """The name under which the file's module is kept."""
    if not file.is_file():
        raise ConfigurationError(f"there is no file {file}", cure="give the path from the YAML that says it, or on the command line from the working directory")
    name = f"vlm_import_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in sys.modules:
        return name
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return name


# ---- interpolation ---------------------------------------------------------------------------------------------------


_REFERENCE = re.compile(r"(?<!\\)\$\{([\w.]+)\}")


def _interpolate(root: Slot, tree: dict[str, Any], report: Report) -> None:
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
            near = nearest(missing[0], root.fields({})) if missing else None
            holder[key] = report.add(tuple(map(str, path)), f"{text!r} cannot be resolved: {_one_line(error)}", cure=near)


def _waits(root: Slot, present: Mapping[str, Any], text: str, seen: Keys = ()) -> bool:
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
        return {key: _present(inner) for key, inner in value.items() if inner is not None and not isinstance(inner, Mark)}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
