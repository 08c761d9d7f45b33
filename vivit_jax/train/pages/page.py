# SPDX-License-Identifier: Apache-2.0
"""A page of sections in one file, which needs no other: its style, tables and numbers."""

import math
from collections.abc import Iterable, Sequence

from vivit_jax.train.pages.chart import CHART_STYLE, escape


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page with a heading for each section that has content."""
    body = "".join(f"<h2>{escape(name)}</h2>{content}" for name, content in sections if content)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}{CHART_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """Rows of text as a table, the first column as row headings; "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(c)}</td>' for c in row[1:])}</tr>"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def percent(share: float, digits: int = 1) -> str:
    """A share as text: 0.25 is 25.0%."""
    return "-" if math.isnan(share) else f"{share:.{digits}%}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5f6670; --line: #dfe2e6; --page: #fff;
  --c0: #1f6fc4; --c1: #c4500a; --c2: #1a7f4b; --c3: #9a3fb5; --c4: #a37800; --c5: #c02c5e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa3ad; --line: #343a41;
  --page: #15181c; --c0: #63a8f2; --c1: #f59154; --c2: #55c48a; --c3: #cf8be6; --c4: #dcb13c;
  --c5: #f2799f; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1140px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.confusion { margin: 0 0 1rem; }
.notice { border-left: 4px solid var(--c1); padding: .3rem .8rem; margin: .5rem 0; }
.strips { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; margin: .3rem 0; }
.strips img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
.strips small { color: var(--dim); overflow-wrap: anywhere; }
tbody th { font-weight: 500; white-space: nowrap; color: var(--dim); }
"""
