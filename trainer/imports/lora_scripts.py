"""Keys of lora-scripts' pages that its server turns into kohya's arguments before it trains.

Facts: lora-scripts' schema files and the server's function that writes the file of sample prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.kohya_keys import NUMBER, SWITCH, TEXT, WHOLE
from .imported import Findings
from .kohya_values import WRONG, instead_of, typed

PREVIEW, POSITIVE, FILE = "enable_preview", "positive_prompts", "prompt_file"
BY_CHANCE = "randomly_choice_prompt"
# Key -> the flag behind a sample prompt, and what the server takes without the key.
FLAGS: Mapping[str, tuple[str, Any]] = {
    "negative_prompts": ("n", ""),
    "sample_width": ("w", 512),
    "sample_height": ("h", 512),
    "sample_cfg": ("l", 7),
    "sample_steps": ("s", 24),
    "sample_seed": ("d", 2333),
}
KEYS: Mapping[str, str] = {  # what kind of value each has
    **dict.fromkeys((PREVIEW, BY_CHANCE), SWITCH),
    **dict.fromkeys((POSITIVE, FILE), TEXT),
    **dict.fromkeys(FLAGS, WHOLE),
    "negative_prompts": TEXT,
    "sample_cfg": NUMBER,
}
PROMPTS = "sample_prompts"
PROMPT_FILES = (".txt", ".json", ".toml")


def sample_prompts(given: Mapping[str, Any], found: Findings) -> dict[str, str]:
    """Return what the preview's keys mean as sample_prompts: a file's path, or a prompt's text; {} for none.

    Prompts that are drawn by chance are refused, and so are values of another kind. Where enable_preview is
    off, the other keys say nothing.
    """
    own = ", ".join(name for name in KEYS if name in given)
    read = {name: typed(KEYS[name], value) for name, value in given.items()}
    wrong = [name for name, value in read.items() if value is WRONG]
    for name in wrong:
        kind, usual = KEYS[name], FLAGS.get(name, ("", ""))[1]
        found.expect(name, given[name], kind, f"{name} = {usual or instead_of(kind, given[name])}")
    if wrong:
        return {}
    given = read
    if given.get(PREVIEW) is False:
        found.notes.append(f"{own}: lora-scripts draws no previews with {PREVIEW} off.")
    elif given.get(BY_CHANCE):
        found.refuse(BY_CHANCE, "which caption is drawn would be chance", f"write {POSITIVE} instead")
    elif file := given.get(FILE):
        found.notes.append(f"{own}: {FILE} is taken as {PROMPTS}, as lora-scripts does.")
        return {PROMPTS: str(file)}
    elif prompt := given.get(POSITIVE):
        options = {flag: given.get(name, default) for name, (flag, default) in FLAGS.items()}
        flags = [f"--{flag} {value}" for flag, value in options.items() if value != ""]
        found.notes.append(f"{own}: {PROMPTS} is made of them, as lora-scripts does.")
        return {PROMPTS: " ".join(" ".join([str(prompt), *flags]).split())}
    elif own:
        found.notes.append(f"{own}: without {POSITIVE} lora-scripts draws nothing.")
    return {}


def prompt_lines(value: str) -> list[str]:
    """Return the prompts of a sample_prompts that is their text and no file's name; [] for a name."""
    if " --" not in value or value.casefold().endswith(PROMPT_FILES):
        return []
    return [line.strip() for line in value.splitlines() if line.strip()]
