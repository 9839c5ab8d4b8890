"""Load Demo Base: the embedded tiny base model, so that the whole way works without a download."""

from __future__ import annotations

from comfy_api.latest import io


class LoadDemoBase(io.ComfyNode):
    """Load the embedded base as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftLoadDemoBase",
            display_name="Load Demo Base",
            category="LoraGraft/train",
            description="Loads the tiny base model that comes with LoraGraft. It draws simple shapes at 64 "
            "x 64 "
            "pixels and trains in minutes without a GPU. Its MODEL, CLIP and VAE work with ComfyUI's own "
            "nodes.",
            search_aliases=["example model", "tiny model", "checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The demo denoiser, SD1.5's structure."
                ),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="The demo text encoder with its own small vocabulary.",
                ),
                io.Vae.Output(
                    "vae", display_name="vae", tooltip="The demo VAE: 8 times down, 4 latent channels."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..trainer import api
        from . import host_demo

        return io.NodeOutput(*host_demo.load(api.demo_base_file(), api.demo_tokenizer()))
