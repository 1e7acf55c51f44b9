"""The sections of a run's report that need no model: each takes what was written and gives its part of the page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm.eval.report_chart import POINTS, Chart, Curve
from vlm.eval.report_html import Html, Section, cell, note, table, tiles
from vlm.eval.report_run import Written

__all__ = ["EXAMPLES", "accuracy", "charts", "curves", "data", "head", "ledger", "machine", "speed", "warnings"]

EXAMPLES = 3
"""Bad samples of a kind that are shown; the others are counted."""


# ---- what ran --------------------------------------------------------------------------------------------------------------


def head(written: Written) -> list[Html]:
    """Name, state, parts and the few numbers that one looks for first."""
    run, steps = written.run, written.steps
    state, kind = ("finished", "state") if written.finished else ("not finished", "state open")
    first, last = written.when()
    seconds = sum(record["seconds"] for record in steps)
    trained = {stage: sum(row["parameters"] for row in rows if row["rate"] is not None) for stage, rows in written.ledgers.items()}
    facts: list[tuple[str, Any]] = [
        ("parameters", _short(written.parameters)),
        ("trained, at most", _short(max(trained.values(), default=None))),
        ("stages", len(run.stages)),
        ("steps", len(steps)),
        ("samples seen", sum(record["samples"] for record in steps)),
        ("tokens", _short(sum(record["tokens"] for record in steps))),
        ("time in steps", _time(seconds)),
    ]
    lines = [
        Html(f'<h1>{cell(run.name)} <span class="{kind}">{state}</span></h1>'),
        Html(f'<p class="parts">{_parts(written)}</p>'),
        Html(f'<p class="when">{_when(first, last)}, by the times of its files · seed {run.seed} · <code>{cell(written.folder)}</code></p>'),
        tiles(facts),
    ]
    return lines + [note(line, "warning") for line in _unfinished(written)]


def _when(first: datetime, last: datetime) -> str:
    start, end = f"{first.day} {first:%B %Y, %H:%M}", f"{last:%H:%M}"
    return f"{start} to {end}" if first.date() == last.date() else f"{start} to {last.day} {last:%B %Y}, {end}"


def _unfinished(written: Written) -> Iterator[Html]:
    """What a run has not come to, in sentences."""
    if written.finished:
        return
    for stage in written.run.stages:
        if stage in written.stages:
            continue
        mixture, done = written.mixture(stage), len(written.of(stage))
        planned = written.run.stages[stage].steps if mixture is None else mixture.steps
        of = f" of {planned:,}" if planned else ""
        yield cell(f"Stage {stage} stands at step {done:,}{of}: the run is under way, or was interrupted." if done else f"Stage {stage} has not begun.")
    yield Html("Go on with the command that began it, and <code>--resume</code>.")


def _parts(written: Written) -> Html:
    """encoder -> connectors -> decoder + adaptations."""
    model = written.run.model
    names, link = [f"<b>{cell(model.encoder.use)}</b>"], model.connector
    while link is not None:
        names.append(f"<b>{cell(link.use)}</b>")
        link = link.then
    names.append(f"<b>{cell((model.llm.config or {}).get('model_type') or Path(model.llm.path or 'decoder').name)}</b>")
    line = "<i>→</i>".join(names) + "".join(f"<i>+</i><b>{cell(name)}</b>" for name in model.adapt)
    return Html(line + (f"<i>from</i><code>{cell(written.run.start)}</code>" if written.run.start else ""))


def ledger(written: Written) -> Section:
    """Per stage, which groups were trained at which rate."""
    columns, body = ("group", "tensors", "parameters", "rate", "decay", "why"), []
    for stage, rows in written.ledgers.items():
        trained = sum(row["parameters"] for row in rows if row["rate"] is not None)
        spec, whole = written.run.stages[stage], sum(row["parameters"] for row in rows)
        body += [Html(f"<h3>{cell(stage)}</h3>")]
        body += [
            note(
                f"{trained:,} of {whole:,} parameters trained; batch {spec.batch}, prompt {spec.prompt.use}, pictures {spec.images.use}, ZeRO {spec.zero}, schedule {spec.schedule.kind}"
            )
        ]
        body += [table(columns, [[row[name] for name in columns] for row in rows], words=("group", "why"))]
    return Section("ledger", "What was trained", body or [note("No stage has begun, so nothing was trained.")])


# ---- curves ----------------------------------------------------------------------------------------------------------------


def charts(written: Written) -> dict[str, Chart]:
    """File name of `pictures/` -> curves of the run; none of a run without a step."""
    if not written.steps:
        return {}
    marks = [(written.of(stage)[0]["total"], stage) for stage in written.run.stages if written.of(stage)]
    sources = [name for name in written.run.data if any(name in record["sources"] for record in written.steps)]
    loss = [Curve(stage, [(record["total"], record["loss"]) for record in written.of(stage)]) for _, stage in marks]
    loss.append(Curve("validation", [(record["total"], record["loss"]) for record in written.validation]))
    by_source = [Curve(f"{stage}: {name}", points) for _, stage in marks for name in sources if (points := _of_source(written.of(stage), name))]
    paths = dict.fromkeys(path for record in written.steps for path in record["rates"])
    rates = [(path, [(record["total"], record["rates"][path]) for record in written.steps if path in record["rates"]]) for path in paths]
    found = {
        "loss": Chart("loss per supervised token", loss, marks, log=True),
        "loss_sources": Chart("loss per source", by_source, marks, log=True),
        "rates": Chart("learning rate", _same(rates), marks),
        "gradient_norm": Chart("gradient norm", [Curve("before clipping", [(record["total"], record["gradient_norm"]) for record in written.steps])], marks, log=True),
    }
    if extra := dict.fromkeys(name for record in written.steps for name in record.get("auxiliary", {})):
        lines = [Curve(name, [(record["total"], record["auxiliary"][name]) for record in written.steps if name in record.get("auxiliary", {})]) for name in extra]
        found["auxiliary"] = Chart("auxiliary losses", lines, marks)
    return found


def _of_source(steps: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(record["total"], found["loss"]) for record in steps if (found := record["sources"].get(name)) and found["loss"] is not None]


def _same(rates: Sequence[tuple[str, list[tuple[int, float]]]]) -> list[Curve]:
    """One curve for groups whose rates are the same throughout."""
    together: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for path, points in rates:
        together.setdefault(tuple(points), []).append(path)
    return [Curve(", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else ""), points) for points, paths in together.items()]


def curves(written: Written, drawn: Mapping[str, Chart]) -> Section:
    """The curves, and where each stage began and ended."""
    if not written.steps:
        return Section("curves", "Loss and rates", [note("No step was made yet.")])
    rows = []
    for stage in written.run.stages:
        steps = written.of(stage)
        if steps:
            rows.append([stage, len(steps), *(Html(f"{steps[place]['loss']:.4f}") for place in (0, -1)), Html(f"{min(record['loss'] for record in steps):.4f}")])
    body = [
        Html(f'<div class="charts">{"".join(chart.svg() for chart in drawn.values())}</div>'),
        note(
            f"Where a curve has more than {POINTS} steps, a point is the mean of neighbours; the number in a legend is the last one. "
            "Every step is in the pictures beside this page (pictures/) and in metrics.jsonl."
        ),
        table(("stage", "steps", "first loss", "last loss", "lowest"), rows, words=("stage",)),
    ]
    return Section("curves", "Loss and rates", body)


# ---- scores ----------------------------------------------------------------------------------------------------------------


def accuracy(written: Written) -> Section:
    """What `vlm eval` wrote, per source and kind, beside what is right without seeing and by chance."""
    title = "Accuracy"
    if not written.scores:
        todo = f"Nothing was evaluated yet. After <code>vlm eval {cell(written.folder)}</code> write this page again: <code>vlm report {cell(written.folder)}</code>."
        return Section("accuracy", title, [note(Html(todo if written.run.eval else "This run names nothing to evaluate on."))])
    body: list[Html] = []
    for name, found in written.scores.items():
        stage = f", stage {found['stage']}" if found.get("stage") else ""
        rows = [[kind, values["n"], _bar(values), *(_percent(values[column]) for column in ("accuracy", "blind", "chance"))] for kind, values in found["kinds"].items()]
        if len(rows) > 1:
            rows.append(["mean of the kinds", found["mean"]["n"], _bar(found["mean"]), *(_percent(found["mean"][column]) for column in ("accuracy", "blind", "chance"))])
        body += [Html(f"<h3>{cell(name)}{cell(stage)}</h3>"), table(("kind", "n", "right", "accuracy", "blind", "chance"), rows, words=("kind", "right"))]
        body += [
            note(f"{found['protocol']['scored']['matcher']}; protocol {found['protocol']['hash'][:12]}" + (f"; at most {found['limit']} samples" if found.get("limit") else ""))
        ]
    body.append(
        note(
            "In per cent. Line on the bar: blind, the larger of the commonest training answer and the model's answer to a grey picture. Dots: chance, 1 / number of training answers."
        )
    )
    return Section("accuracy", title, body)


def _bar(values: Mapping[str, Any]) -> Html:
    marks = "".join(f'<i class="{name}" style="left:{100 * values[name]:.1f}%"></i>' for name in ("blind", "chance") if values[name] is not None)
    return Html(f'<div class="bar"><span style="width:{100 * values["accuracy"]:.1f}%"></span>{marks}</div>')


def _percent(share: float | None) -> Html | None:
    return None if share is None else Html(f"{100 * share:.1f}")


# ---- data ------------------------------------------------------------------------------------------------------------------


def data(written: Written) -> Section:
    """What the mixture asked of each source, what came, and what happened to samples on the way."""
    body: list[Html] = []
    for stage in written.run.stages:
        if steps := written.of(stage):
            body += [Html(f"<h3>{cell(stage)}</h3>"), _seen(written, stage, steps), note(_happened(steps))]
    return Section("data", "Data: seen and asked for", body or [note("No sample was seen yet.")])


def _seen(written: Written, stage: str, steps: Sequence[Mapping[str, Any]]) -> Html:
    spec, mixture, sizes = written.run.stages[stage], written.mixture(stage), written.sizes(stage)
    came = {name: sum(record["sources"].get(name, {}).get("samples", 0) for record in steps) for name in spec.sources}
    weights = sizes if isinstance(spec.data, str) else spec.data
    drawn = min(len(steps) * spec.batch, mixture.samples) if mixture else None
    rows = []
    for name in spec.sources:
        share = weights[name] / sum(weights.values()) if mixture else None
        asked = None if share is None or drawn is None else round(share * drawn)
        shares = (None if share is None else Html(f"{100 * share:.1f} %"), Html(f"{100 * came[name] / max(1, sum(came.values())):.1f} %"))
        rows.append([name, sizes.get(name), *shares, asked, came[name], Html(f"{came[name] / sizes[name]:.2f}") if sizes.get(name) else None])
    return table(("source", "it holds", "share asked", "share seen", "samples asked", "samples seen", "epochs seen"), rows, words=("source",))


def _happened(steps: Sequence[Mapping[str, Any]]) -> str:
    notes = sum((Counter(record.get("notes", {})) for record in steps), Counter[str]())
    skipped = sum(record.get("skipped", 0) for record in steps)
    modality = sum((Counter(record.get("modality", {})) for record in steps), Counter[str]())
    told = [
        f"{skipped:,} skipped as bad",
        f"{notes.pop('replacement', 0):,} replacements",
        f"{notes.pop('cut', 0):,} cut",
        *(f"{count:,} x {name}" for name, count in notes.most_common()),
    ]
    return "; ".join(told) + f". With pictures: {modality['vision']:,}, text only: {modality['text']:,}. Supervised tokens: {sum(record['supervised'] for record in steps):,}."


def warnings(written: Written) -> Section:
    """What the run warned of, bad samples by kind with the first of each, and files of the run that cannot be read."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for entry in written.bad:
        kinds.setdefault(entry.get("kind", "other"), []).append(entry)
    body = [note(line, "warning") for line in (*written.warnings, *(f"This file of the run could not be read: {line}" for line in written.unread))]
    if kinds:
        rows = [
            [kind if not place else "", len(found) if not place else "", f"{entry['stage']}, step {entry['step']}, {entry['source']}", entry["reason"]]
            for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1]))
            for place, entry in enumerate(found[:EXAMPLES])
        ]
        body.append(table(("kind", "how often", "where", "what"), rows, words=("kind", "where", "what")))
        body.append(note("Every one is in bad_samples.jsonl; step 0 is what was left out when the source was opened."))
    return Section("warnings", "Warnings", body or [note("None: the run warned of nothing, had no bad sample, and every file of the run could be read.")])


