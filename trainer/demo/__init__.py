"""The embedded default: a tiny base model and a sample dataset, with the scripts that made them."""
