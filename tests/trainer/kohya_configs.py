"""Configs of kohya's trainer as the tests read them: into settings, or into the refusal of what is wrong."""

from __future__ import annotations

import pytest

from loragraft.trainer import api
from loragraft.trainer.errors import LoraGraftError
from loragraft.trainer.imports.kohya import read_kohya

FIELDS = {**api.DatasetConfig.__dataclass_fields__, **api.TrainConfig.__dataclass_fields__}


def settings(text: str) -> tuple[api.DatasetConfig, api.TrainConfig]:
    return api.make_both(read_kohya(text).settings, where="test")


def refusal(text: str) -> LoraGraftError:
    with pytest.raises(LoraGraftError) as caught:
        settings(text)
    return caught.value
