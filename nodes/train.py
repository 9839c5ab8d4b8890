"""Train LoRA: on the very weights that ComfyUI holds, live, cancellable, continued when queued again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from comfy_api.latest import io

from . import widgets
from .sockets import TrainSet

log = logging.getLogger("loragraft")

Checkpoints = io.Custom("LORAGRAFT_CHECKPOINTS")
CONTINUE, AFRESH = "continue", "start afresh"
MAX_IMAGES = 8


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
                    tooltip="The base model, SD1.x, without LoRAs on it. Its weights are shared, never "
                    "changed.",
                ),
                io.Clip.Input("clip", tooltip="The base's text encoder, without LoRAs on it."),
                io.Vae.Input("vae", tooltip="The base's VAE."),
                TrainSet.Input("train_set", tooltip="From Build Dataset."),
                *widgets.inputs(io, widgets.train_widgets()),
                io.Combo.Input(
                    "existing_run",
                    options=[CONTINUE, AFRESH],
                    default=CONTINUE,
                    optional=True,
                    advanced=True,
                    tooltip="If this very run was begun before: continue it (a finished one is returned at "
                    "once), or train it again from the first step.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora_model",
                    display_name="lora_model",
                    tooltip="The LoRA's denoiser part, for the native Load LoRA Model node. That node has "
                    "no CLIP "
                    "and would report the text encoder's part as not loaded; the file and the MODEL and CLIP "
                    "outputs hold it.",
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
                    "lora_name", display_name="lora_name", tooltip="File name below models/loras."
                ),
                io.String.Output(
                    "trigger_words", display_name="trigger_words", tooltip="The words that call the LoRA."
                ),
                Checkpoints.Output(
                    "checkpoints",
                    display_name="checkpoints",
                    tooltip="All saved steps, for Preview with LoRA.",
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
        cls, model: Any, clip: Any, vae: Any, train_set: Any, existing_run: str = CONTINUE, **values: Any
    ) -> io.NodeOutput:
        from ..trainer import api
        from . import host, host_sampling
        from .live import Live, step_of_sample

        config = widgets.train_config(values)
        workflow = _workflow(cls.hidden.extra_pnginfo)
        live = Live(host.send, host.view, {"node": str(cls.hidden.unique_id), "workflow": workflow.get("id")})
        finished = _train(model, clip, vae, train_set, config, workflow, existing_run == AFRESH, live)
        samples = None
        if finished.reused:
            files = sorted((finished.run_folder / "samples").glob("step-*.png"))
            samples = [{"step": step_of_sample(f.name), "prompt": "", **host.view(f)} for f in files]
        done = live.done(finished, samples)
        name = finished.lora_file.name
        lora = host_sampling.read_lora(finished.lora_file)
        trained_model, trained_clip = host_sampling.apply_lora(model, clip, lora, 1.0, 1.0, name)
        host_sampling.mark(trained_model, trained_clip, name)
        images = [
            {k: s[k] for k in ("filename", "subfolder", "type")} for s in live.samples if "filename" in s
        ]
        return io.NodeOutput(
            api.lora_tensors(finished.lora_file, denoiser_only=True),
            trained_model,
            trained_clip,
            {"loss": list(finished.losses)},
            name,
            finished.trigger_words,
            tuple(finished.checkpoints),
            ui={"loragraft": [done], "images": images[-MAX_IMAGES:]},
        )


def _train(
    model: Any,
    clip: Any,
    vae: Any,
    train_set: Any,
    config: Any,
    workflow: dict[str, Any],
    fresh: bool,
    live: Any,
) -> Any:
    """Train on the host's weights and return the Finished event; Cancel raises out of here, work saved."""
    from ..trainer import api
    from . import host, host_weights
    from .workflow import portable

    progress = host.Progress(config.max_train_steps)
    with host.training_mode():
        host_weights.check_clip_skip(clip, config.clip_skip)
        host.free_memory()
        run = api.train(
            host_weights.open_base(model, clip, vae),
            train_set,
            config,
            places=host.places(),
            device=host.device(),
            workflow=portable(workflow, host.workflow_roots()) if config.embed_workflow else None,
            fresh=fresh,
        )
        # Cancel is a BaseException and comes from host.*; closing the run saves the last finished step.
        with closing(run):
            for event in run:
                live.take(event)
                if isinstance(event, api.Finished):
                    return event
                _show(progress, event)
                host.check_interrupt()
    raise AssertionError("a run ends with Finished")


def _show(progress: Any, event: Any) -> None:
    """Show an event on the node and in ComfyUI's log."""
    from ..trainer import api

    if isinstance(event, api.Planned):
        for line in event.lines:
            log.info("%s", line)
        progress.show(event.first_step, event.total_steps)
    elif isinstance(event, api.Cached):
        progress.show(event.done, event.total)
    elif isinstance(event, api.Step):
        progress.show(event.step, event.total_steps)
    elif isinstance(event, api.Sampled):
        progress.show_image(event.image)
    elif isinstance(event, api.Note):
        log.warning("%s", event.text)
    elif isinstance(event, api.Validated):
        log.info("%s", api.validation_line(event))


def _workflow(extra_pnginfo: Mapping[str, Any] | None) -> dict[str, Any]:
    found = (extra_pnginfo or {}).get("workflow")
    return dict(found) if isinstance(found, Mapping) else {}
