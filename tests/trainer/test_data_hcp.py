"""HCP-Diffusion's data blocks: the guide's own examples, sums, references, and refusals."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragraft.trainer.data.arithmetic import compute
from loragraft.trainer.data.batches import plan_epoch
from loragraft.trainer.data.captions import vary_caption
from loragraft.trainer.data.config_files import read_blocks
from loragraft.trainer.data.hcp import sides_of
from loragraft.trainer.data.train_set import freeze_blocks
from loragraft.trainer.errors import LoraGraftError
from loragraft_tests.fuzz import cases
from loragraft_tests.trainer.data_folders import Refusal, fill

# The guide's fine-tuning example, with nothing but the folder's name replaced.
FINE_TUNING = """
# 继承 fine-tuning.yaml
_base_:
  - cfgs/train/examples/fine-tuning.yaml
unet:
  -
    lr: 1e-6
    layers:
      - '' # 微调unet所有层
train:
  train_epochs: 20
model:
  pretrained_model_name_or_path: 'runwayml/stable-diffusion-v1-5'
  tokenizer_repeats: 1
data:
  dataset1:
    # 每一批的图像数量，根据显存大小调整
    batch_size: 4

    source:
      data_source1:
        img_root: 'train_data/'
        caption_file: 'train_data/'
        word_names:
          pt1: pt-cat1

    bucket:
      target_area: ${hcp.eval:"512*768"}
      num_bucket: 5
