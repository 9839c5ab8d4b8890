"""The live panel in the real page, fed with pretended runs: what it shows, keeps, and never mixes."""

from __future__ import annotations

import pytest

from loragraft_tests.browser import runs
from loragraft_tests.browser.conftest import Open
from loragraft_tests.browser.page import Page

TRAIN = "LoraGraftTrainLoRA"
RENDERERS = pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])


def send(page: Page, *messages: runs.Message) -> None:
    """Hand messages to the page as if the server had sent them."""
    for message in messages:
        page.ask("send(a[0])", message)


@RENDERERS
def test_a_run_from_plan_to_product(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        (node,) = page.build(TRAIN)
        page.frame()
        plan, cache, *rest = runs.training(node)
        send(page, plan, {**cache, "done": 4})
        page.wait("phase(a[0]) === 'encoding'", node)
        assert "Encoding images" in page.ask("text(a[0])", node)
        assert plan["lines"][0] in page.ask("text(a[0])", node), "the plan is shown before the first step"
        page.shoot(f"panel-encoding-{nodes2}")
        send(page, *rest)
        page.wait("points(a[0]) === 250 && probe.saves(a[0]) === 2", node)
        text = page.ask("text(a[0])", node)
        assert "Step 250 / 400" in text and "0.12 s" in text and "0:18" in text
        page.shoot(f"panel-training-{nodes2}")
        send(page, runs.done(node))
        page.wait("phase(a[0]) === 'done'", node)
        text = page.ask("text(a[0])", node)
        assert "blorb.safetensors" in text and "Step 400 / 400" in text and "0:49" in text
        page.shoot(f"panel-done-{nodes2}")
        assert page.our_errors() == []


@RENDERERS
def test_a_sweep_has_a_line_and_a_row_for_each_run(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        (node,) = page.build(TRAIN)
        page.frame()
        send(page, *runs.sweep(node))
        page.wait("lanes(a[0]).length === 4", node)
        page.wait("lines(a[0]) === 4 && probe.points(a[0]) === 0", node)
        page.wait("lanes(a[0])[2].phase === 'failed'", node)
        text = page.ask("text(a[0])", node)
        assert "Step 810 / 1260" in text, "nobody waits for the failed run"
        assert "0.05 s" in text and "0:23" in text and "0 / 4" in text
        rows = page.ask("lanes(a[0])", node)
        assert rows[0]["label"] == "learning_rate 1e-4, network_dim 8" and rows[0]["state"] == "250 / 400"
        assert rows[2]["phase"] == "failed" and "LG-RUN-004" in rows[2]["state"]
        assert len({row["colour"] for row in rows}) == 4
        page.shoot(f"panel-sweep-{nodes2}")
        send(
            page,
            {
                "node": node,
                "kind": "finished",
                "run": 0,
                "file": f"{runs.SWEPT[0][0]}.safetensors",
                "step": 400,
            },
        )
        page.wait("lanes(a[0])[0].state.endsWith('network_dim8.safetensors')", node)
        send(page, runs.sweep_done(node))
        page.wait("phase(a[0]) === 'done'", node)
        text = page.ask("text(a[0])", node)
        assert "3 / 4" in text and "Step 1260 / 1260" in text and "1:02" in text
        page.shoot(f"panel-sweep-done-{nodes2}")
        page.reload()
        page.wait("node(a[0])?.type === a[1]", node, TRAIN)
        page.frame()
        page.wait("lines(a[0]) === 4 && probe.lanes(a[0])[2].phase === 'failed'", node)
        send(page, *runs.training(node, 40))
        page.wait("points(a[0]) === 40 && probe.lanes(a[0]).length === 0 && probe.lines(a[0]) === 0", node)
        assert page.our_errors() == []


def test_the_pointer_reads_out_every_run_of_a_sweep(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        page.frame()
        send(page, *runs.sweep(node))
        page.wait("lines(a[0]) === 4", node)
        last = [row["loss"] for row in page.ask("lanes(a[0])", node)]
        page.raw.locator(".loragraft-plot").hover(position={"x": 60, "y": 30})
        page.wait("part(a[0], 'key-step')?.startsWith('Step ')", node)
        assert [row["loss"] for row in page.ask("lanes(a[0])", node)] != last
        page.raw.locator(".loragraft-head").hover()
        page.wait("lanes(a[0]).map((r) => r.loss).join() === a[1].join()", node, last)
        page.raw.get_by_role("button", name="Log", exact=True).click()
        page.wait("lines(a[0]) === 4", node)
        page.raw.get_by_role("button", name="Report").click()
        page.raw.get_by_text("learning_rate 3e-4, network_dim 8: LG-RUN-004").wait_for()


def test_sixty_four_runs_stay_quick_and_scroll(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        page.frame()
        milliseconds = page.ask("floodMany(a[0], 64, 400)", node)
        page.wait("lines(a[0]) === 64 && probe.lanes(a[0]).length === 64", node)
        assert milliseconds < 5000, f"{milliseconds:.0f} ms for 64 runs of 400 steps"
        scrolls = page.ask("panel(a[0]).querySelector('.loragraft-lanes').scrollHeight", node)
        assert scrolls > page.ask("panel(a[0]).querySelector('.loragraft-lanes').clientHeight", node) > 30
        page.shoot("panel-sweep-64")


def test_the_pointer_reads_out_a_step(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        page.frame()
        send(page, *runs.training(node))
        page.wait("points(a[0]) === 250", node)
        page.raw.locator(".loragraft-plot").hover()
        page.wait("part(a[0], 'key-step')?.startsWith('Step ')", node)
        page.raw.get_by_role("button", name="Log", exact=True).click()
        page.raw.get_by_role("button", name="Report").click()
        page.raw.get_by_text("264 modules").wait_for()
        page.shoot("panel-report")
        page.raw.get_by_role("button", name="Report").click()
        page.raw.get_by_text("264 modules").wait_for(state="hidden")
        page.shoot("panel-log")


def test_several_nodes_and_workflows_do_not_mix(open_comfy: Open) -> None:
    with open_comfy() as page:
        one, two = page.build(TRAIN, TRAIN)
        page.frame()
        here = page.ask("app.rootGraph.id")
        send(page, *runs.training(one, 40, workflow=here), *runs.training(two, 90, workflow=here))
        send(page, *runs.training(one, 200, workflow="another workflow"))
        page.wait("points(a[0]) === 40 && probe.points(a[1]) === 90", one, two)
        send(page, {**runs.done(two), "workflow": here})
        page.wait("phase(a[1]) === 'done'", one, two)
        assert page.ask("phase(a[0])", one) == "training"
        page.shoot("panel-two-nodes")


def test_a_node_inside_a_subgraph(open_comfy: Open) -> None:
    with open_comfy() as page:
        page.build(TRAIN, "LoraGraftBuildDataset")
        outer, inner = page.ask("wrap(0)")
        send(page, *runs.training(f"{outer}:{inner}", 60))
        page.ask("enter(a[0])", outer)
        page.frame()
        page.wait("points(a[0]) === 60", inner)


@RENDERERS
def test_a_reload_keeps_what_was_shown(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        (node,) = page.build(TRAIN)
        page.frame()
        send(page, *runs.training(node, 120))
        page.wait("points(a[0]) === 120", node)
        page.reload()
        page.wait("node(a[0])?.type === a[1]", node, TRAIN)
        page.frame()
        page.wait("points(a[0]) === 120", node)
        assert page.ask("phase(a[0])", node) == "training"
        send(page, {"node": node, "kind": "step", "steps": runs.steps(121, 130)})
        page.wait("points(a[0]) === 130", node)


def test_stop_and_failure(open_comfy: Open) -> None:
    with open_comfy() as page:
        one, two = page.build(TRAIN, TRAIN)
        page.frame()
        send(page, *runs.training(one, 120))
        page.ask("api.dispatchCustomEvent('execution_interrupted', {node_id: a[0]})", one)
        page.wait("phase(a[0]) === 'stopped'", one)
        assert "Queue again to continue" in page.ask("text(a[0])", one)
        message = "LG-DATA-002  There are no images.\nWhere: input/empty\nFix:   name another folder"
        page.ask("fail(a[0], a[1])", two, message)
        page.wait("phase(a[0]) === 'failed'", two)
        assert "Fix:   name another folder" in page.ask("text(a[0])", two)
        page.shoot("panel-stopped-and-failed")


def test_a_hundred_thousand_steps_stay_quick(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        page.frame()
        milliseconds = page.ask("flood(a[0], 100000)", node)
        page.wait("part(a[0], 'count').includes('100000')", node)
        assert page.ask("points(a[0])", node) <= 2000
        assert milliseconds < 5000, f"{milliseconds:.0f} ms for 100,000 steps"


def test_advanced_widgets_fold_in_the_classic_renderer(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        page.frame()
        height = page.ask("node(a[0]).size[1]", node)
        page.raw.get_by_role("button", name="More settings").click()
        page.wait("node(a[0]).size[1] > a[1] + 300", node, height)
        page.frame()
        page.raw.get_by_role("button", name="Fewer settings").click()
        page.wait("node(a[0]).size[1] === a[1]", node, height)
        prompt = page.ask("app.graphToPrompt()")["output"][node]["inputs"]
        assert prompt["optimizer_type"] == "AdamW" and "loragraft_panel" not in prompt
        saved = page.ask("app.rootGraph.serialize()")["nodes"][0]["widgets_values"]
        assert page.ask("node(a[0]).widgets.filter((w) => w.serialize !== false).length", node) == len(saved)


@pytest.mark.parametrize("kind", ["LoraGraftBuildDataset", "LoraGraftLoadImageFolder", "LoraGraftWD14Tag"])
@pytest.mark.parametrize("nodes2", [False, True])
def test_other_nodes_fold_with_a_button_of_their_own(open_comfy: Open, kind: str, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        (node,) = page.build(kind)
        page.frame()
        more = "node(a[0]).widgets.find((w) => w.name === 'loragraft_more')"
        assert bool(page.ask(f"{more}.hidden", node)) == nodes2, "Nodes 2.0 has a button of its own"
        page.frame()
        assert page.raw.get_by_text("loragraft_more").count() == 0, "Nodes 2.0 draws no button of this one"
        shown = "node(a[0]).widgets.filter((w) => w.options?.advanced && !w.hidden).length"
        assert page.ask(shown, node) == 0
        page.ask(f"{more}.callback()", node)
        assert page.ask(shown, node) > 3
        prompt = page.ask("app.graphToPrompt()")["output"][node]["inputs"]
        assert "loragraft_more" not in prompt and len(prompt) > 5
        saved = page.ask("app.rootGraph.serialize()")["nodes"][0]["widgets_values"]
        assert page.ask("node(a[0]).widgets.filter((w) => w.serialize !== false).length", node) == len(saved)