# ---- speed and machine -----------------------------------------------------------------------------------------------------


def speed(written: Written) -> Section:
    """How fast each stage went."""
    rows = []
    for stage in written.run.stages:
        if steps := written.of(stage):
            seconds, tokens = sum(record["seconds"] for record in steps), sum(record["tokens"] for record in steps)
            middle = sorted(record["seconds"] for record in steps)[len(steps) // 2]
            wait = 100 * sum(record["wait"] for record in steps) / seconds
            flops = [record["mfu"] for record in steps if record.get("mfu") is not None]
            memory = Html(f"{max(record['memory'] for record in steps):.2f}")
            share = Html(f"{100 * sum(flops) / len(flops):.1f} %") if flops else None
            rows.append([stage, _time(seconds), Html(f"{tokens / seconds:,.0f}"), Html(f"{middle:.3f}"), Html(f"{wait:.1f} %"), memory, share])
    columns = ("stage", "time", "tokens/s", "median step, s", "data wait", "peak memory, GiB", "MFU")
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Section("speed", "Speed", [table(columns, rows, words=("stage",))] if rows else [note("No step was made yet.")])


def machine(written: Written) -> Section:
    """Versions, devices, the command, and the data's files with their hashes."""
    there = written.environment
    devices = Counter(there.get("devices") or ["CPU only"])
    facts: list[tuple[str, Any]] = [
        ("devices", ", ".join(f"{count} x {name}" if count > 1 else name for name, count in devices.items())),
        ("ranks", there.get("ranks")),
        ("platform", there.get("platform")),
        ("python", there.get("python")),
        ("commit", (there.get("commit") or "–")[:12]),
        ("command", Html(f"<code>{cell(' '.join(there.get('command') or ['–']))}</code>")),
    ]
    files = [
        [name, found.get("file"), found.get("samples"), Html(f"<code>{cell(str(found.get('sha256', ''))[:16])}</code>")]
        for name, found in written.manifest.get("sources", {}).items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in (there.get("versions") or {}).items())
    body = [table(("what", "here"), [*facts, ("packages", versions or None)], words=("what", "here"))]
    return Section("machine", "Versions and machine", [*body, table(("source", "file", "samples", "sha256"), files, words=("source", "file", "sha256"))])


def _short(value: int | None) -> str | None:
    """A count in few letters: 1.08 M."""
    if value is None or value < 10_000:
        return None if value is None else f"{value:,}"
    power = next(power for power in (9, 6, 3) if value >= 10**power)
    return f"{value / 10**power:.3g} {['B', 'M', 'k'][(9 - power) // 3]}"


def _time(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
