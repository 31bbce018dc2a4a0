"""A self-contained HTML page of text, tables and figures."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = "report.html"


_MEDIA = {"svg": "image/svg+xml", "png": "image/png"}


_LARGEST_SVG = 400_000
"""Bytes. A larger drawing, such as a scatter plot of thousands of cells, is written as PNG, which is then
smaller and faster."""


_WIDE_INCHES = 6.1
"""Wider figures scroll on a phone; shrunk to its width, they would be unreadable."""


class Report:
    """Sections of text, tables, figures and warnings, in the order of the calls, written as HTML.

    The file needs no other file and nothing from the network. It is laid out for phones, desktops,
    dark mode and paper. The same calls give the same bytes.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._sections = [_Section(title="", anchor="top")]

    def section(self, title: str) -> None:
        """Start a section for whatever is added next."""
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self._sections.append(_Section(title=title, anchor=f"s{len(self._sections)}-{words}"))

    def text(self, text: str) -> None:
        """Add paragraphs, separated by empty lines.

        Args:
            text: Plain text with `**bold**` and `` `code` ``; a paragraph whose lines all start with `- `
                is a list.
        """
        self._add(_paragraphs(text))

    def warning(self, text: str) -> None:
        """Add a highlighted warning; same markup as `text`."""
        html = Markup('<aside class="warning" role="note"><strong>Warning</strong>{}</aside>').format(
            _paragraphs(text)
        )
        self._add(html)

    def table(self, title: str, table: pd.DataFrame, caption: str = "") -> None:
        """Add a table, without its index: row names must be a column.

        Args:
            title: Heading; may be empty.
            table: Numbers are aligned and rounded for reading; a missing value is shown as a dash.
            caption: How to read it.
        """
        is_number = [_is_number(table[name]) for name in table.columns]
        rows = [list(row) for row in zip(*(_shown(table[name]) for name in table.columns), strict=True)]
        names = [str(name) for name in table.columns]
        self._add(_table_html(title, names, is_number, rows, caption))

    def figure(self, title: str, figure: Figure, caption: str, alt: str) -> None:
        """Add a figure; the object is not kept.

        Args:
            title: Heading; may be empty.
            figure: Drawn immediately, on a transparent background; colours are inverted in dark mode.
            caption: What it shows and how to read it.
            alt: What it shows, for readers who cannot see it.

        Raises:
            ValueError: `alt` is empty.
        """
        width_in, height_in = (float(inches) for inches in figure.get_size_inches())
        kind, content = _drawn(figure)
        self._picture(title, kind, content, (width_in, height_in), caption, alt)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Add a row of the most important numbers, each with its name."""
        items = Markup("").join(
            Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in facts.items()
        )
        self._add(Markup('<dl class="facts">{}</dl>').format(items))

    def picture(self, title: str, path: str | Path, caption: str, alt: str) -> None:
        """Add an existing .png or .svg file; otherwise like `figure`."""
        path = Path(path)
        self._picture(title, path.suffix.removeprefix(".").lower(), path.read_bytes(), None, caption, alt)

    def write_html(self, path: str | Path) -> Path:
        """Write one self-contained file and return its path."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template(_TEMPLATE).render(
            title=self._title,
            subtitle=self._subtitle,
            sections=[section for section in self._sections if section.title or section.parts],
            version=importlib.metadata.version("screformer"),
        )
        path = Path(path)
        path.write_text(page, encoding="utf-8")
        return path

    def _picture(
        self,
        title: str,
        kind: str,
        content: bytes,
        size_in: tuple[float, float] | None,
        caption: str,
        alt: str,
    ) -> None:
        if not alt.strip():
            raise ValueError(f"alt of figure {title!r} is empty; describe the figure in a sentence")
        if kind not in _MEDIA:
            raise ValueError(f"picture {title!r} has the format {kind!r}; supported are {', '.join(_MEDIA)}")
        size = (
            Markup(' width="{}" height="{}"').format(*(round(inches * 96) for inches in size_in))
            if size_in
            else Markup("")
        )
        image = Markup('<img alt="{}"{}{} src="data:{};base64,{}">').format(
            alt,
            size,
            Markup(' class="wide"') if size_in and size_in[0] > _WIDE_INCHES else Markup(""),
            _MEDIA[kind],
            base64.b64encode(content).decode(),
        )
        note = Markup("<figcaption>{}</figcaption>").format(_inline(caption)) if caption else Markup("")
        html = _heading(title) + Markup(
            '<figure><div class="scroll" tabindex="0">{}</div>{}</figure>'
        ).format(image, note)
        if size_in and size_in[0] <= _WIDE_INCHES:
            html = Markup('<div class="narrow">{}</div>').format(
                html
            )  # two narrow figures are shown side by side if there is room
        self._add(html)

    def _add(self, html: Markup) -> None:
        self._sections[-1].parts.append(html)


