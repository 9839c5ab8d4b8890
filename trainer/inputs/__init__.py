"""What a step is fed: latents and conditioning, encoded once where they can be, and the random draws."""

from .feed import Fed, Inputs
from .texts import keeps_text

__all__ = ["Fed", "Inputs", "keeps_text"]
