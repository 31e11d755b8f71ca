"""The little HTML that a page is made of: text escaped, tables in boxes that scroll by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# No colour but through a variable, so that dark mode is one block. Text on its ground has 7:1 in either.
CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f4f5f7; --ink: #1b1f24; --soft: #565d66;
  --line: #d5d9de; --link: #0b5cad; --alarm: #fdf1e3; --alarm-line: #c8641b; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --raised: #1d2127; --ink: #e7eaee;
  --soft: #a5adb8; --line: #363c45; --link: #7fb9f0; --alarm: #33241a; --alarm-line: #e08a45; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .25rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; }
a { color: var(--link); }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
.problems { background: var(--alarm); border-left: 4px solid var(--alarm-line); padding: .5rem .75rem;
  margin: 1rem 0; }
.problems ul { margin: .25rem 0; padding-left: 1.1rem; }
nav ul { padding-left: 1.1rem; margin: .25rem 0; }
nav p a { margin-right: .6rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; margin: .5rem 0;
  overflow-wrap: normal; }
th, td { padding: .25rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
th[scope=row] { font-weight: 500; }
figure { margin: .75rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; padding: .5rem 0; }
"""


def text(words: object) -> str:
    return escape(str(words))


def tag(name: str, words: object, **attributes: str) -> str:
    """``class_`` stands for class."""
    said = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{said}>{text(words)}</{name}>"


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(tag("li", item) for item in items) + "</ul>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """``rows``: cells as text, or as whole ``<td>`` elements; the first of each is its heading."""
    head = "".join(tag("th", heading, scope="col") for heading in headings)
    body = []
    for first, *rest in rows:
        cells = "".join(cell if cell.startswith("<td") else f"<td>{text(cell)}</td>" for cell in rest)
        body.append(f"<tr>{tag('th', first, scope='row')}{cells}</tr>")
    return (
        # No <caption>: it would be no wider than a narrow table.
        f'{tag("p", caption, class_="soft")}<div class="scroll" tabindex="0">'
        f'<table aria-label="{escape(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def details(summary: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}>{tag('summary', summary)}{inside}</details>"


def drawn(svg: str, title: str, alt: str) -> str:
    """A picture; what can't see it reads ``alt``."""
    box = f'<div class="scroll" tabindex="0" role="img" aria-label="{escape(alt)}">{svg}</div>'
    return f"<figure>{box}{tag('figcaption', title)}</figure>"


def document(title: str, body: str) -> str:
    """A whole page. Its policy lets a browser load nothing: all there is to show is in it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', title)}<style>{CSS}</style></head>\n<body>{body}</body></html>\n"
    )
