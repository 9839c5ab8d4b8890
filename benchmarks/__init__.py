"""Measurements against other trainers; not shipped."""
