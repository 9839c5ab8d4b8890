"""The report in lines of text, for the node and the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import listed
from ..safefile import write_text
from .images import shown
from .report import counted

ALSO_A_WARNING = "shuffle_caption moves every tag"
NUM_TAGS = 20
NUM_NAMES = 8


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the whole report as text: what was scanned, then tags, captions, steps and hints."""
    return [
        *(line for line in report["lines"] if not line.startswith(ALSO_A_WARNING)),
        *_concept_lines(report),
        *_leftover_lines(report),
        *_tag_lines(report["tags"]),
        *_caption_lines(report["captions"]),
        *steps_text(report["steps"]),
        *warning_lines(report),
    ]


def save_report_json(report: Mapping[str, Any], file: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    write_text(file, json.dumps(report, ensure_ascii=False, indent=1) + "\n")


def warning_lines(report: Mapping[str, Any]) -> list[str]:
    """Return every hint with what to do and who says so."""
    warnings = report["warnings"]
    if not warnings:
        return ["No warnings."]
    lines = [f"{counted(len(warnings), 'warning')}:"]
    for warning in warnings:
        lines.append(f"  [{warning['id']}] {shown(warning['text'], 300)}")
        if warning["names"]:
            names = [shown(name) for name in warning["names"][:NUM_NAMES]]
            rest = warning["num_names"] - len(names)
            lines.append(f"    {', '.join(names)}{f' and {rest} more' if rest > 0 else ''}")
        lines.append(f"    What to do: {warning['fix']} ({warning['source']}).")
    return lines


def steps_text(steps: Mapping[str, Any]) -> list[str]:
    """Return the arithmetic of the steps, and what the buckets make of it."""
    s = steps
    lines = [
        f"Steps: {s['samples']} images with repeats x {counted(s['epochs'], 'epoch')} / "
        f"(batch {s['batch_size']} x accumulation {s['accumulation']}) = {s['formula']:g}; "
        f"with buckets {s['steps']}, {s['steps_per_epoch']} per epoch."
    ]
    table = "; ".join(
        f"{size}: {batches}" + (f" instead of {ideal}" if batches != ideal else "")
        for size, batches, ideal in s["batches_by_size"]
    )
    return [*lines, f"Batches per epoch by batch size: {table}."]


def _concept_lines(report: Mapping[str, Any]) -> list[str]:
    images = report["images"]
    lines = [
        f"{counted(images['training'], 'training image')}, {images['regularisation']} for regularisation, "
        f"{images['validation']} for validation, {images['masked']} with a mask."
    ]
    if len(report["concepts"]) > 1:
        for row in report["concepts"]:
            repeats = "/".join(str(r) for r in row["repeats"])
            share = "regularisation" if row["share"] is None else f"{row['share']:.0%}"
            name = shown(row["name"], 60)
            lines.append(f"  {name}: {row['images']} x {repeats} = {row['samples']}, {share}")
    return lines


def _leftover_lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for group in report["groups"]:
        left = [b for b in group["buckets"] if b["leftover"]]
        if group["batch_size"] > 1 and left:
            sizes = [f"{b['size'][0]}x{b['size'][1]} {b['leftover']}" for b in left]
            lines.append(
                f"Last batch of {group['batch_size']} not full in {len(left)} buckets: {listed(sizes)}."
            )
    return lines


def _tag_lines(tags: Mapping[str, Any]) -> list[str]:
    lines = [f"Tags: {tags['different']} different ones in {counted(tags['captions'], 'caption')}."]
    if tags["top"]:
        top = ", ".join(f"{shown(tag, 60)} {n}" for tag, n in tags["top"][:NUM_TAGS])
        lines.append(f"  most frequent: {top}")
    if tags["in_all"] and tags["captions"] > 1:
        lines.append(f"  in all: {listed((shown(t, 60) for t in tags['in_all']), limit=NUM_TAGS)}")
    if tags["num_in_one"]:
        some = ", ".join(shown(t, 60) for t in tags["in_one"][:NUM_NAMES])
        lines.append(f"  in one image only: {tags['num_in_one']}, for instance {some}")
    return lines


def _caption_lines(captions: Mapping[str, Any]) -> list[str]:
    within = ", ".join(f"{n} within {limit}" for limit, n in captions["within"].items())
    lines = [f"Caption lengths in tokens ({captions['counted_by']}): {within}."]
    if captions["longest"]:
        name, length = captions["longest"]
        lines.append(f"  longest: {length} in {shown(name)}")
    return lines
