"""Train LoRA: on the very weights that ComfyUI holds, live, cancellable, continued when queued again.

With a sweep linked, it trains the LoRAs of all its runs side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import settings_groups, widgets
from .sockets import Settings, Sweep, TrainSet

log = logging.getLogger("loragraft")

Checkpoints = io.Custom("LORAGRAFT_CHECKPOINTS")
CONTINUE, AFRESH = "continue", "start afresh"
MAX_IMAGES = 8
IMAGE_KEYS = ("filename", "subfolder", "type")  # what ComfyUI finds a picture by


class TrainLoRA(io.ComfyNode):
    """Train a LoRA and hand it on in every form that ComfyUI knows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftTrainLoRA",
            display_name="Train LoRA",
            category="LoraGraft/train",
            description="Trains a LoRA on the linked model. Cancel keeps the work; queue again to continue. "
            "A "
            "finished run is returned at once. The file goes to models/loras, everything else to "
            "output/loragraft.",
            search_aliases=["kohya", "lora training", "finetune", "dreambooth"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, without LoRAs on it. Its weights are shared, never changed.",
                ),
                io.Clip.Input("clip", tooltip="The base's text encoder, without LoRAs on it."),
                io.Vae.Input("vae", tooltip="The base's VAE."),
                TrainSet.Input("train_set", tooltip="From Build Dataset."),
                *widgets.inputs(
                    io, (w for w in widgets.train_widgets() if w.name not in widgets.TRAIN_LATER)
                ),
                io.Combo.Input(
                    "existing_run",
                    options=[CONTINUE, AFRESH],
                    default=CONTINUE,
                    optional=True,
                    advanced=True,
                    tooltip="If this very run was begun before: continue it (a finished one is returned at "
                    "once), or train it again from the first step.",
                ),
                *widgets.inputs(io, (w for w in widgets.train_widgets() if w.name in widgets.TRAIN_LATER)),
                Sweep.Input(
                    "sweep",
                    optional=True,
                    tooltip="From Sweep: train a LoRA with each of its values, all side by side. The files "
                    "get the values behind output_name.",
                ),
                Settings.Input(
                    "settings",
                    optional=True,
                    tooltip="From the nodes in LoraGraft/settings, linked in a row. What they set counts, "
                    "and not the widget of the same name here.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora_model",
                    display_name="lora_model",
                    tooltip="The LoRA's denoiser part, for the native Load LoRA Model node. That node has "
                    "no CLIP "
                    "and would report the text encoder's part as not loaded; the file and the MODEL and CLIP "
                    "outputs hold it. With a sweep, that of the first finished run, as are all outputs but "
                    "lora_name and checkpoints.",
                ),
                io.Model.Output(
                    "model", display_name="model", tooltip="The model with the LoRA at strength 1."
                ),
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="The text encoder with the LoRA at strength 1."
                ),
                io.LossMap.Output(
                    "loss_map",
                    display_name="loss_map",
                    tooltip="Loss of every step, for the native Loss Graph.",
                ),
                io.String.Output(
                    "lora_name",
                    display_name="lora_name",
                    tooltip="File name below models/loras. With a sweep, the names of all finished runs, one "
                    "per line.",
                ),
                io.String.Output(
                    "trigger_words", display_name="trigger_words", tooltip="The words that call the LoRA."
                ),
                Checkpoints.Output(
                    "checkpoints",
                    display_name="checkpoints",
                    tooltip="All saved steps, for Preview with LoRA. Empty with a sweep: they would be too "
                    "many rows.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, output_name: str | None = None) -> bool | str:
        """Refuse an impossible file name before anything runs."""
        from ..trainer.errors import LoraGraftError
        from ..trainer.paths import safe_name

        try:
            if output_name is not None:
                safe_name(output_name, what="output_name")
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        train_set: Any,
        existing_run: str = CONTINUE,
        sweep: Any = None,
        settings: Any = None,
        **values: Any,
    ) -> io.NodeOutput:
        from ..trainer import api
        from ..trainer.config import TrainConfig
        from ..trainer.sweep import sweep_runs
        from . import host, host_sampling
        from .live import Live

        linked = _linked(settings.values if settings else {})
        config = widgets.train_config(values, linked)
        overridden = settings_groups.told(linked, widgets.settings(TrainConfig, values))
        runs = sweep_runs(sweep, config) if sweep else []
        workflow = _workflow(cls.hidden.extra_pnginfo)
        head = {"node": str(cls.hidden.unique_id), "workflow": workflow.get("id")}
        live = Live(host.send, host.view, head, runs=[(r.config.output_name, r.label) for r in runs])
        configs = [
            settings_groups.found_weights(run.config, config.network_weights, host.lora_file) for run in runs
        ]
        jobs = [(train_set, each) for each in configs or [config]]
        for line in overridden:
            log.info("%s", line)
            live.take(api.Note(line))
        finished = _train(model, clip, vae, jobs, workflow, existing_run == AFRESH, live)
        for number, end in finished.items():
            if end.reused:
                live.take_samples(_samples_in(end.run_folder), number)
        done = live.done(finished)
        first = next(iter(finished.values()))
        names = [end.lora_file.name for end in finished.values()]
        lora = host_sampling.read_lora(first.lora_file)
        trained_model, trained_clip = host_sampling.apply_lora(model, clip, lora, 1.0, 1.0, names[0])
        host_sampling.mark(trained_model, trained_clip, names[0])
        images = [{k: s[k] for k in IMAGE_KEYS} for s in live.samples if "filename" in s]
        return io.NodeOutput(
            api.lora_tensors(first.lora_file, denoiser_only=True),
            trained_model,
            trained_clip,
            {"loss": list(first.losses)},
            "\n".join(names),
            first.trigger_words,
            () if runs else tuple(first.checkpoints),
            ui={"loragraft": [done], "images": images[-MAX_IMAGES:]},
        )


