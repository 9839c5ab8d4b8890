"""ComfyUI nodes, V3 schema: thin; sockets in, one call of trainer.api, outputs."""
