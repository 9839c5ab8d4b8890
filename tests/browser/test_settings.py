"""Settings nodes on the real page: pictures before training, choices that show their own inputs, presets."""

from __future__ import annotations

import pytest

from loragraft_tests.browser.conftest import Open

RENDERERS = pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
ALL = ("Network", "Blocks", "Optimizer", "Schedule", "Loss", "Text", "Saving", "KohyaConfig")
SET, GET = "setValue(a[0], a[1], a[2])", "value(a[0], a[1])"
NAMES, LABELS = "names(a[0])", "labels(a[0])"


@RENDERERS
def test_a_schedule_is_drawn_and_follows_its_widgets(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        schedule, blocks = page.build("LoraGraftSchedule", "LoraGraftBlocks")
        page.frame()
        page.wait(
            "count('.loragraft-ahead path.rate') === 1 && probe.count('.loragraft-ahead rect.bar') === 48"
        )
        before = page.ask("attribute('.loragraft-ahead path.rate', 'd')")
        page.ask(SET, schedule, "lr_scheduler", "cosine_with_restarts")
        page.ask(SET, schedule, "lr_scheduler.lr_scheduler_num_cycles", 4)
        page.wait("attribute('.loragraft-ahead path.rate', 'd') !== a[0]", before)
        page.ask(SET, blocks, "down_lr_weight", "sine")
        page.wait("count('.loragraft-ahead rect.bar[height=\"0\"]') === 2")  # the first of each row
        page.ask(SET, blocks, "down_lr_weight", "sinus")
        page.wait("texts('.loragraft-ahead-note').some(t => t.includes('LG-CFG-003'))")
        page.shoot(f"ahead-{'nodes2' if nodes2 else 'canvas'}")
        assert page.our_errors() == []


@RENDERERS
def test_every_settings_node_can_be_seen(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2, locale="zh") as page:
        ids = page.build(*(f"LoraGraft{name}" for name in ALL))
        assert len(ids) == len(ALL)
        page.frame()
        names = page.ask(NAMES, ids[0])
        assert "algo" in names and "algo.conv_dim" in names and "algo.factor" not in names
        page.ask(SET, ids[0], "algo", "lokr")
        assert dict(page.ask(LABELS, ids[0]))["algo.factor"] == "LoKr 因子"
        assert page.ask(GET, ids[ALL.index("Schedule")], "lr_scheduler") == "cosine"
        page.shoot(f"settings-{'nodes2' if nodes2 else 'canvas'}")
        assert page.our_errors() == []


@RENDERERS
def test_a_preset_fills_widgets_in(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        (train,) = page.build("LoraGraftTrainLoRA")
        page.frame()
        page.wait("count('.loragraft-presets select') === 4")
        page.ask("choose('.loragraft-presets select', 0, 'character')")
        page.ask("choose('.loragraft-presets select', 1, 'loha')")
        page.ask("click('.loragraft-presets button')")
        page.wait(f"{GET} === 6", train, "network_dim")
        assert page.ask(GET, train, "learning_rate") == 5e-5
        made = page.ask("app.rootGraph.nodes.map(n => n.comfyClass)")
        assert made == ["LoraGraftTrainLoRA", "LoraGraftNetwork"]
        network = page.ask("app.rootGraph.nodes[1].id")
        assert page.ask(GET, network, "algo") == "loha"
        assert page.ask(GET, network, "algo.conv_dim") == 3
        page.frame()
        page.shoot(f"preset-{'nodes2' if nodes2 else 'canvas'}")
        assert page.our_errors() == []


@RENDERERS
@pytest.mark.parametrize("locale", ["en", "ru", "zh", "zh-TW"])
def test_the_presets_take_two_rows_in_every_language(open_comfy: Open, locale: str, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2, locale=locale) as page:
        page.build("LoraGraftTrainLoRA")
        page.frame()
        page.wait("count('.loragraft-presets select') === 4")
        controls = "document.querySelectorAll('.loragraft-presets :is(select, button)')"
        tops = page.raw.evaluate(f"() => [...{controls}].map((element) => element.offsetTop)")
        assert tops[:2] == [tops[0]] * 2 and tops[2:] == [tops[2]] * 3 and tops[2] > tops[0], tops
        page.ask("app.rootGraph.nodes[0].setSize([400, 1600])")
        page.frame()
        assert page.raw.evaluate(f"() => [...{controls}].map((element) => element.offsetTop)") == tops
