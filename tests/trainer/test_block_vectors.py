"""The vectors of block weights that the guides' settings give, as the reference computes them."""

from __future__ import annotations

import pytest

from loragraft.trainer import api
from loragraft.trainer.block_weights import SD1, SDXL, block_lr_weights

SINE = (
    0,
    0.142315,
    0.281733,
    0.415415,
    0.540641,
    0.654861,
    0.75575,
    0.841254,
    0.909632,
    0.959493,
    0.989821,
    1,
)
LINEAR = (
    0,
    0.090909,
    0.181818,
    0.272727,
    0.363636,
    0.454545,
    0.545455,
    0.636364,
    0.727273,
    0.818182,
    0.909091,
    1,
)
SINE9 = (0, 0.19509, 0.382683, 0.55557, 0.707107, 0.83147, 0.92388, 0.980785, 1)
FALLING = (
    1.25,
    1.159091,
    1.068182,
    0.977273,
    0.886364,
    0.795455,
    0.704545,
    0.613636,
    0.522727,
    0.431818,
    0.340909,
    0,
)
MINUS = (0, 0, 0, 0, 0, 0.154861, 0.25575, 0.341254, 0.409632, 0.459493, 0.489821, 0.5)
ROWS = [
    ("sine", 0.0, SINE),
    ("cosine", 0.0, SINE[::-1]),
    ("linear", 0.0, LINEAR),
    ("linear", 0.1, (0, 0, *LINEAR[2:])),
    ("sine", 0.1, SINE),
    ("cosine", 0.1, SINE[::-1]),
    ("sine+.5", 0.0, tuple(w + 0.5 for w in SINE)),
    ("cosine+1", 0.0, tuple(w + 1 for w in SINE[::-1])),
    ("reverse_linear+.25", 0.3, FALLING),
    ("zeros+.3", 0.3, (0,) * 12),
    ("sine-.5", 0.1, MINUS),  # as it is plainly meant: the reference fails on it
]  # fmt: skip


@pytest.mark.parametrize(("spec", "threshold", "expected"), ROWS, ids=[f"{s} {t}" for s, t, _ in ROWS])
@pytest.mark.parametrize("part", ["down", "up"])
def test_a_vector_of_12(spec: str, threshold: float, expected: tuple[float, ...], part: str) -> None:
    values = {f"{part}_lr_weight": spec, "block_lr_zero_threshold": threshold}
    weights = block_lr_weights(api.make(api.TrainConfig, values), SD1)
    assert weights is not None
    found = weights[:12] if part == "down" else weights[13:]
    assert found == pytest.approx(expected, abs=6e-7)
    assert [w == 0 for w in found] == [w == 0 for w in expected], "a block of weight 0 is left out"


def test_sdxls_vectors_of_9_and_23() -> None:
    values = {"down_lr_weight": "sine+.5", "mid_lr_weight": "2", "up_lr_weight": "cosine+1"}
    weights = block_lr_weights(api.make(api.TrainConfig, values), SDXL)
    down, up = [w + 0.5 for w in SINE9], [w + 1 for w in SINE9[::-1]]
    assert weights == pytest.approx([1, *down, 2, 1, 1, *up, 1], abs=6e-7)
    plain = block_lr_weights(api.make(api.TrainConfig, {"down_lr_weight": "sine"}), SDXL)
    assert plain is not None and plain[1:10] == pytest.approx(SINE9, abs=6e-7)
