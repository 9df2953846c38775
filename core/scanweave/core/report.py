"""What a demonstration returns, and the page that shows several of them.

Core knows no domain: each domain's `demo` module fills a `DemoResult`, and the command line hands
all of them to `write_report`.

    Row, Figure, DemoResult   the parts of a report
    figure_style              fonts and lines that all plots share
    save_figure               a plot becomes a part of the report
    write_report              results.json and a self-contained index.html
"""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# blue for our model, orange for what it is compared with, grey for context; told apart by people
# who see few colours, and by brightness in print
OURS, OTHER, CONTEXT = "#2563c9", "#d9730d", "#8a919c"


@dataclass(frozen=True)
class Row:
    """One line of a result table.

    Attributes:
        model: What was trained or measured.
        metric: What `value` is, with its unit.
        value: The number.
        digits: Digits behind the point when shown.
        detail: Anything short that helps to read the number.
    """

    model: str
    metric: str
    value: float
    digits: int = 1
    detail: str = ""

    @property
    def shown(self) -> str:
        """The value as people read it."""
        return f"{self.value:.{self.digits}f}"


@dataclass(frozen=True)
class Figure:
    """A plot on disk; `path` is relative to the report's folder."""

    path: str
    caption: str


@dataclass
class DemoResult:
    """What one domain shows.

    Attributes:
        title: Heading of the section.
        text: What was trained on what, in two or three sentences.
        rows: The numbers, ours first.
        figures: The plots, most telling first.
        goal: What the demonstration promises, or an empty string.
        reached: Whether it kept the promise.
        seconds: Wall time; the command line sets it.
    """

    title: str
    text: str
    rows: list[Row]
    figures: list[Figure] = field(default_factory=list)
    goal: str = ""
    reached: bool = True
    seconds: float = 0.0


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib settings for every plot that is made and saved inside.

    Plots are `matplotlib.figure.Figure` objects, not pyplot's: pyplot would choose a backend for
    the whole program.
    """
    import matplotlib

    settings: dict[Any, Any] = {
        "figure.dpi": 160,
        "figure.constrained_layout.use": True,
        "font.size": 9.5,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#4b5563",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        yield


def save_figure(canvas: "Canvas", folder: Path, name: str, caption: str) -> Figure:
    """Write one plot as `<folder>/<name>.png`; the report's folder is the parent of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    canvas.savefig(folder / f"{name}.png")
    return Figure(f"{folder.name}/{name}.png", caption)


def write_report(folder: Path, results: Sequence[DemoResult], facts: dict[str, str]) -> Path:
    """Write results.json, and index.html with every figure inside it.

    Args:
        folder: Where the figures lie and the report goes.
        results: One per domain, in the order shown.
        facts: Name and value of what the numbers depend on: versions, device, seed, command.

    Returns:
        The path of index.html.
    """
    record = {"facts": facts, "results": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    sections = "\n".join(_section(folder, result) for result in results)
    listed = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    page = folder / "index.html"
    page.write_text(_PAGE.format(style=_STYLE, facts=listed, sections=sections))
    return page


def _section(folder: Path, result: DemoResult) -> str:
    goal = ""
    if result.goal:
        mark, word = ("met", "reached") if result.reached else ("missed", "missed")
        goal = f'<p class="goal {mark}"><b>{word}</b> {_text(result.goal)}</p>'
    rows = "".join(
        f"<tr><td>{_text(row.model)}</td><td class=number>{row.shown}</td>"
        f"<td>{_text(row.metric)}</td><td class=detail>{_text(row.detail)}</td></tr>"
        for row in result.rows
    )
    figures = "".join(_figure(folder, figure) for figure in result.figures)
    return (
        f"<section><h2>{_text(result.title)} <small>{result.seconds:.0f} s</small></h2>"
        f"<p>{_text(result.text)}</p>{goal}<table>{rows}</table>{figures}</section>"
    )


def _figure(folder: Path, figure: Figure) -> str:
    data = base64.b64encode((folder / figure.path).read_bytes()).decode("ascii")
    caption = _text(figure.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


_STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --blue: #2563c9; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -.02em; }
h1 + p { color: var(--soft); margin: .25rem 0 1.5rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 2rem; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; font-weight: 600; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px;
  padding: 1.5rem 1.75rem; margin-bottom: 1.5rem; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
h2 small { color: var(--soft); font-weight: 400; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .93rem; }
td { padding: .45rem .75rem .45rem 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { font-weight: 600; }
tr:first-child .number { color: var(--blue); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.detail { color: var(--soft); font-weight: 400 !important; }
.goal { display: inline-block; margin: .25rem 0; padding: .2rem .7rem; border-radius: 99px;
  font-size: .85rem; }
.met { background: #e4f5ea; color: #14532d; } .missed { background: #fdecea; color: #7f1d1d; }
figure { margin: 1.5rem 0 0; } img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .35rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>scanweave demo</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>scanweave demo</h1>
<p>One selective scan, three domains: images, graphs, decisions. All trained on this machine.</p>
<dl>{facts}</dl>
{sections}
</main>
</body>
</html>
"""
