"""The command line: ``loragraft`` or ``python -m loragraft.trainer``."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from . import api
from .config import DatasetConfig, TrainConfig, info_of
from .errors import LoraGraftError
from .progress import ProgressLine

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 refused with a message, 130 stopped."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except LoraGraftError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(_unreachable(error), file=sys.stderr)
    return 1


def _unreachable(error: OSError) -> LoraGraftError:
    return LoraGraftError(
        "LG-CLI-003",
        "A file cannot be read or written.",
        where=str(error.filename or "unknown file"),
        why=f"{error.strerror or error}.",
        fix="check the path, the free space and the rights on its folder",
    )


def _train(arguments: argparse.Namespace) -> int:
    settings, base_path, data_path = _settings(arguments)
    data_config, train_config = api.make_both(settings, where=str(arguments.config or "command line"))
    base = _open_base(base_path, arguments)
    folder = api.demo_dataset() if data_path == "demo" else Path(data_path)
    dataset = api.scan_folder(folder, on_bad=arguments.on_bad, class_tokens=arguments.class_tokens)
    train_set = api.build_train_set(dataset, data_config)
    output = Path(arguments.output_dir)
    places = api.Places(output / "runs", output / "loras", output / "cache")
    events = api.train(
        base, train_set, train_config, places=places, device=arguments.device, fresh=arguments.fresh
    )
    with _StopFlag() as stop, ProgressLine(sys.stderr) as line:
        for event in events:
            line.show(event)
            if stop.wanted:
                events.close()
                print(
                    "Stopped; the last finished step is saved. The same command continues.", file=sys.stderr
                )
                return 130
            if isinstance(event, api.Finished):
                print(f"LoRA          {event.lora_file}")
                print(f"Trigger words {event.trigger_words}")
                print(f"Run folder    {event.run_folder}")
    return 0


def _dataset(arguments: argparse.Namespace) -> int:
    settings, _, data_path = _settings(arguments)
    config, _ = api.make_both(settings, where=str(arguments.config or "command line"))
    folder = api.demo_dataset() if data_path == "demo" else Path(data_path)
    dataset = api.scan_folder(folder, on_bad=arguments.on_bad, class_tokens=arguments.class_tokens)
    print("\n".join((*dataset.lines, *api.build_train_set(dataset, config).lines)))
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    base = _open_base(arguments.pretrained_model_name_or_path, arguments)
    strengths = api.parse_range(arguments.strengths)
    files = [Path(f) for f in arguments.lora]
    size = api.DrawSettings(
        (arguments.height, arguments.width),
        arguments.steps,
        arguments.cfg,
        arguments.clip_skip,
        arguments.negative,
    )
    drawn = api.draw(
        base,
        files,
        prompts=arguments.prompts,
        seeds=arguments.seeds,
        strengths=strengths,
        settings=size,
        device=arguments.device,
    )
    rows: dict[tuple[str, int], list[Any]] = {}
    for cell in drawn:
        rows.setdefault((cell.prompt, cell.seed), []).append(cell.image)
        print(f"{cell.lora} at {cell.strength:g}: {cell.prompt!r}, seed {cell.seed}", file=sys.stderr)
    columns = [f"{f.stem} {s:g}" if len(files) > 1 else f"{s:g}" for f in files for s in strengths]
    sheet = api.grid(
        list(rows.values()), [f"{p} ({s})" for p, s in rows], columns, title=", ".join(arguments.lora)
    )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
    print(f"Grid          {output}")
    return 0


def _open_base(path: str, arguments: argparse.Namespace) -> api.Base:
    if path == "demo":
        return api.open_demo_base()
    return api.open_base(path, tokenizer=arguments.tokenizer, allow_download=arguments.allow_download)


class _StopFlag:
    """The first Ctrl-C asks for a stop after the running step; the second ends the process at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> _StopFlag:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


# Settings of the command line that are no training settings, with kohya's names where it has them.
PLACES = {"pretrained_model_name_or_path": "base model", "train_data_dir": "image folder"}