"""
# The guide's DreamBooth example.
DREAMBOOTH = """
data:
  dataset1:
    batch_size: 4
    cache_latents: True
    source:
      data_source1:
        img_root: 'train_data/'
        caption_file: 'train_data'
        word_names:
          pt1: sks
          class: dog
    bucket:
      _target_: hcpdiff.data.bucket.RatioBucket.from_files # aspect ratio bucket
      target_area: ${hcp.eval:"512*512"}
      num_bucket: 1

  dataset_class:
    batch_size: 1
    cache_latents: True
    loss_weight: 0.5

    source:
      data_source1:
        img_root: 'da_data/'
        caption_file: null
        word_names:
          class: dog
    bucket:
      _target_: hcpdiff.data.bucket.FixedBucket
      target_size: [512, 512]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sizes = [(512, 512), (512, 768), (768, 512), (640, 480), (600, 600), (900, 500)]
    fill(tmp_path, {f"train_data/{i}.png": size for i, size in enumerate(sizes, 1)})
    fill(tmp_path, {f"train_data/{i}.txt": f"tag {i}, cat" for i in range(1, 6)})
    fill(tmp_path, {f"da_data/{i}.png": (300, 200) for i in range(3)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(root: Path, text: str) -> Path:
    file = root / "ft1.yaml"
    file.write_text(text, "utf-8")
    return file


def test_the_fine_tuning_example(root: Path) -> None:
    (block,) = read_blocks(write(root, FINE_TUNING))
    assert block.batch_size == 4
    config = block.config
    assert (config.resolution, config.num_bucket, config.bucket_reso_steps) == ((512, 768), 5, 8)
    assert config.shuffle_caption and config.caption_tag_dropout_rate == 0.1
    lines = " ".join(block.dataset.lines)
    assert "only 'data' is read" in lines and "unet, train, model" in lines
    assert "cfgs/train/examples/fine-tuning.yaml" in lines and "10% of them left out" in lines
    train_set = freeze_blocks([block])
    assert len(set(train_set.buckets)) == 5
    assert all(abs(w * h - 512 * 768) / (512 * 768) < 0.05 for w, h in train_set.buckets)
    record, record_config = train_set.records[0], train_set.configs[0]
    assert record.caption == "tag 1, cat" and record.concept == "pt-cat1"
    seen = {vary_caption(record.caption, record_config, random.Random(i)) for i in range(300)}
    assert {"pt-cat1, tag 1, cat", "pt-cat1, cat, tag 1"} <= seen
    assert all(text.startswith("pt-cat1, ") for text in seen)
    assert train_set.records[5].caption == "pt-cat1", "no caption file: the template without a caption"


def test_the_dreambooth_example(root: Path) -> None:
    blocks = read_blocks(write(root, DREAMBOOTH))
    train_set = freeze_blocks(blocks)
    training, classes = train_set.groups
    assert (training.batch_size, classes.batch_size) == (4, 1)
    assert training.config.num_bucket == 1 and not classes.config.enable_bucket
    assert classes.config.prior_loss_weight == 0.5
    own = train_set.records[classes.first : classes.last]
    assert {r.caption for r in own} == {"dog"} and all(r.is_reg for r in own)
    assert train_set.records[0].concept == "sks"
    assert vary_caption("a", train_set.configs[0], random.Random(3)) in ("sks dog, a", "sks dog, ")
    batches = plan_epoch(train_set, 1, 0, 0)
    kinds = Counter(batch.indices[0] >= classes.first for batch in batches)
    assert kinds == {False: 2, True: 2}, "as many batches of class images as of training images"
    assert {batch.loss_weights for batch in batches if batch.indices[0] >= classes.first} == {(0.5,)}
    for epoch in range(5):
        batches = plan_epoch(train_set, 1, 0, epoch)
        turns = [batch.indices[0] >= classes.first for batch in batches]
        assert turns == [False, True] * 2, "one of each, in this order: two micro-batches are a step"


def test_one_caption_file_for_all(root: Path) -> None:
    (root / "captions.json").write_text(json.dumps({"1": "one", "2": "two, b"}), "utf-8")
    text = FINE_TUNING.replace("caption_file: 'train_data/'", "caption_file: captions.json")
    (block,) = read_blocks(write(root, text))
    assert [r.caption for r in block.dataset.records] == ["one", "two, b", *["pt-cat1"] * 4]
    (root / "captions.yaml").write_text('"3": three\n', "utf-8")
    (block,) = read_blocks(write(root, text.replace("captions.json", "captions.yaml")))
    assert block.dataset.records[2].caption == "three"
    (root / "other").mkdir()
    (root / "other" / "4.txt").write_text("four", "utf-8")
    (block,) = read_blocks(write(root, text.replace("captions.json", "other")))
    assert block.dataset.records[3].caption == "four"
    for content, mention in (("[1]", "no table"), ('{"1": 3}', "no text"), ("{", "Expecting")):
        (root / "captions.json").write_text(content, "utf-8")
        with Refusal("LG-DATA-092", "captions.json", mention):
            read_blocks(write(root, text))


def test_templates_of_several_lines(root: Path) -> None:
    (root / "object.txt").write_text(
        "a photo of {pt1}, {caption}\nart of {pt1} {other}, {caption}\n", "utf-8"
    )
    text = FINE_TUNING.replace("img_root:", "prompt_template: object.txt\n        img_root:")
    (block,) = read_blocks(write(root, text))
    train_set = freeze_blocks([block])
    seen = {vary_caption("x", train_set.configs[0], random.Random(i)) for i in range(100)}
    assert {"a photo of pt-cat1, x", "art of pt-cat1, x"} <= seen
    with Refusal("LG-DATA-093", "none.txt", "prompt_template"):
        read_blocks(write(root, text.replace("object.txt", "none.txt")))


def test_references_and_base_files(root: Path) -> None:
    (root / "base.yaml").write_text("data:\n  dataset1:\n    batch_size: 7\n", "utf-8")
    text = FINE_TUNING.replace("    batch_size: 4\n", "")
    text = text.replace("cfgs/train/examples/fine-tuning.yaml", "base.yaml") + (
        "  dataset2:\n    batch_size: ${data.dataset1.batch_size}\n"
        "    source:\n      s:\n        img_root: da_data\n        word_names: {pt1: x}\n"
        "        tag_transforms:\n          transforms:\n"
        "            - _target_: hcpdiff.utils.caption_tools.TagDropout\n              p: 0.3\n"
        "            - _target_: hcpdiff.utils.caption_tools.TemplateFill\n"
        "              word_names: ${....word_names}\n"
        '    bucket:\n      target_area: {_target_: "builtins.eval", _args_: ["512*512"]}\n'
        "      num_bucket: 1\n"
    )
    first, second = read_blocks(write(root, text))
    assert (first.batch_size, second.batch_size) == (7, 7)
    assert not second.config.shuffle_caption and second.config.caption_tag_dropout_rate == 0.3
    assert {r.caption for r in second.dataset.records} == {"x"}


def changed(old: str, new: str) -> str:
    assert old in FINE_TUNING
    return FINE_TUNING.replace(old, new)


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        ("a: [", "LG-DATA-084", ["line"]),
        ("just text", "LG-DATA-084", ["no table"]),
        ("data: 3", "LG-DATA-081", ["data is missing"]),
        ("a: &x [1]\nb: *x", "LG-DATA-084", ["anchors"]),
        ("_base_: nowhere.yaml", "LG-DATA-084", ["nowhere.yaml"]),
        ("_base_: ft1.yaml", "LG-DATA-084", ["circle"]),
        (changed("batch_size: 4", "batch_sise: 4"), "LG-DATA-080", ["batch_size"]),
        (changed("batch_size: 4", "batch_size: x"), "LG-DATA-081", ["batch_size"]),
        (changed("batch_size: 4", "loss_weight: 0.5"), "LG-DATA-083", ["loss_weight"]),
        (changed("num_bucket: 5", "num_bucket: 7"), "LG-DATA-086", ["num_bucket is 7", "6 images"]),
        (changed("512*768", "512**2"), "LG-DATA-089", ["missing before '*'"]),
        (changed("512*768", "open('x')"), "LG-DATA-089", ["'o' is not known"]),
        (changed("512*768", "7*13"), "LG-DATA-081", ["target_area 91"]),
        (
            changed("num_bucket", "_target_: hcpdiff.data.bucket.SizeBucket\n      num_bucket"),
            "LG-DATA-083",
            [],
        ),
        (changed("'train_data/'\n        word", "none.json\n        word"), "LG-DATA-092", ["none.json"]),
        (changed("img_root: 'train_data/'", "img_root: nope"), "LG-DATA-001", ["nope"]),
        (changed("word_names:", "att_mask: masks\n        word_names:"), "LG-DATA-083", ["att_mask"]),
        (changed("pt1: pt-cat1", "pt1: [a, b]"), "LG-DATA-083", ["pt1"]),
        (changed("'train_data/'\n        word", "${....nothing}\n        word"), "LG-DATA-084", ["nothing"]),
        (changed("'train_data/'\n        word", "${env:HOME}\n        word"), "LG-DATA-084", ["env:HOME"]),
    ],
)
def test_refusals(root: Path, text: str, code: str, mentions: list[str]) -> None:
    with Refusal(code, *mentions):
        freeze_blocks(read_blocks(write(root, text)))


