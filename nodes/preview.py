"""Preview with LoRA: prompts x seeds x strengths x files, drawn by ComfyUI's own sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..trainer.errors import LoraGraftError
from ..trainer.sweep import shared_start
from .train import Checkpoints


class PreviewWithLoRA(io.ComfyNode):
    """Draw a grid whose cells equal what the native nodes draw."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from . import host_sampling as sampling

        return io.Schema(
            node_id="LoraGraftPreviewWithLoRA",
            display_name="Preview with LoRA",
            category="LoraGraft/test",
            description="Draws every prompt and seed with every LoRA strength and checkpoint, through "
            "ComfyUI's "
            "own sampler: a cell has the same pixels as Load LoRA, KSampler and VAE Decode of the same "
            "settings.",
            search_aliases=["xy plot", "grid", "compare lora", "lora test"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, as it goes into Train LoRA, without the LoRA under test.",
                ),
                io.Clip.Input("clip", tooltip="The base's text encoder, without the LoRA under test."),
                io.Vae.Input("vae", tooltip="The VAE that decodes the images."),
                io.String.Input(
                    "lora_name",
                    default="",
                    tooltip="LoRA file below models/loras: link Train LoRA's lora_name, or write a name with "
                    ".safetensors. With checkpoints linked it may stay empty. A linked text may name several "
                    "files, one per line, as after a sweep; each gets its own rows.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt per line; each gets its own columns.",
                ),
                io.String.Input(
                    "negative", default="", multiline=True, tooltip="Negative prompt of all cells."
                ),
                io.String.Input(
                    "seeds", default="1, 2", tooltip="Seeds: 1, 2, 5-8. Each gets its own column."
                ),
                io.String.Input(
                    "strengths",
                    default="0, 1",
                    tooltip="LoRA strengths on the model, one row each; 0 draws without LoRA. Ranges: "
                    "0, 0.7-1.5 [5] means 0 and five values from 0.7 to 1.5.",
                ),
                io.String.Input(
                    "clip_strengths",
                    default="same",
                    tooltip="LoRA strengths on the text encoder: same, or a range as above; then each is "
                    "drawn "
                    "with each.",
                ),
                io.Combo.Input(
                    "sampler_name", options=sampling.samplers, default="euler", tooltip="As in KSampler."
                ),
                io.Combo.Input(
                    "scheduler", options=sampling.schedulers, default="normal", tooltip="As in KSampler."
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=False, tooltip="Guidance scale."
                ),
                io.Int.Input(
                    "width", default=512, min=16, max=4096, step=8, tooltip="Width of a cell in pixels."
                ),
                io.Int.Input(
                    "height", default=512, min=16, max=4096, step=8, tooltip="Height of a cell in pixels."
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Images per seed, drawn together as KSampler does.",
                ),
                io.Boolean.Input(
                    "save_grid",
                    default=True,
                    tooltip="Keep grid and grid.json in output/loragraft/grids; off shows the grid only.",
                ),
                Checkpoints.Input(
                    "checkpoints",
                    optional=True,
                    tooltip="From Train LoRA: rows for saved steps beside the finished file.",
                ),
                io.Int.Input(
                    "max_checkpoints",
                    default=4,
                    min=1,
                    max=50,
                    optional=True,
                    advanced=True,
                    tooltip="At most so many of the linked checkpoints, evenly chosen, the last one always "
                    "among "
                    "them.",
                ),
                io.Combo.Input(
                    "wildcards",
                    options=["all", "by seed", "off"],
                    default="all",
                    optional=True,
                    advanced=True,
                    tooltip="What words in braces with a bar between them mean: a column for each of them, "
                    "the "
                    "one that the seed picks, or just this text.",
                ),
                io.String.Input(
                    "trigger_words",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Trigger words, separated by commas: prompts with them get columns without them "
                    "as "
                    "well, which show what the LoRA does unasked.",
                ),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="The labelled grid."),
                io.Image.Output("images", display_name="images", tooltip="All cells as a batch, row by row."),
            ],
        )

    @classmethod
    def validate_inputs(cls, seeds: str | None = None, lora_name: str | None = None) -> bool | str:
        """Refuse unreadable seeds and a LoRA name that leaves models/loras before anything runs."""
        from . import axes, host

        try:
            if seeds is not None:
                axes.parse_seeds(seeds)
            for name in _names(lora_name or ""):
                host.lora_file(name)
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> str:
        """Change when a named LoRA file changes."""
        from . import host

        try:
            stats = [host.lora_file(name).stat() for name in _names(lora_name or "")]
        except (LoraGraftError, OSError):
            return "missing"
        return "\n".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        lora_name: str,
        prompts: str,
        negative: str,
        seeds: str,
        strengths: str,
        clip_strengths: str,
        sampler_name: str,
        scheduler: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        batch_size: int,
        save_grid: bool,
        checkpoints: tuple[Path, ...] = (),
        max_checkpoints: int = 4,
        wildcards: str = "all",
        trigger_words: str = "",
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import axes, cells, grids, host
        from . import host_sampling as sampling

        _check_unpatched(sampling.marked(model, clip))
        sampling.check_sampler(sampler_name, scheduler)
        files = _files(axes, host, lora_name, checkpoints, max_checkpoints)
        rows = axes.rows(files, strengths, clip_strengths)
        columns = axes.columns(prompts, seeds, wildcards, trigger_words)
        axes.check_size(len(rows), len(columns), batch_size)
        settings = axes.Settings(negative, sampler_name, scheduler, steps, cfg, width, height, batch_size)
        drawn = list(cells.draw_rows(model, clip, vae, rows, columns, settings))
        picture = api.grid(
            [[grids.to_pil(image) for image in images] for images in drawn],
            [row.label for row in rows],
            axes.labels(columns, batch_size),
            settings.title,
        )
        report = grids.report(rows, columns, settings)
        stem = _stem(axes, files)
        folder = host.grids_folder() if save_grid else host.temp_folder()
        info = grids.png_info(cls.hidden.prompt, cls.hidden.extra_pnginfo) if host.keeps_metadata() else None
        path = grids.write(folder, stem, picture, report if save_grid else None, info)
        images = torch.stack([image for row in drawn for image in row])
        return io.NodeOutput(
            grids.to_tensor(picture), images, ui={"images": [host.view(path)], "loragraft": [report]}
        )


