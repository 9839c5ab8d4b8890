"""Which modules a LoRA trains."""