def _samples_in(run_folder: Path) -> list[dict[str, Any]]:
    """Return the samples that a run drew earlier, as the live panel shows them."""
    from . import host
    from .live import step_of_sample

    files = sorted((run_folder / "samples").glob("step-*.png"))
    return [{"step": step_of_sample(f.name), "prompt": "", **host.view(f)} for f in files]


def _linked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the linked settings with the file that they may name found below models/loras."""
    from . import host

    named = settings.get("network_weights")
    return {**settings, "network_weights": str(host.lora_file(named))} if named else dict(settings)


def _train(
    model: Any,
    clip: Any,
    vae: Any,
    jobs: Sequence[tuple[Any, Any]],
    workflow: dict[str, Any],
    fresh: bool,
    live: Any,
) -> dict[int, Any]:
    """Train on the host's weights; return the Finished events by number of the job, in the jobs' order.

    Cancel raises out of here, all work saved. Of several jobs those that failed are left out; where all
    did, LG-SWEEP-005 is raised.
    """
    from ..trainer import api
    from ..trainer.progress import Pace
    from . import host
    from .host_bases import open_base
    from .host_checks import check_clip_skip
    from .host_family import differentiable
    from .host_prediction import check_prediction
    from .workflow import portable

    config = jobs[0][1]
    progress, pace = host.Progress(config.max_train_steps), Pace()
    finished: dict[int, Any] = {}
    failed: dict[int, Any] = {}
    with host.training_mode():
        for _, each in jobs:
            check_clip_skip(model, clip, each.clip_skip)
            check_prediction(model, each.v_parameterization, each.zero_terminal_snr)
        host.free_memory()
        base = open_base(model, clip, vae)
        run = api.train_together(
            base,
            jobs,
            places=host.places(),
            device=host.device(),
            workflow=portable(workflow, host.workflow_roots()) if config.embed_workflow else None,
            fresh=fresh,
        )
        # Cancel is a BaseException and comes from host.*; closing the run saves the last finished step.
        with differentiable(base.family), closing(run):
            for number, event in run:
                live.take(event, number)
                pace.take(number, event)
                if isinstance(event, api.Finished):
                    finished[number] = event
                    if event.model_file is not None:
                        log.info("The whole model: %s", event.model_file)
                    continue
                name = f"[{jobs[number][1].output_name}] " if len(jobs) > 1 else ""
                if isinstance(event, api.Failed):
                    failed[number] = event.error
                    log.error("%sfailed: %s", name, event.error)
                _show(progress, pace, event, name)
                host.check_interrupt()
    if not finished:
        raise _all_failed(failed)
    return dict(sorted(finished.items()))


def _all_failed(failed: Mapping[int, Any]) -> Exception:
    from ..trainer.errors import LoraGraftError

    first = failed[min(failed)]
    return LoraGraftError(
        "LG-SWEEP-005",
        f"All {len(failed)} runs of the sweep failed.",
        where=f"the first: {first.code}, {first.where}",
        why=f"{first.what} {first.why}",
        fix=first.fix,
    )


def _show(progress: Any, pace: Any, event: Any, name: str) -> None:
    """Show an event on the node and, behind the run's name, in ComfyUI's log; the bar counts all steps."""
    from ..trainer import api

    if isinstance(event, api.Planned):
        for line in event.lines:
            log.info("%s%s", name, line)
        progress.show(pace.done, pace.total)
    elif isinstance(event, api.Cached):
        progress.show(event.done, event.total)
    elif isinstance(event, api.Step):
        progress.show(pace.done, pace.total)
    elif isinstance(event, api.Sampled):
        progress.show_image(event.image)
    elif isinstance(event, api.Note):
        log.warning("%s%s", name, event.text)
    elif isinstance(event, api.Validated):
        log.info("%s%s", name, api.validation_line(event))


def _workflow(extra_pnginfo: Mapping[str, Any] | None) -> dict[str, Any]:
    found = (extra_pnginfo or {}).get("workflow")
    return dict(found) if isinstance(found, Mapping) else {}
