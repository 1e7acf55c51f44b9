"""The looks of a run's report: a page that is one file, and the pieces it is made of. Whatever comes in as text is escaped; pictures are data URIs."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Html", "Section", "cell", "data_uri", "figure", "note", "page", "table", "tiles"]


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Section:
    """A part of the page. name: of its anchor. body: pieces one below the other."""

    name: str
    title: str
    body: Sequence[Html]


def cell(value: Any) -> Html:
    """A value as a table or a line shows it: None as a dash, whole numbers with thousands, others with four figures, text escaped."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("–")
    if isinstance(value, int):
        return Html(f"{value:,}")
    if isinstance(value, float):
        return Html(f"{value:.4g}")
    return Html(escape(str(value).encode("utf-8", "replace").decode()))  # half a surrogate pair has no place in a file


def note(text: Any, kind: str = "note") -> Html:
    """A paragraph. kind: note (small and grey), warning."""
    return Html(f'<p class="{kind}">{cell(text)}</p>')


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, words: Iterable[str] = ()) -> Html:
    """A table that scrolls inside itself where it is too wide. words: columns of text, on the left; the others are numbers."""
    kinds = ["" if name in set(words) else ' class="n"' for name in columns]
    head = "".join(f"<th{kind}>{cell(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{cell(value)}</td>" for kind, value in zip(kinds, row, strict=True)) + "</tr>" for row in rows)
    return Html(f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def tiles(facts: Iterable[tuple[str, Any]]) -> Html:
    """Facts beside each other: a word, and large below it its value."""
    return Html('<dl class="tiles">' + "".join(f"<div><dt>{cell(name)}</dt><dd>{cell(value)}</dd></div>" for name, value in facts) + "</dl>")


def data_uri(data: bytes) -> str:
    """A PNG or JPEG file as an address that holds it."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def figure(data: bytes, title: str, caption: str) -> Html:
    """A drawn picture (PNG) on white, with a title above and a caption below."""
    picture = f'<div class="scroll" tabindex="0"><img src="{data_uri(data)}" alt="{escape(title)}"></div>'
    return Html(f'<figure class="drawn"><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>')


def page(title: str, head: Sequence[Html], sections: Iterable[Section]) -> str:
    """The whole file. The policy in its head keeps any browser from asking a network for anything, or running a script."""
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.name}">{cell(section.title)}</a>' for section in shown)
    body = "".join(f'<section id="{section.name}"><h2>{cell(section.title)}</h2>{"".join(section.body)}</section>' for section in shown)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><main><header>{"".join(head)}</header><nav aria-label="Sections">{links}</nav>\n{body}</main></body></html>\n'
    )


STYLE = """
:root { --ink: #1d2129; --soft: #5d6675; --line: #dfe3e8; --ground: #f6f7f9; --card: #ffffff; --accent: #2463a8; --good: #1e7b4c; --bad: #a8492b; --warn: #fbf3e2; --warnline: #d9a441;
  --s0: #2463a8; --s1: #c2571a; --s2: #2c8a57; --s3: #8b4a9c; --s4: #a3842b; --s5: #4b8f99; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa4b2; --line: #333a45; --ground: #15181d; --card: #1d2127; --accent: #79b0ee; --good: #6cc79a; --bad: #ee9a78; --warn: #2d2618;
  --warnline: #a57c2f; --s0: #79b0ee; --s1: #f0995f; --s2: #6cc79a; --s3: #cb97da; --s4: #d9bd6a; --s5: #83c6d0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 64px; }
h1, h2, h3 { line-height: 1.25; font-weight: 650; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.7rem, 4vw, 2.3rem); }
h2 { font-size: 1.25rem; margin-bottom: 14px; }
h3 { font-size: 1rem; margin: 22px 0 8px; }
p { margin: 0 0 12px; max-width: 78ch; overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
code { font: .92em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
header .parts { margin: 8px 0 2px; font-size: 1.08rem; max-width: none; } header .parts b { font-weight: 600; white-space: nowrap; } header .parts i { font-style: normal; color: var(--soft); padding: 0 .3em; }
.state { display: inline-block; font-size: .8rem; font-weight: 600; padding: 2px 10px; border-radius: 99px; vertical-align: middle; border: 1px solid currentColor; color: var(--good); white-space: nowrap; }
.state.open { color: var(--bad); }
.note, figcaption, .when { color: var(--soft); font-size: .88rem; }
.warning { background: var(--warn); border-left: 3px solid var(--warnline); padding: 9px 13px; border-radius: 0 6px 6px 0; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 6px; font-size: .92rem; }
dl.tiles + .warning { margin-top: 16px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px 22px; margin-top: 18px; min-width: 0; }
section > :last-child { margin-bottom: 0; }
section > h2 + h3 { margin-top: 0; }
dl.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 18px 0 0; background: var(--line); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
dl.tiles div { flex: 1 1 132px; background: var(--card); padding: 10px 14px; } dt { color: var(--soft); font-size: .78rem; } dd { margin: 0; font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; max-width: 100%; border-radius: 6px; margin: 0 0 14px; } .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; white-space: nowrap; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); vertical-align: top; } tbody tr:last-child td { border-bottom: 0; } th, td { padding: 5px 26px 5px 0; } th:last-child, td:last-child { padding-right: 2px; }
.n { text-align: right; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 22px 30px; }
figure { margin: 0; min-width: 0; } .charts h3 { margin: 0 0 4px; } .charts + p { margin-top: 16px; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } svg .grid { stroke: var(--line); } svg .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .82rem; color: var(--soft); } .legend span::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--c); } .legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
figure.drawn { margin-top: 22px; } figure.drawn h3 { margin-top: 0; } figure.drawn img { display: block; width: auto; max-width: 100%; min-width: min(560px, 160vw); background: #fff; border-radius: 8px; }
.questions { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 470px), 1fr)); gap: 0 36px; }
.asked { display: grid; align-content: start; grid-template-columns: 150px minmax(0, 1fr); gap: 8px 20px; padding: 16px 0; border-top: 1px solid var(--line); break-inside: avoid; }
.asked .views { display: flex; flex-direction: column; gap: 8px; } .asked img { width: 100%; border-radius: 6px; background: var(--ground); display: block; } .asked img.small { image-rendering: pixelated; }
.asked .question { font-weight: 600; margin-bottom: 8px; white-space: pre-line; } .asked th { padding-right: 20px; border: 0; font-size: .84rem; vertical-align: top; } .asked td { border: 0;
  overflow-wrap: anywhere; white-space: pre-line; } .asked th, .asked td { padding-top: 2px; padding-bottom: 2px; } .right { color: var(--good); font-weight: 600; }
.bar { position: relative; width: 200px; height: 14px; margin: 4px 0; background: var(--ground); border-radius: 3px; } .bar span { position: absolute; inset: 0 auto 0 0; background: var(--s0); border-radius: 3px; }
.bar i { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); } .bar i.chance { background: none; border-left: 2px dotted var(--bad); }
@media (max-width: 560px) { body { font-size: 15px; } main { padding: 18px 12px 40px; } section { padding: 16px 14px; } .asked { grid-template-columns: minmax(0, 1fr); } .asked .views { flex-direction: row; flex-wrap: wrap; }
  .asked img { width: 132px; } .bar { width: 64px; } th, td { padding-right: 14px; } svg text { font-size: 13px; } }
@media print { body { background: #fff; font-size: 10.5pt; } main { max-width: none; padding: 0; } nav { display: none; } section { border: 0; border-top: 1px solid #ccc; border-radius: 0; padding: 12pt 0; }
  figure, tr, .asked, dl.tiles { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; } }
"""
