"""A config of kohya's as text becomes values by name: TOML or a command line, each of its argument's kind."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..data.kohya_keys import SWITCH
from ..errors import listed, one_line
from . import kohya_scripts as scripts
from . import kohya_table as table
from . import lora_scripts
from .command_text import Command, Options, read_command
from .imported import Findings, foreign, not_readable
from .kohya_network import KEYS as NETWORK_KEYS
from .kohya_values import WRONG, instead_of, typed, written

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib


def read_values(text: str, where: str, found: Findings) -> tuple[scripts.Script, dict[str, Any]]:
    """Return the script and what is given, by kohya's names; empty text counts as not given."""
    try:
        parsed = tomllib.loads(text.removeprefix("\ufeff"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if "--" not in text:
            raise not_readable(where, f"{error or 'it is nested too deeply'}.") from None
        parsed = None
    if parsed is not None and not any(key.startswith("-") for key in parsed):
        return _of_toml(parsed, found)
    return _of_command(read_command(text, where), where, found)


def _of_toml(parsed: Mapping[str, Any], found: Findings) -> tuple[scripts.Script, dict[str, Any]]:
    pairs = [(key, value) for key, value in _flat(parsed) if value not in ("", None)]
    script = scripts.script_of({key: value for key, value in pairs if value is not False})
    page = {key: value for key, value in pairs if key in lora_scripts.KEYS}
    rest = [pair for pair in pairs if pair[0] not in page]
    return script, of_pairs([*rest, *lora_scripts.sample_prompts(page, found).items()], script, found)


def of_pairs(pairs: Iterable[tuple[str, Any]], script: scripts.Script, found: Findings) -> dict[str, Any]:
    """Return arguments as a file gives them, each value of its argument's kind; faults go to ``found``."""
    given: dict[str, Any] = {}
    for key, value in pairs:
        name = _known(key, value, script, found)
        if name is None:
            continue
        kind = table.kind_of(name)
        taken = typed(kind, value)
        if taken is WRONG:
            found.expect(name, value, kind, f"{name} = {instead_of(kind, value)}")
        else:
            _take(given, name, taken, found)
    return given


def _flat(parsed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every setting; kohya's trainer ignores the names of the tables that they stand in."""
    for key, value in parsed.items():
        if not isinstance(value, dict):
            yield key, value
        elif key not in table.LORA_SCRIPTS_TABLES:
            yield from value.items()


def _of_command(command: Command, where: str, found: Findings) -> tuple[scripts.Script, dict[str, Any]]:
    _check_program(command.program, where)
    given: dict[str, Any] = {}
    named = {option: values[0] if values else True for option, values in command.options}
    script = scripts.SCRIPTS.get(command.program) or scripts.script_of(named)
    of_options(command.options, script, given, found)
    launcher = [token for token in command.before if token.startswith("-") and token != "-m"]
    if launcher:
        found.notes.append(f"{listed(launcher)}: options of the launcher, not of the run.")
    return script, given


def of_options(options: Options, script: scripts.Script, given: dict[str, Any], found: Findings) -> None:
    """Add the arguments of a command line to ``given``, each of its kind; faults go to ``found``."""
    for option, values in options:
        name = _known(_completed(option, script), values[0] if values else True, script, found)
        if name is None:
            continue
        kind = table.kind_of(name)
        taken = written(kind, values)
        if taken is WRONG:
            text = " ".join(values)
            if kind == SWITCH:
                found.expect(f"--{name}", text, "no value", f"--{name} alone")
            else:
                found.expect(f"--{name}", text, kind, f"--{name} {instead_of(kind, text)}")
        elif taken != "":
            _take(given, name, taken, found)


def _completed(option: str, script: scripts.Script) -> str:
    """Return the argument that an abbreviation means: kohya's parser takes a beginning that only one has."""
    known = table.all_arguments()
    fitting = [name for name in known if name.startswith(option) and scripts.has(script, name)]
    return option if option in known else fitting[0] if len(fitting) == 1 else option


def _check_program(program: str, where: str) -> None:
    if program == "" or program in scripts.SCRIPTS:
        return
    if program.startswith("hcpdiff"):
        raise foreign(
            "This is a command line of HCP-Diffusion.",
            where,
            why="its settings stand in the file that --cfg names.",
            fix="give that .yaml file, and its key=value settings behind it",
        )
    what = scripts.OTHERS.get(program)
    raise foreign(
        f"This is a command line of {one_line(program, 60)}.",
        where,
        why=f"it trains {what}; the scripts whose arguments are known train a LoRA."
        if what
        else "it is not known.",
        fix=f"give a command line of {listed(scripts.SCRIPTS)}",
    )


def _known(key: str, value: Any, script: scripts.Script, found: Findings) -> str | None:
    """Return the argument of this name, or None where it is refused or means nothing."""
    if key in table.all_arguments():
        if scripts.has(script, key):
            return key
        if value is not False:
            why = f"{listed(scripts.ONLY[key])} has it, and {script.program} does not"
            found.refuse(f"{key} {one_line(str(value), 40)}", why, f"remove {key}, or name the right script")
    elif key in table.LORA_SCRIPTS:
        harmless, fix = table.LORA_SCRIPTS[key]
        if value in harmless:
            found.notes.append(f"{key}: lora-scripts' own key; kohya's trainer does not read it.")
        else:
            found.refuse(f"{key} {one_line(str(value), 40)}", "kohya's trainer does not read it", fix)
    elif key in scripts.OTHERS_ARGUMENTS:
        if value is not False:
            why = f"it is an argument for {scripts.OTHERS_ARGUMENTS[key]}; {script.program} does not have it"
            found.refuse(f"{key} {one_line(str(value), 40)}", why, "remove it")
    elif any(key in keys for keys in NETWORK_KEYS.values()):
        found.refuse(
            key,
            "kohya's trainer reads it in network_args alone",
            f'write network_args = ["{key}={one_line(str(value), 40)}"]',
        )
    else:
        found.not_known(key, sorted({*table.all_arguments(), *table.LORA_SCRIPTS}))
    return None


def _take(given: dict[str, Any], name: str, value: Any, found: Findings) -> None:
    if name in given and given[name] != value:
        found.notes.append(f"{name} is given twice; the last counts, {one_line(str(value), 60)}.")
    given[name] = value