def _settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, str]:
    """Merge the config file (tables flattened, as kohya does) and the flags, which win."""
    settings: dict[str, Any] = {}
    if arguments.config:
        try:
            loaded = tomllib.loads(Path(arguments.config).read_text(encoding="utf-8-sig"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise LoraGraftError(
                "LG-CLI-001",
                "The config file cannot be read.",
                where=str(arguments.config),
                why=str(error),
                fix="check the path and the TOML at the named line; the file must be UTF-8",
            ) from None
        for key, value in loaded.items():
            settings.update(value if isinstance(value, dict) else {key: value})
    settings.update({k: v for k, v in vars(arguments).items() if k in _flags() and v is not None})
    places = []
    for key, what in PLACES.items():
        given = getattr(arguments, key, None) or settings.pop(key, None)
        settings.pop(key, None)
        if given is None and not (key == "pretrained_model_name_or_path" and arguments.run is _dataset):
            raise LoraGraftError(
                "LG-CLI-002",
                f"No {what} was named.",
                where=f"--{key}",
                why="there is nothing to train on.",
                fix=f"add --{key} PATH, or 'demo' for the embedded one",
            )
        places.append(given or "")
    return settings, places[0], places[1]


def _flags() -> dict[str, tuple[type, Any]]:
    flags: dict[str, tuple[type, Any]] = {}
    for cls in (DatasetConfig, TrainConfig):
        hints = typing.get_type_hints(cls)
        flags.update({f.name: (cls, hints[f.name]) for f in dataclasses.fields(cls)})
    return flags


def _literal(text: str) -> Any:
    """Read a flag's value as TOML does (512, 1e-4, true, [512, 768]), or as a number (.5), else as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("loragraft", description="Train LoRAs without a graph.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help in (
        ("train", _train, "train a LoRA"),
        ("dataset", _dataset, "show what a folder would be trained as"),
    ):
        command = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        command.add_argument("--config", help="TOML file of settings; flags win over it")
        command.add_argument("--train_data_dir", help="image folder, or 'demo'")
        command.add_argument(
            "--class_tokens", default="", help="class words where the folder name gives none"
        )
        command.add_argument(
            "--on_bad", choices=("stop", "skip"), default="stop", help="what to do about unreadable images"
        )
        if run is _train:
            _add_base_arguments(command, required=False)
            command.add_argument("--output_dir", default="output", help="where runs/, loras/ and cache/ go")
            command.add_argument(
                "--fresh", action="store_true", help="set an earlier run of the same settings aside"
            )
        for flag, (cls, hint) in _flags().items():
            if run is _train or cls is DatasetConfig:
                info = info_of(cls, flag)
                plural = typing.get_origin(hint) is tuple
                command.add_argument(
                    f"--{flag}",
                    type=str if plural or hint is str else _literal,
                    nargs="+" if plural else None,
                    help=info.help.replace("%", "%%")
                    + (f" One of: {', '.join(info.choices)}." if info.choices else ""),
                )
    _add_preview(commands)
    return parser


def _add_preview(commands: Any) -> None:
    command = commands.add_parser(
        "preview",
        help="draw prompts with a LoRA at several strengths",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=_preview)
    _add_base_arguments(command, required=True)
    command.add_argument(
        "--lora", nargs="+", required=True, help="LoRA files, for instance a run's checkpoints"
    )
    command.add_argument("--prompts", nargs="+", required=True)
    command.add_argument("--negative", default="", help="negative prompt")
    command.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    command.add_argument(
        "--strengths", default="0, 0.7-1 [2]", help="numbers and ranges; 0 is without the LoRA"
    )
    command.add_argument("--width", type=int, default=512)
    command.add_argument("--height", type=int, default=512)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--cfg", type=float, default=7.0)
    command.add_argument("--clip_skip", type=int, default=1)
    command.add_argument("--output", default="output/grid.png", help="where the grid goes")


def _add_base_arguments(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "--pretrained_model_name_or_path", required=required, help="base model file or folder, or 'demo'"
    )
    command.add_argument("--tokenizer", help="folder with vocab.json and merges.txt")
    command.add_argument(
        "--allow_download", action="store_true", help="let the tokenizer be fetched from the hub"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")


if __name__ == "__main__":
    sys.exit(main())