def _check_unpatched(name: str | None) -> None:
    if name:
        raise LoraGraftError(
            "LG-NODE-012",
            f"MODEL or CLIP already carries {name[:60]}.",
            where="Preview with LoRA: model, clip",
            why="the LoRA would be applied twice, and the row without LoRA would show it.",
            fix="link the loader's MODEL and CLIP, not Train LoRA's",
        )


def _names(text: str) -> list[str]:
    """List the names in a text: one per line, each once."""
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _stem(axes: Any, files: list[Any]) -> str:
    """Name the grid after the finished file; after the beginning that several have in common."""
    if files[-1].label == axes.FINAL:
        return str(files[-1].path.stem)
    names = [file.path.stem for file in files]
    return names[0][: shared_start(names)].strip(" ._-") or "grid"


def _files(axes: Any, host: Any, lora_name: str, checkpoints: tuple[Path, ...], most: int) -> list[Any]:
    from ..trainer import api
    from .live import step_of

    saved = [axes.Weights(p, f"step {step_of(p)}") for p in checkpoints]
    names = _names(lora_name)
    if not names and saved:
        return axes.spread(saved, most)
    finished = axes.finished([host.lora_file(name) for name in names or [""]])
    # The last checkpoint holds the very tensors of a finished file: one row is enough.
    same = "sshs_model_hash"
    if saved:
        last = api.lora_metadata(saved[-1].path).get(same)
        saved = saved[:-1] if any(api.lora_metadata(f.path).get(same) == last for f in finished) else saved
    return [*axes.spread(saved, most), *finished]
