"""The jobs from file to file, as commands and nodes call them: read, work, write, say what was done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.files import DTYPES
from ..errors import listed
from .bake import merge_into_checkpoint
from .convert import convert_naming
from .extract import ExtractSettings, extract_lora
from .lora_file import LoraFile, check_free, precision_of, read_lora, save_lora
from .merge import MergeSettings, merge_loras
from .places import places_in
from .resize import ResizeSettings, resize
from .stream import open_weights

PRECISIONS = ("same", *DTYPES)
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """What a job wrote, and what it has to say, a line for each module last."""

    path: Path
    lines: tuple[str, ...]

    @property
    def report(self) -> str:
        """All lines as one text."""
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Output:
    """Where a result goes; ``precision`` is one of PRECISIONS."""

    path: Path
    precision: str = "same"
    overwrite: bool = False


def resize_lora(path: Path, output: Output, settings: ResizeSettings, *, device: str = "cpu") -> Written:
    """Write a LoRA at other ranks; see ``resize``. Raises LG-TOOL and LG-SAVE errors."""
    check_free(output.path, overwrite=output.overwrite)
    file = read_lora(path)
    new, report = resize(file, settings, device=device)
    _save(new, file, output)
    ranks = [told.rank for told in report]
    mean = sum(told.kept for told in report) / len(report)
    head = (
        f"{len(report)} modules, ranks {min(ranks)} to {max(ranks)}, {mean:.2%} of the norm kept on average."
    )
    return Written(output.path, (head, *map(str, report)))


def merge_lora(
    paths: Sequence[Path], ratios: Sequence[float], output: Output, settings: MergeSettings
) -> Written:
    """Write several LoRAs as one; see ``merge_loras``. Raises LG-TOOL and LG-SAVE errors."""
    check_free(output.path, overwrite=output.overwrite)
    files = [read_lora(path) for path in paths]
    new = merge_loras(files, ratios, settings)
    _save(new, files[0], output)
    head = f"{len(files)} LoRAs with {len(new.modules)} modules, method {settings.method}."
    return Written(output.path, (head, *(f"{m.name}: rank {m.rank}" for m in new.modules.values())))


def merge_checkpoint(
    checkpoint: Path,
    loras: Sequence[tuple[Path, float]],
    output: Output,
    *,
    device: str = "cpu",
    tell: Tell = lambda done, total: None,
) -> Written:
    """Write a checkpoint with LoRAs in it; see ``merge_into_checkpoint``. Raises LG-TOOL errors."""
    files = [(read_lora(path), ratio) for path, ratio in loras]
    merge_into_checkpoint(
        checkpoint,
        files,
        output.path,
        precision=output.precision,
        overwrite=output.overwrite,
        device=device,
        tell=tell,
    )
    lines = (f"{file.name} at {ratio:g}: {len(file.modules)} modules merged." for file, ratio in files)
    return Written(output.path, tuple(lines))


def extract_lora_file(
    original: Path,
    tuned: Path,
    output: Output,
    settings: ExtractSettings,
    *,
    device: str = "cpu",
    tell: Tell = lambda done, total: None,
) -> Written:
    """Write the LoRA between two checkpoints; see ``extract_lora``. Raises LG-TOOL and LG-SAVE errors."""
    check_free(output.path, overwrite=output.overwrite)
    file, report = extract_lora(original, tuned, settings, device=device, tell=tell)
    precision = "fp16" if output.precision == "same" else output.precision
    save_lora(output.path, file.tensors(), file.metadata, precision=precision, overwrite=output.overwrite)
    differing = [told.error for told in report if told.norm]
    mean = sum(differing) / len(differing)
    head = f"{len(report)} modules, {mean:.2%} of a difference is not in the LoRA on average."
    encoders = {
        name.split("_")[1] for name in places_in(open_weights(original)) if name.startswith("lora_te")
    }
    same = sorted(encoders - {told.name.split("_")[1] for told in report})
    text = (f"The text encoders are the same: {listed(same)}.",) if same else ()
    return Written(output.path, (head, *text, *map(str, report)))


def convert_lora(path: Path, output: Output, naming: str) -> Written:
    """Write a LoRA under another naming; see ``convert_naming``. Raises LG-TOOL and LG-SAVE errors."""
    check_free(output.path, overwrite=output.overwrite)
    file = read_lora(path)
    new = convert_naming(file, naming)
    _save(new, file, output)
    return Written(
        output.path, (f"{len(file.modules)} modules written as {len(new.modules)} of {naming}'s naming.",)
    )


def _save(new: LoraFile, old: LoraFile, output: Output) -> None:
    precision = precision_of(old, output.precision)
    save_lora(output.path, new.tensors(), new.metadata, precision=precision, overwrite=output.overwrite)
