"""What the guides advise about a dataset, checked on this one; each hint says what to do and who says so.

The numbers are the guides' own, in the tables below; docs/dataset-report.md lists them with their
sources. Hints never stop a run: what must stop one is an error elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .balance import concept_of
from .captions import is_varied, tags_of
from .records import Record
from .tag_lists import plain
from .train_set import TrainSet

# The guides, as docs/dataset-report.md names them.
SCRIPTS_NOTES = "sd-scripts notes"
WINDOWS_README = "lora-scripts-windows"
LORA_NOTES = "LoRA training notes"
ANON_GUIDE = "LoRA guide by anons"

MAX_ASPECT = 2.0
MAX_UPSCALE = 2.0
MAX_IMBALANCE = 1.5
MIN_IMAGES_FOR_REG = 30
COMMON_BACKGROUND = 0.6
MIXED_STYLES = 0.1
MIN_FOR_ANY = 15
# kind -> (fewest images, what the guides say, who says it)
ENOUGH: dict[str, tuple[int, str, str]] = {
    "character": (50, "50 to 100 for a character", f"{LORA_NOTES}, {ANON_GUIDE}"),
    "style": (75, "75 to 150, or at least 100, for a style", f"{ANON_GUIDE}, {LORA_NOTES}"),
    "concept": (50, "at least 50, of varied kinds, for a concept", LORA_NOTES),
    "face": (20, "20 to 30 for a face", SCRIPTS_NOTES),
}
WATERMARKS = (
    *("watermark", "signature", "artist name", "artist logo", "logo", "text", "english text", "web address"),
    *("twitter username", "patreon username", "patreon logo", "username", "copyright name", "dated"),
    *("sample watermark", "speech bubble", "subtitled", "translated"),
)
CROWDS = ("4girls", "5girls", "6+girls", "4boys", "5boys", "6+boys", "crowd", "everyone")
BACKGROUNDS = (
    *("simple background", "white background", "grey background", "gray background", "black background"),
    *("transparent background", "gradient background", "blue background", "pink background", "indoors"),
    *("outdoors", "blurry background", "two-tone background", "yellow background", "red background"),
    *("green background", "brown background", "purple background", "beach", "forest", "classroom", "night"),
)


@dataclass(frozen=True)
class Advice:
    """One hint: what is the case, what to do about it, which guide says so, and the images concerned."""

    id: str
    text: str
    fix: str
    source: str
    names: tuple[str, ...] = ()


def advise(
    train_set: TrainSet,
    report: Mapping[str, Any],
    known_word: Callable[[str], str | None] | None = None,
    near: Sequence[Sequence[str]] = (),
) -> list[Advice]:
    """Return the hints for a train set; ``report`` is what `report_data` found so far."""
    own = [r for r in train_set.records if not r.is_reg]
    return [
        *_shapes(train_set),
        *_copies(train_set, near),
        *_amounts(train_set, report, own),
        *_tagged(train_set, own),
        *_words(train_set, report, own, known_word),
        *_batches(report),
    ]


# ---- pictures ----


def _shapes(train_set: TrainSet) -> Iterator[Advice]:
    records = train_set.records
    extreme = [r.name for r in records if max(r.size) > MAX_ASPECT * min(r.size)]
    if extreme:
        yield Advice(
            "aspect",
            f"{_images(extreme)} longer than 1:2; little of the short side is left when scaled.",
            "crop them to the subject (Crop, beyond 1:2), or remove them",
            LORA_NOTES,
            tuple(extreme),
        )
    factors = {
        r.name: max(wide / r.size[1], high / r.size[0])
        for r, (wide, high) in zip(records, train_set.resized, strict=True)
    }
    small = sorted((n for n, f in factors.items() if f > 1), key=lambda n: -factors[n])
    if small:
        worst = max(factors.values())
        fix = "enlarge them with an upscale model (Crop node), at most 2 times, or set bucket_no_upscale"
        if worst > MAX_UPSCALE:
            fix = "remove those more than 2 times too small; enlarge the others with an upscale model"
        yield Advice(
            "small",
            f"{_images(small)} smaller than the training size, by up to {worst:.2g} times.",
            fix,
            f"{LORA_NOTES}, {ANON_GUIDE}",
            tuple(small),
        )
    cut = [
        r.name
        for r, config, (w, h), (wide, high) in zip(
            records, train_set.configs, train_set.buckets, train_set.resized, strict=True
        )
        if not config.enable_bucket and (wide, high) != (w, h)
    ]
    if cut:
        yield Advice(
            "not_bucketed",
            f"{_images(cut)} of another shape than the resolution; their edges are cut off.",
            "set enable_bucket to true, or crop them yourself and look at the result",
            SCRIPTS_NOTES,
            tuple(cut),
        )


def _copies(train_set: TrainSet, near: Sequence[Sequence[str]]) -> Iterator[Advice]:
    same: dict[str, list[str]] = {}
    for group in train_set.groups:
        for record in train_set.records[group.first : group.last]:
            if record.content_hash:
                same.setdefault(f"{group.first} {record.content_hash} {record.crop}", []).append(record.name)
    twins = [names for names in same.values() if len(names) > 1]
    if twins:
        yield Advice(
            "duplicates",
            f"{_images([n for names in twins for n in names])} in {len(twins)} groups of equal copies.",
            "keep one of each (Find Duplicates); to count a picture more often, raise its repeats",
            WINDOWS_README,
            tuple(" = ".join(names) for names in twins),
        )
    if near:
        yield Advice(
            "near_duplicates",
            f"{len(near)} groups of nearly equal pictures.",
            "keep the best of each (Find Duplicates): similar pictures are learned by heart",
            WINDOWS_README,
            tuple(" ~ ".join(names) for names in near),
        )


# ---- numbers ----


def _amounts(train_set: TrainSet, report: Mapping[str, Any], own: Sequence[Record]) -> Iterator[Advice]:
    samples = {c["name"]: c["samples"] for c in report["concepts"] if not c["regularisation"]}
    if len(samples) > 1 and max(samples.values()) > MAX_IMBALANCE * min(samples.values()):
        most, least = max(samples, key=samples.__getitem__), min(samples, key=samples.__getitem__)
        yield Advice(
            "imbalance",
            f"'{most}' is shown {samples[most] / samples[least]:.2g} times as often as '{least}'.",
            "switch balance_concepts on, or raise the repeats of the smaller one",
            f"{LORA_NOTES}, {ANON_GUIDE}",
        )
    kind = report["kind"]
    fewest, wanted, source = ENOUGH.get(
        kind,
        (MIN_FOR_ANY, "20 to 30 for a face and 50 to 100 for a character", f"{SCRIPTS_NOTES}, {ANON_GUIDE}"),
    )
    if len(own) < fewest:
        yield Advice(
            "few",
            f"{_images(own)} to train on; the guides name {wanted}.",
            "add good and varied pictures; with few, train fewer steps at a lower rate and watch the samples",
            source,
        )
    if report["images"]["regularisation"] and len(own) < MIN_IMAGES_FOR_REG:
        yield Advice(
            "reg_few",
            f"Regularisation beside only {len(own)} training images may keep the subject from being learned.",
            f"train without it below {MIN_IMAGES_FOR_REG} images, or lower prior_loss_weight to about 0.3",
            WINDOWS_README,
        )


def _batches(report: Mapping[str, Any]) -> Iterator[Advice]:
    for group in report["groups"]:
        size = group["batch_size"]
        short = [b for b in group["buckets"] if b["samples"] < size]
        if short:
            names = tuple(f"{b['size'][0]}x{b['size'][1]} ({b['samples']})" for b in short)
            where = f" of group {group['number']}" if len(report["groups"]) > 1 else ""
            yield Advice(
                "batch",
                f"{len(short)} of {len(group['buckets'])} buckets{where} hold less than one batch of {size}.",
                "lower the batch size, crop to fewer shapes, or set bucket_reso_steps higher or num_bucket",
                SCRIPTS_NOTES,
                names,
            )


# ---- captions ----


def _tagged(train_set: TrainSet, own: Sequence[Record]) -> Iterator[Advice]:
    tags = {r.name: {plain(t) for t in tags_of(r.caption, train_set.config.caption_separator)} for r in own}
    marked = [name for name, found in tags.items() if found & set(WATERMARKS)]
    if marked:
        found = Counter(t for name in marked for t in tags[name] & set(WATERMARKS))
        yield Advice(
            "watermark",
            f"{_images(marked)} tagged with writing or a mark: {', '.join(found)}.",
            "paint it over or crop it off; else keep the tag, so that it stays apart from the subject",
            WINDOWS_README,
            tuple(marked),
        )
    crowded = [name for name, found in tags.items() if found & set(CROWDS)]
    if crowded:
        yield Advice(
            "people",
            f"{_images(crowded)} with more than three people.",
            "crop them to the subject or remove them",
            LORA_NOTES,
            tuple(crowded),
        )
    counts = Counter(t for found in tags.values() for t in found & set(BACKGROUNDS))
    for tag, count in counts.most_common(1):
        if len(own) >= 5 and count > COMMON_BACKGROUND * len(own):
            yield Advice(
                "background",
                f"'{tag}' is in {count} of {len(own)} captions; it may be learned as part of the subject.",
                "keep that tag in the captions, and add pictures with other backgrounds",
                WINDOWS_README,
            )


def _words(
    train_set: TrainSet,
    report: Mapping[str, Any],
    own: Sequence[Record],
    known_word: Callable[[str], str | None] | None,
) -> Iterator[Advice]:
    captions = report["captions"]
    styles = captions["styles"]
    tags, prose = styles.get("tags", 0), styles.get("sentence", 0)
    if min(tags, prose) > MIXED_STYLES * len(own):
        yield Advice(
            "styles",
            f"{tags} captions are lists of tags and {prose} are sentences.",
            "write all in one way: tags for anime models, sentences for realistic ones",
            ANON_GUIDE,
        )
    if captions["over"]:
        length = captions["longest"][1]
        yield Advice(
            "long",
            f"{_captions(captions['over'])} longer than 75 tokens (up to {length}, counted by "
            f"{captions['counted_by']}).",
            "set max_token_length to 150 or 225 in the training settings, or shorten them; else they are cut",
            ANON_GUIDE,
            tuple(captions["over"]),
        )
    if captions["empty"] and not all(c.caption_template for c in train_set.configs):
        yield Advice(
            "empty",
            f"{captions['empty']} images are trained without any words.",
            "write captions or class words for them",
            ANON_GUIDE,
        )
    yield from _triggers(train_set, own, known_word)


def _triggers(
    train_set: TrainSet, own: Sequence[Record], known_word: Callable[[str], str | None] | None
) -> Iterator[Advice]:
    concepts: dict[str, list[Record]] = {}
    for record in own:
        if record.concept:
            concepts.setdefault(concept_of(record), []).append(record)
    for concept, members in concepts.items():
        without = [r.name for r in members if concept.casefold() not in r.caption.casefold()]
        templated = any(dict(r.overrides).get("caption_template") for r in members)
        if without and len(without) == len(members) and not (templated or train_set.config.caption_prefix):
            yield Advice(
                "no_trigger",
                f"The class words '{concept}' are in none of the {len(members)} captions of their images.",
                "beside caption files class words do nothing: put them first in each (Edit Captions)",
                f"{WINDOWS_README}, {LORA_NOTES}",
                tuple(without),
            )
        reason = known_word(concept) if known_word else None
        if reason:
            yield Advice(
                "known_trigger",
                f"The base model may know '{concept}' already: {reason}.",
                "give what you train a name of its own, unless you want to build on what the word means",
                LORA_NOTES,
            )
    shuffled = [c for c in train_set.configs if c.shuffle_caption and not c.keep_tokens]
    marked = any(c.keep_tokens_separator or c.caption_template for c in shuffled)
    if concepts and shuffled and not marked and is_varied(train_set.configs[0]):
        yield Advice(
            "keep_tokens",
            "shuffle_caption moves every tag, also the trigger word.",
            "set keep_tokens to 1, so that the trigger word stays in front",
            f"{WINDOWS_README}, {ANON_GUIDE}",
        )


def _images(names: Sequence[Any]) -> str:
    return f"{len(names)} image{'' if len(names) == 1 else 's'}"


def _captions(names: Sequence[Any]) -> str:
    return f"{len(names)} caption{' is' if len(names) == 1 else 's are'}"
