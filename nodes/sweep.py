"""Sweep: the values that Train LoRA shall try, as lines of text."""

from __future__ import annotations

from comfy_api.latest import io

from .sockets import Sweep as SweepSocket

EXAMPLE = "learning_rate: 1e-4, 3e-4\nnetwork_dim: 8, 32 / network_alpha: 4, 16"


class Sweep(io.ComfyNode):
    """Read lines of settings and their values; Train LoRA makes a LoRA of each combination."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraGraftSweep",
            display_name="Sweep",
            category="LoraGraft/train",
            description="Values for Train LoRA to try: it trains a LoRA with each combination, all side by "
            "side on one base model. Link lora_name to Preview with LoRA and one grid compares them.",
            search_aliases=["hyperparameter search", "grid search", "compare settings", "xy plot training"],
            inputs=[
                io.String.Input(
                    "sweep",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="One setting of Train LoRA per line with the values to try, such as "
                    "learning_rate: 1e-4, 3e-4. Each value is tried with every value of the other lines; "
                    "settings joined by / change together. 2 to 64 runs.",
                )
            ],
            outputs=[
                SweepSocket.Output("sweep", display_name="sweep", tooltip="For Train LoRA's input sweep.")
            ],
        )

    @classmethod
    def validate_inputs(cls, sweep: str | None = None) -> bool | str:
        """Refuse what cannot be read before anything runs."""
        from ..trainer.errors import LoraGraftError
        from ..trainer.sweep import read_sweep

        try:
            if sweep is not None:
                read_sweep(sweep, where="Sweep: sweep")
        except LoraGraftError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, sweep: str) -> io.NodeOutput:
        from ..trainer.sweep import read_sweep

        return io.NodeOutput(read_sweep(sweep, where="Sweep: sweep"))
