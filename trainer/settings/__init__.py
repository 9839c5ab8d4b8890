"""The settings of a dataset and of a run, one file a group; trainer.config joins those of a run."""
