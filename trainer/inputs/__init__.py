"""What a step is fed: latents and conditioning, encoded once where they can be, and the random draws."""

from .feed import Fed, Inputs
from .texts import keeps_text, reading_of

__all__ = ["Fed", "Inputs", "keeps_text", "reading_of"]