def test_a_gate_sees_every_path(root: Path) -> None:
    (root.parent / "outside.yaml").write_text("train: {}\n", "utf-8")
    asked: list[str] = []

    def gate(text: str) -> Path:
        asked.append(text)
        return root / text

    read_blocks(write(root, FINE_TUNING), resolve=gate)
    assert asked == ["train_data/", "train_data/"]
    for escape in ("../outside.yaml", str(root.parent / "outside.yaml")):
        text = changed("cfgs/train/examples/fine-tuning.yaml", escape)
        with Refusal("LG-DATA-084", "does not exist"):
            read_blocks(write(root, text), resolve=gate)


def test_a_gate_keeps_base_files_below_the_configs_own_folder(root: Path) -> None:
    (root / "cfgs").mkdir()
    (root / "cfgs" / "other.yaml").write_text("data:\n  dataset1:\n    batch_size: 7\n", "utf-8")
    deep = root / "deep"
    deep.mkdir()
    text = FINE_TUNING.replace("cfgs/train/examples/fine-tuning.yaml", "cfgs/other.yaml")
    text = text.replace("    batch_size: 4\n", "")
    (trusted,) = read_blocks(write(deep, text))
    assert trusted.batch_size == 7, "found above, as in a checkout of HCP-Diffusion"
    (gated,) = read_blocks(write(deep, text), resolve=lambda name: root / name)
    assert gated.batch_size == 4
    (deep / "link.yaml").symlink_to(root / "cfgs" / "other.yaml")
    with Refusal("LG-DATA-084", "link.yaml", "does not exist"):
        read_blocks(write(deep, text.replace("cfgs/other", "link")), resolve=lambda name: root / name)


def test_another_kind_of_file(tmp_path: Path) -> None:
    with Refusal("LG-DATA-084", ".toml"):
        read_blocks(tmp_path / "x.ini")


# ---- sums ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512*768", 393216),
        (" 512 * ( 700 + 68 ) ", 393216),
        ("7//2", 3),
        ("2+3*4-1", 13),
        ("-3+5", 2),
        ("10-3-2", 5),
        ("-(2*3)", -6),
        ("7", 7),
    ],
)
def test_sums(text: str, value: int) -> None:
    assert compute(text, where="x") == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1+",
        "(1",
        "1)",
        "2 2",
        "1/2",
        "1//0",
        "2**9",
        "x",
        "1e3",
        "9" * 13,
        "9*" * 20 + "9",
        "1+" * 60 + "1",
        "٣",
    ],
)
def test_what_is_no_sum(text: str) -> None:
    with Refusal("LG-DATA-089", "x"):
        compute(text, where="x")


SUMS = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(
        lambda t: f"({t[0]}{t[1]}{t[2]})"
    ),
    max_leaves=5,
)


@given(text=SUMS)
@settings(max_examples=cases(3000), deadline=None)
def test_sums_equal_pythons_own(text: str) -> None:
    from ast import literal_eval

    expected = _value(text)
    assert literal_eval(str(expected)) == expected
    if len(text) <= 100 and abs(expected) < 10**12:
        try:
            assert compute(text, where="x") == expected
        except LoraGraftError as error:
            assert "larger" in error.why


def _value(text: str) -> int:
    """Compute a bracketed sum by folding its innermost brackets."""
    import re

    while match := re.search(r"\((-?\d+)([-+*])(-?\d+)\)", text):
        a, sign, b = int(match[1]), match[2], int(match[3])
        result = a + b if sign == "+" else a - b if sign == "-" else a * b
        text = text[: match.start()] + str(result) + text[match.end() :]
    return int(text)


@given(text=st.text(alphabet="0123456789+-*/() x.", max_size=40))
@settings(max_examples=cases(3000), deadline=None)
def test_any_text_is_computed_or_refused(text: str) -> None:
    try:
        assert isinstance(compute(text, where="x"), int)
    except LoraGraftError as error:
        assert error.code == "LG-DATA-089"


@given(width=st.integers(1, 64), height=st.integers(1, 64))
@settings(max_examples=cases(1000), deadline=None)
def test_sides_of_an_area(width: int, height: int) -> None:
    area = width * 8 * height * 8
    try:
        w, h = sides_of(area, 8, "x")
    except LoraGraftError:
        assert max(width, height) > 2 * min(width, height)
        return
    assert w * h == area and w % 8 == h % 8 == 0 and w <= h <= 2 * w
