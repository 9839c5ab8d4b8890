"""Read HCP-Diffusion's training YAML: base files, changes on its command line, what each value means here.

The ``data`` block is read by trainer.data.hcp when the run's images are; its file stands in the places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.hcp_yaml import parse_hcp
from ..data.images import shown
from ..errors import one_line
from . import hcp_table as table
from .hcp_layers import number
from .hcp_network import read_network
from .hcp_steps import read_averages, read_steps
from .imported import Findings, Imported, not_readable


def read_hcp_train(file: Path, *, overrides: Sequence[str] = (), trusted: bool = True) -> Imported:
    """Read a training file; ``overrides`` change values as key=value with dots between the tables.

    Unless ``trusted``, base files are read only below the file's folder. Raises LG-DATA-084, LG-DATA-089,
    LG-IMP-001, -002, LG-CFG-001 and LG-CFG-003, each with all that it concerns.
    """
    own, shipped = parse_hcp(file, trusted=trusted, overrides=overrides)
    found = Findings(shown(file.name))
    values = _with_base(own, shipped, found)
    _check_keys(values, found)
    settings: dict[str, Any] = {"output_name": file.stem, "save_precision": "fp32"}
    _top(values, settings, found)
    _train(values["train"], own, settings, found)
    _model(values["model"], settings, found)
    read_network(values, settings, found)
    read_averages(values["model"], settings, found)
    if "data" in values:
        read_steps(values["data"], settings, found)
    found.raise_any()
    places = {"output_dir": str(values["exp_dir"])}
    if base := values["model"].get("pretrained_model_name_or_path"):
        places["pretrained_model_name_or_path"] = str(base)
    if "data" in values:
        places["dataset_config"] = str(file)
    return Imported(settings, places, {}, tuple(found.notes))


# ---- what stands in the file ----


def _with_base(own: Mapping[str, Any], shipped: Sequence[str], found: Findings) -> dict[str, Any]:
    """Return the file's values over those of HCP-Diffusion's own files, which are known here."""
    values: dict[str, Any] = table.BASE
    for name in shipped:
        if name not in table.SHIPPED:
            raise not_readable(
                found.where, f"its base file {shown(name)} does not lie beside it and is not known here."
            )
        values = _merged(values, table.SHIPPED[name])
    found.notes.append(
        "What the file leaves out is taken from HCP-Diffusion's train_base.yaml: one_cycle, scale_lr, fp16, "
        "weight_decay 0.001, seed 114514."
    )
    return _merged(values, own)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _check_keys(values: dict[str, Any], found: Findings) -> None:
    """Record unknown keys, what cannot be honoured and what means nothing here."""
    for name in ("train", "model"):
        if not isinstance(values.get(name), Mapping):
            found.expect(name, values.get(name), "a table", f"{name}: and its keys below it")
    found.raise_any()
    for prefix, inside in (("", values), ("train", values["train"]), ("model", values["model"])):
        for key, value in inside.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            if path in table.REFUSED:
                harmless, why, fix = table.REFUSED[path]
                if value not in harmless:
                    found.refuse(f"{path} {one_line(str(value), 40)}", why, fix)
            elif path in table.NOTED:
                if value not in (None, False, [], {}):
                    found.notes.append(f"{path}: {table.NOTED[path]}.")
            elif key not in table.KNOWN[prefix]:
                known = [
                    *table.KNOWN[prefix],
                    *(p.rpartition(".")[2] for p in (*table.NOTED, *table.REFUSED)),
                ]
                found.not_known(path, known)


# ---- from values to settings ----


def _top(values: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    precision = values["mixed_precision"]
    settings["mixed_precision"] = "no" if precision in (None, False) else str(precision)
    _whole(values, "seed", "seed", settings, found)
    words = values.get("tokenizer_pt")
    trained = words.get("train") if isinstance(words, Mapping) else None
    if trained:
        found.refuse(
            "tokenizer_pt.train",
            "the words' embeddings begin from files of HCP-Diffusion",
            "remove it, and name the words in train_embeddings",
        )


def _train(
    train: Mapping[str, Any], own: Mapping[str, Any], settings: dict[str, Any], found: Findings
) -> None:
    own_train = own.get("train") if isinstance(own.get("train"), Mapping) else {}
    if train.get("train_epochs") is not None:
        _whole(train, "train_epochs", "max_train_epochs", settings, found, prefix="train")
    else:
        _whole(train, "train_steps", "max_train_steps", settings, found, prefix="train")
    _whole(
        train, "gradient_accumulation_steps", "gradient_accumulation_steps", settings, found, prefix="train"
    )
    if train.get("save_step"):
        _whole(train, "save_step", "save_every_n_steps", settings, found, prefix="train")
    _number(train, "max_grad_norm", "max_grad_norm", settings, found, prefix="train")
    settings["scale_lr"] = bool(train.get("scale_lr"))
    if settings["scale_lr"] and "scale_lr" not in (own_train or {}):
        found.notes.append(
            "train.scale_lr: on in train_base.yaml, so rates are multiplied by a step's images."
        )
    _loss(train.get("loss"), settings, found)
    _optimizer(train.get("optimizer"), settings, found)
    _schedule(train, settings, found)


def _loss(loss: Any, settings: dict[str, Any], found: Findings) -> None:
    if not isinstance(loss, Mapping):
        return
    if loss.get("type", "eps") != "eps":
        found.refuse(f"train.loss.type {loss['type']}", "the noise is what is predicted", "write type: eps")
    criterion = loss.get("criterion")
    if not isinstance(criterion, Mapping):
        return
    kind = str(criterion.get("_target_", table.LOSSES[0])).rpartition(".")[2]
    if kind not in table.LOSSES:
        found.refuse(f"train.loss.criterion {one_line(kind, 40)}", "it is not known", f"use {table.LOSSES}")
    elif kind == "MinSNRLoss":
        settings["min_snr_gamma"] = number(criterion.get("gamma", 1.0))


def _optimizer(optimizer: Any, settings: dict[str, Any], found: Findings) -> None:
    if not isinstance(optimizer, Mapping):
        found.expect("train.optimizer", optimizer, "a table", "optimizer: {type: adamw}")
        return
    target, kind = optimizer.get("_target_"), str(optimizer.get("type", "adamw"))
    if target is not None:
        settings["optimizer_type"] = table.OPTIMIZER_CLASSES.get(str(target), str(target))
    elif kind in table.OPTIMIZERS:
        settings["optimizer_type"] = table.OPTIMIZERS[kind]
    else:
        found.refuse(
            f"train.optimizer.type {one_line(kind, 40)}", "it is not known", f"use {[*table.OPTIMIZERS]}"
        )
    options = {key: value for key, value in optimizer.items() if key not in ("_target_", "_partial_", "type")}
    settings["optimizer_args"] = [f"{key}={_literal(value)}" for key, value in options.items()]


def _literal(value: Any) -> str:
    plain = number(value) if isinstance(value, str) else None
    return repr(tuple(value) if isinstance(value, list) else value) if plain is None else repr(plain)


def _schedule(train: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    schedule = train.get("scheduler")
    if not isinstance(schedule, Mapping) or "_target_" in schedule:
        found.refuse(
            "train.scheduler",
            "it names a Python class",
            "name a schedule, and other ones in lr_scheduler_type",
        )
        return
    name = str(schedule.get("name", ""))
    warmup, length = (number(schedule.get(key)) for key in ("num_warmup_steps", "num_training_steps"))
    steps = number(train.get("train_steps")) if train.get("train_epochs") is None else None
    if name == "one_cycle":
        settings["lr_scheduler_type"] = table.ONE_CYCLE
        settings["lr_scheduler_args"] = [f"pct_start={(warmup or 0) / (length or 1):g}"]
    elif name in table.SCHEDULES:
        settings["lr_scheduler"] = name
        if warmup and name != "constant":
            settings["lr_warmup_steps"] = int(warmup)
    else:
        found.refuse(
            f"train.scheduler.name {one_line(name, 40)}", "it is not known", f"use {[*table.SCHEDULES]}"
        )
    if not name.startswith("constant") and length is not None and steps is not None and length != steps:
        found.refuse(
            f"train.scheduler.num_training_steps {length:g}",
            f"the run has {steps:g} steps, so the rate would end too early or never fall",
            f"write num_training_steps: {steps:g}",
        )
    extra = schedule.get("scheduler_kwargs") or {}
    for key, value in extra.items() if isinstance(extra, Mapping) else ():
        if key in table.SCHEDULE_OPTIONS:
            settings[table.SCHEDULE_OPTIONS[key]] = value
        elif name == "one_cycle":
            settings["lr_scheduler_args"].append(f"{key}={_literal(value)}")
        else:
            found.not_known(f"train.scheduler.scheduler_kwargs.{key}", table.SCHEDULE_OPTIONS)


def _model(model: Mapping[str, Any], settings: dict[str, Any], found: Findings) -> None:
    _whole(model, "tokenizer_repeats", "tokenizer_repeats", settings, found, prefix="model")
    settings["gradient_checkpointing"] = bool(model.get("gradient_checkpointing"))
    skipped = number(model.get("clip_skip") or 0)
    if skipped is None or not skipped.is_integer():
        found.expect("model.clip_skip", model["clip_skip"], "a whole number", "clip_skip: 0 or 1")
    else:
        settings["clip_skip"] = int(skipped) + 1  # HCP-Diffusion counts the layers left out
    noise = model.get("noise_scheduler")
    target = str(noise.get("_target_", "DDPMScheduler")) if isinstance(noise, Mapping) else "DDPMScheduler"
    if "DDPMScheduler" not in target:
        found.refuse(
            f"model.noise_scheduler {one_line(target, 60)}",
            "it is a Python class",
            "remove it; multires_noise_iterations is pyramid noise",
        )


def _whole(
    inside: Mapping[str, Any],
    key: str,
    setting: str,
    settings: dict[str, Any],
    found: Findings,
    *,
    prefix: str = "",
) -> None:
    value = number(inside.get(key))
    if value is None or not value.is_integer():
        path = f"{prefix}.{key}" if prefix else key
        found.expect(path, inside.get(key), "a whole number", f"for instance {key}: 1")
    else:
        settings[setting] = int(value)


def _number(
    inside: Mapping[str, Any],
    key: str,
    setting: str,
    settings: dict[str, Any],
    found: Findings,
    *,
    prefix: str,
) -> None:
    value = number(inside.get(key))
    if value is None:
        found.expect(f"{prefix}.{key}", inside.get(key), "a number", f"for instance {key}: 1.0")
    else:
        settings[setting] = value
