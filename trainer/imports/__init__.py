"""Configs of other trainers become settings: kohya's sd-scripts with lora-scripts, and HCP-Diffusion."""
