"""``loragraft dataset tag``, ``captions`` and ``tags``: captions made, edited and counted."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from .. import api
from ..data import tagger
from ..data.tagger_session import DEVICES
from ..errors import LoraGraftError
from ..safefile import write_text
from .help_text import Help
from .source import Counter, add_source, open_dataset

TAGGERS_DIR = "output/taggers"
CACHE_DIR = "output/cache"
NUM_SHOWN = 5

# Flags of the tagger's settings: what each does, in the order of TagSettings.
TAG_HELP = {
    "general_threshold": "tags surer than this are taken",
    "character_threshold": "names of characters surer than this are taken",
    "general_mcut": "find the threshold of general tags per picture (MCut)",
    "character_mcut": "find the threshold of characters per picture (MCut, at least 0.15)",
    "rating": "write the picture's rating first or last",
    "replace_underscore": "write spaces for underscores, but not in kaomojis",
    "character_first": "characters before general tags",
    "trigger": "trigger words, put first; {class} is the folder's words",
    "existing": "what becomes of a caption that is there",
    "exclude": "tags to leave out: names, wildcards with *, groups such as [hair] or [features]",
    "always_first": "tags that stand in front where they are found",
    "combine": "several taggers: all tags, or those of more than half",
}
TAG_CHOICES = {"rating": tagger.RATINGS, "existing": tagger.EXISTING, "combine": tagger.COMBINE}


def add_tag(steps: Any) -> None:
    """Add ``dataset tag``."""
    command = steps.add_parser(
        "tag",
        help="caption images with a WD tagger",
        formatter_class=Help,
    )
    command.set_defaults(run=tag)
    command.add_argument("source", help="image folder, dataset file (.json), or 'demo'")
    command.add_argument("--out", help="dataset file to write; without it nothing is written")
    command.add_argument(
        "--tagger",
        nargs="+",
        default=[api.AUTO_TAGGER],
        help=f"taggers by name, 'auto' for the first that is there; known: {', '.join(api.KNOWN_TAGGERS)}",
    )
    command.add_argument(
        "--taggers_dir",
        nargs="+",
        default=[TAGGERS_DIR],
        help="folders of taggers; Hugging Face's cache is searched after them",
    )
    command.add_argument(
        "--download",
        action="store_true",
        help="fetch the named taggers into the first taggers_dir if they are nowhere",
    )
    hints = typing.get_type_hints(api.TagSettings)
    for item in dataclasses.fields(api.TagSettings):
        common: dict[str, Any] = {"default": item.default, "help": TAG_HELP[item.name]}
        if hints[item.name] is bool:
            command.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, **common)
        else:
            command.add_argument(
                f"--{item.name}", type=hints[item.name], choices=TAG_CHOICES.get(item.name), **common
            )
    command.add_argument(
        "--batch_size", type=int, default=8, help="pictures at once, where the tagger allows it"
    )
    command.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU if there is one")
    command.add_argument("--cache", default=CACHE_DIR, help="folder of scores, '' to keep none")
    add_source(command)


def tag(arguments: argparse.Namespace) -> int:
    """Tag a dataset and write the dataset file; returns 0."""
    folders = [Path(folder) for folder in arguments.taggers_dir]
    names = list(dict.fromkeys(arguments.tagger))
    found = api.find_taggers(folders)
    if arguments.download:
        for name in names:
            wanted = api.KNOWN_TAGGERS[0] if name == api.AUTO_TAGGER and not found else name
            if wanted not in (*found, api.AUTO_TAGGER):
                print("\n".join(api.download_lines(wanted, folders[0])), file=sys.stderr)
                with Counter("bytes") as counter:
                    found[wanted] = api.download_tagger(wanted, folders[0], progress=counter)
    searched = [*map(str, folders), "Hugging Face's cache"]
    taggers = api.choose_taggers(names, found, searched)
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(api.TagSettings)}
    dataset = open_dataset(arguments.source, arguments)
    with Counter("pictures") as counter:
        edited = api.tag_dataset(
            dataset,
            taggers,
            api.TagSettings(**values),
            device=arguments.device,
            batch_size=arguments.batch_size,
            cache=Path(arguments.cache) if arguments.cache else None,
            progress=counter,
        )
    return _finish(edited, arguments.out)


def add_captions(steps: Any) -> None:
    """Add ``dataset captions``."""
    command = steps.add_parser(
        "captions",
        help="edit captions: triggers, pruning, templates",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="operations, one per line:\n"
        + "\n".join(
            f"  {f'{name}: {kind.argument}' if kind.argument else name:<32} {kind.help}"
            for name, kind in api.CAPTION_OPERATIONS.items()
        )
        + "\n\npresets:\n"
        + "\n".join(
            f"  {name:<16} {text.replace(chr(10), '; ')}" for name, text in api.CAPTION_PRESETS.items()
        ),
    )
    command.set_defaults(run=captions)
    command.add_argument("source", help="image folder, dataset file (.json), or 'demo'")
    command.add_argument("--out", help="dataset file to write; without it the edit is only shown")
    command.add_argument(
        "--preset", choices=tuple(api.CAPTION_PRESETS), default="none", help="operations done first"
    )
    command.add_argument(
        "--trigger", default="", help="trigger words of the preset; default: the folder's words"
    )
    command.add_argument(
        "--do",
        action="append",
        default=[],
        metavar="OPERATION",
        help="one operation; may be given several times",
    )
    command.add_argument("--operations", help="text file of operations, done before those of --do")
    command.add_argument("--separator", default=",", help="what stands between two tags; default: a comma")
    command.add_argument(
        "--set", metavar="FILE", help="first set captions from a list: JSON, or one per line"
    )
    command.add_argument(
        "--template", default="{caption}", help="how --set writes them: {caption} {tags} {trigger} {class}"
    )
    command.add_argument(
        "--prompts", metavar="FILE", help="also write the captions as prompts, brackets escaped"
    )
    add_source(command)


def captions(arguments: argparse.Namespace) -> int:
    """Edit captions and write the dataset file; returns 0."""
    text = _read_text(Path(arguments.operations)) if arguments.operations else ""
    operations = "\n".join([text.rstrip(), *arguments.do]).lstrip("\n")
    dataset = open_dataset(arguments.source, arguments)
    lines: tuple[str, ...] = ()
    if arguments.set:
        given = api.set_captions(
            dataset,
            api.read_caption_list(Path(arguments.set)),
            template=arguments.template,
            trigger=arguments.trigger,
            separator=arguments.separator,
        )
        dataset, lines = given.dataset, given.lines
    edited = api.edit_captions(
        dataset,
        operations,
        preset=arguments.preset,
        trigger=arguments.trigger,
        separator=arguments.separator,
    )
    if arguments.prompts:
        prompts = [api.escape_brackets(record.caption) for record in edited.dataset.records]
        write_text(Path(arguments.prompts), "\n".join(prompts) + "\n")
    return _finish(dataclasses.replace(edited, lines=(*lines, *edited.lines)), arguments.out)


def add_tags(steps: Any) -> None:
    """Add ``dataset tags``."""
    command = steps.add_parser(
        "tags",
        help="count the tags of all captions",
        formatter_class=Help,
    )
    command.set_defaults(run=tags)
    command.add_argument("source", help="image folder, dataset file (.json), or 'demo'")
    command.add_argument("--top", type=int, default=50, help="how many of the most frequent tags to show")
    command.add_argument("--separator", default=",", help="what stands between two tags")
    command.add_argument("--json", action="store_true", help="print all counts as JSON")
    add_source(command)


def tags(arguments: argparse.Namespace) -> int:
    """Print how often each tag occurs; returns 0."""
    dataset = open_dataset(arguments.source, arguments)
    counts = api.count_tags(dataset.records, arguments.separator)
    if arguments.json:
        print(json.dumps({"images": len(dataset.records), "tags": counts}, ensure_ascii=False, indent=1))
    else:
        print("\n".join(api.frequency_lines(counts, len(dataset.records), top=max(0, arguments.top))))
    return 0


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoraGraftError(
            "LG-DATA-072",
            "The file of caption operations is not UTF-8 text.",
            where=str(file),
            why=str(error),
            fix="open it in a text editor and save it with the encoding UTF-8",
        ) from None


def _finish(edited: api.Edited, out: str | None) -> int:
    print("\n".join(edited.lines))
    for record in edited.dataset.records[:NUM_SHOWN]:
        print(f"  {record.name}: {record.caption}")
    if out:
        api.save_dataset(edited.dataset, out)
        print(f"Dataset       {out}")
    else:
        print("Nothing was written; --out FILE.json keeps it.")
    return 0


STEPS = (add_tag, add_captions, add_tags)
