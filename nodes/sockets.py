"""The pack's own socket types: what flows between its nodes."""

from __future__ import annotations

from comfy_api.latest import io

Dataset = io.Custom("LORAGRAFT_DATASET")  # trainer.api.Dataset: paths and edits, never pixels
TrainSet = io.Custom("LORAGRAFT_TRAIN_SET")  # trainer.api.TrainSet: frozen, with its report
Settings = io.Custom("LORAGRAFT_SETTINGS")  # settings_groups.Linked: settings of a run by name
Sweep = io.Custom("LORAGRAFT_SWEEP")  # a tuple of trainer.sweep.Axis: settings and the values to try
