"""The same run without a graph: what the widgets say, written into a config for the command line."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from loragraft.trainer import __main__ as cli
from loragraft.trainer import api
from loragraft.trainer.commands import train as train_command
from loragraft_tests.comfyui import prompts

# Widgets' values that stand for an empty setting.
OFF = {
    "unet_lr": -1,
    "text_encoder_lr": -1,
    "max_train_epochs": 0,
    "min_snr_gamma": 0,
    "save_every_n_epochs": 0,
}


def train(folder: Path, base: str, settings: Mapping[str, Any]) -> Path:
    """Train on the demo's images with the prompts' settings and these; return the folder of the files."""
    values = {**prompts.BUILD, **prompts.TRAIN, **settings}
    lines = [
        f"{k} = {_toml(v)}"
        for k, v in values.items()
        if not (k in OFF and v == OFF[k]) and k != "sample_prompts"
    ]
    config = folder / "run.toml"
    config.write_text("\n".join([*lines, "sample_prompts = []"]), "utf-8")
    arguments = ["train", "--config", str(config), "--pretrained_model_name_or_path", base]
    arguments += ["--train_data_dir", "demo", "--output_dir", str(folder / "out"), "--device", "cpu"]
    status: list[int] = []
    # a main thread's signal handler is not wanted here, so the command's own is left out
    cli_stop = train_command.StopFlag
    try:
        train_command.StopFlag = lambda **_: nullcontext(SimpleNamespace(wanted=False))  # type: ignore[assignment, misc, return-value]
        worker = threading.Thread(target=lambda: status.append(cli.main(arguments)))
        worker.start()
        worker.join()
    finally:
        train_command.StopFlag = cli_stop  # type: ignore[misc]
    assert status == [0]
    return folder / "out/loras"


def assert_same_file(graph: Path, command_line: Path) -> int:
    """Assert equal tensors and metadata but for the workflow; return how many tensors there are."""
    graph_tensors, cli_tensors = api.lora_tensors(graph), api.lora_tensors(command_line)
    assert list(graph_tensors) == list(cli_tensors)
    for key, tensor in cli_tensors.items():
        assert tensor.dtype == graph_tensors[key].dtype and torch.equal(tensor, graph_tensors[key]), key
    graph_metadata, cli_metadata = api.lora_metadata(graph), api.lora_metadata(command_line)
    assert graph_metadata.pop("workflow")
    assert graph_metadata == cli_metadata
    return len(cli_tensors)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
