"""The report as one self-contained HTML file: no scripts, nothing fetched, every text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..safefile import write_text
from .report_text import steps_text

# Only what is in the file itself: its own style sheet, and pictures as data.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1e21;
background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid #d8dce2}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem .7rem;text-align:left;
border-bottom:1px solid #eceff3}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.warn{border-left:4px solid #d08a1d;background:#fdf6e8;padding:.5rem .8rem;margin:.6rem 0}
.fix{font-weight:600}.src,.names{color:#5b616b;font-size:.9em;overflow-wrap:anywhere}
img{max-width:100%;height:auto;border:1px solid #d8dce2}pre{white-space:pre-wrap;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#16181b;color:#e4e6ea}td,th{border-color:#2c3036}
h2{border-color:#3a3f46}.warn{background:#2b2418}.src,.names{color:#9aa1ab}}
"""


def report_html(report: Mapping[str, Any], pictures: Sequence[tuple[str, Image.Image]] = ()) -> str:
    """Return the report as an HTML page; ``pictures`` are shown under their titles."""
    images = report["images"]
    summary = (
        f"{images['training']} training images, {images['samples']} with repeats; "
        f"{images['regularisation']} for regularisation, {images['validation']} for validation."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Dataset report</title><style>{STYLE}</style></head><body>",
        "<h1>Dataset report</h1>",
        f"<p>{escape(summary)}</p>",
        *_warnings(report["warnings"]),
        "<h2>Concepts</h2>",
        _table(
            ["Concept", "#Images", "Repeats", "#Samples", "#Share"],
            (
                [
                    row["name"],
                    row["images"],
                    "/".join(str(r) for r in row["repeats"]),
                    row["samples"],
                    "regularisation" if row["share"] is None else f"{row['share']:.0%}",
                ]
                for row in report["concepts"]
            ),
        ),
        *(part for group in report["groups"] for part in _group(group)),
        "<h2>Steps</h2>",
        *(f"<p>{escape(line)}</p>" for line in steps_text(report["steps"])),
        "<h2>Captions</h2>",
        *_captions(report["captions"]),
        "<h2>Tags</h2>",
        *_tags(report["tags"]),
        *(f"<h2>{escape(title)}</h2>{_picture(image, title)}" for title, image in pictures),
        "<h2>Everything that was said</h2>",
        f"<pre>{escape(chr(10).join(report['lines']))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def save_report_html(
    report: Mapping[str, Any], file: Path, pictures: Sequence[tuple[str, Image.Image]] = ()
) -> None:
    """Write the page, whole or not at all."""
    write_text(file, report_html(report, pictures))


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> list[str]:
    if not warnings:
        return ["<p>No warnings.</p>"]
    parts = [f"<h2>{len(warnings)} warning{'s' if len(warnings) > 1 else ''}</h2>"]
    for w in warnings:
        rest = w["num_names"] - len(w["names"])
        names = ", ".join(w["names"]) + (f" and {rest} more" if rest > 0 else "")
        parts.append(
            f'<div class="warn"><div>{escape(w["text"])}</div><div class="fix">{escape(w["fix"])}</div>'
            f'<div class="names">{escape(names)}</div><div class="src">{escape(w["source"])}</div></div>'
        )
    return parts


def _group(group: Mapping[str, Any]) -> list[str]:
    width, height = group["resolution"]
    title = (
        f"Buckets of group {group['number']}: resolution {width}x{height}, batch size {group['batch_size']}"
    )
    rows = (
        [
            f"{b['size'][0]}x{b['size'][1]}",
            b["images"],
            b["samples"],
            f"{b['lost']:.1%}",
            b["enlarged"],
            b["batches"],
            b["leftover"],
        ]
        for b in group["buckets"]
    )
    head = ["Size", "#Images", "#With repeats", "#Cut off", "#Enlarged", "#Batches", "#In the last batch"]
    return [f"<h2>{escape(title)}</h2>", _table(head, rows)]


def _captions(captions: Mapping[str, Any]) -> list[str]:
    within = ([f"within {limit} tokens", n] for limit, n in captions["within"].items())
    return [
        f"<p>Lengths counted by {escape(captions['counted_by'])}.</p>",
        _table(["Length", "#Captions"], within),
        _table(["Image", "Caption"], captions["examples"]),
    ]


def _tags(tags: Mapping[str, Any]) -> list[str]:
    return [
        f"<p>{tags['different']} different tags; {len(tags['in_all'])} in all captions, "
        f"{tags['num_in_one']} in one only.</p>",
        _table(["Tag", "#Captions"], tags["top"]),
        f'<p class="names">In one caption only: {escape(", ".join(tags["in_one"]))}</p>',
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; a head that begins with # stands over numbers."""
    numeric = [text.startswith("#") for text in head]

    def cells(kind: str, values: Sequence[object]) -> str:
        pairs = zip(values, numeric, strict=True)
        return "".join(
            f"<{kind}{' class=n' if right else ''}>{escape(str(value))}</{kind}>" for value, right in pairs
        )

    first = cells("th", [text.lstrip("#") for text in head])
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{body}</table>"


def _picture(image: Image.Image, title: str) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{data}">'
