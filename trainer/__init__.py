"""The LoRA trainer: knows nothing of ComfyUI; ``trainer.api`` is its one door."""