@dataclass(frozen=True, kw_only=True)
class _Section:
    title: str
    anchor: str
    parts: list[Markup] = field(default_factory=list)


def _drawn(figure: Figure) -> tuple[str, bytes]:
    import matplotlib as mpl

    # A fixed salt and no date: the same figure gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": "screformer"}):
        target = io.BytesIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
        if len(target.getvalue()) > _LARGEST_SVG:
            target = io.BytesIO()
            figure.savefig(target, format="png", transparent=True, dpi=200)
            return "png", target.getvalue()
        return "svg", target.getvalue()


def _inline(text: str) -> Markup:
    html = str(escape(text))
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html))


def _paragraphs(text: str) -> Markup:
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines and all(line.startswith("- ") for line in lines):
            items = Markup("").join(Markup("<li>{}</li>").format(_inline(line[2:])) for line in lines)
            blocks.append(Markup("<ul>{}</ul>").format(items))
        else:
            blocks.append(Markup("<p>{}</p>").format(_inline(" ".join(lines))))
    return Markup("\n").join(blocks)


def _heading(title: str) -> Markup:
    return Markup("<h3>{}</h3>").format(title) if title else Markup("")


def _table_html(
    title: str, names: list[str], is_number: list[bool], rows: list[list[str]], caption: str
) -> Markup:
    classes = [Markup(' class="number"') if number else Markup("") for number in is_number]
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(kind, name)
        for kind, name in zip(classes, names, strict=True)
    )
    body = []
    for row in rows:
        cells = []
        for place, (kind, value) in enumerate(zip(classes, row, strict=True)):
            cell = '<th scope="row"{}>{}</th>' if place == 0 and not kind else "<td{}>{}</td>"
            cells.append(Markup(cell).format(kind, value))
        body.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    note = Markup('<p class="caption">{}</p>').format(_inline(caption)) if caption else Markup("")
    grid = Markup("<table><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table>").format(
        head, Markup("\n").join(body)
    )
    box = Markup('<div class="scroll table" tabindex="0" role="region" aria-label="{}">{}</div>').format(
        title or "table", grid
    )
    return _heading(title) + box + note


def _is_number(column: pd.Series) -> bool:
    values = column.dropna()
    return len(values) > 0 and all(
        isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_) for value in values
    )


def _shown(column: pd.Series) -> list[str]:
    """Format values for reading.

    Whole numbers with commas, others to three decimals or digits, a dash for missing values.
    """
    missing = column.isna()
    if _is_number(column):
        whole = all(float(value).is_integer() for value in column[~missing])
        texts = [
            "" if gone else f"{int(value):,}" if whole else _number(float(value))
            for value, gone in zip(column, missing, strict=True)
        ]
    else:
        texts = [
            {True: "yes", False: "no"}[bool(value)] if isinstance(value, bool | np.bool_) else str(value)
            for value in column
        ]
    return ["–" if gone else text for text, gone in zip(texts, missing, strict=True)]


def _number(value: float) -> str:
    size = abs(value)
    if value == 0 or 0.001 <= size < 1000:
        return f"{value:.3f}"
    return f"{value:,.0f}" if 1000 <= size < 1e9 else f"{value:.2e}"
