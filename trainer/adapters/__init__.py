"""The network types: one file each."""
