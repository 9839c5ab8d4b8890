"""Whatever text arrives, the page shows it as text."""

from __future__ import annotations

from typing import Any

import pytest

from loragraft_tests.browser.conftest import Open
from loragraft_tests.browser.page import Page

TRAIN = "LoraGraftTrainLoRA"
HACK = "window.hacked=1;alert(1)"
PAYLOADS = [
    f"<img src=x onerror={HACK}>",
    f"<script>{HACK}</script>",
    f'"><script>{HACK}</script>',
    f"'><svg onload={HACK}>",
    f"<svg><animate onbegin={HACK} attributeName=x dur=1s>",
    f"<details open ontoggle={HACK}>",
    f'<iframe src="javascript:{HACK}"></iframe>',
    f"<a href=javascript:{HACK}>x</a>",
    f"javascript:{HACK}",
    f"data:text/html,<script>{HACK}</script>",
    f"<style>@import 'javascript:{HACK}';</style>",
    f"<input autofocus onfocus={HACK}>",
    f"<video><source onerror={HACK}></video>",
    f"<body onload={HACK}>",
    f"<math><mi xlink:href=javascript:{HACK}>x",
    f"</textarea><img src=x onerror={HACK}>",
    f"</title><img src=x onerror={HACK}>",
    f"<!--><img src=x onerror={HACK}>-->",
    f"<img src='x' style=\"background:url(javascript:{HACK})\">",
    f"<object data=javascript:{HACK}>",
    f"<embed src=javascript:{HACK}>",
    f"<form><button formaction=javascript:{HACK}>x",
    f"<marquee onstart={HACK}>x</marquee>",
    f"<template><img src=x onerror={HACK}></template>",
    "{{constructor.constructor('" + HACK + "')()}}",
    "${" + HACK + "}",
    "#{" + HACK + "}",
    "__proto__",
    "constructor",
    "toString",
    "&lt;img src=x onerror=alert(1)&gt;",
    "%3Cimg%20src=x%20onerror=alert(1)%3E",
    "\\u003cimg src=x onerror=alert(1)\\u003e",
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "a\u202etxt.exe",
    "zero\u200bwidth \U0001f9a0 emoji",
    "line\nbreak\r\nand\ttab",
    "x" * 20_000,
    "\u0000nul",
]


def assert_harmless(page: Page) -> None:
    """Nothing popped up, ran, or became an element in a panel."""
    assert page.dialogs == []
    assert page.raw.evaluate("() => window.hacked") is None
    strange = ".loragraft-panel :is(script, iframe, object, embed, style, form, input, video, details)"
    assert page.raw.locator(strange).count() == 0
    assert page.raw.evaluate(
        "() => [...document.querySelectorAll('.loragraft-panel *')].every((e) =>"
        " [...e.attributes].every((a) => !a.name.startsWith('on')))"
    )
    sources = page.raw.evaluate(
        "() => [...document.querySelectorAll('.loragraft-panel img')].map((i) => new URL(i.src).pathname)"
    )
    assert set(sources) <= {"/api/view"}
    links = page.raw.evaluate("() => [...document.querySelectorAll('.loragraft-panel a')].map((a) => a.href)")
    assert all(link.startswith(f"{page.url}/api/view?") for link in links)
    assert [e for e in page.errors if e.startswith("uncaught:")] == []


def messages(text: str, node: str) -> list[dict[str, Any]]:
    """Return every kind of message with the text in every place that holds text."""
    sample = {"step": 1, "prompt": text, "filename": text, "subfolder": text, "type": "output"}
    head = {"node": node}
    return [
        {**head, "kind": "plan", "total_steps": 9, "first_step": 1, "lines": [text, text]},
        {**head, "kind": "cache", "what": text, "done": 1, "total": 2},
        {**head, "kind": "step", "step": text, "total": text, "loss": text, "lr": text},
        {**head, "kind": "step", "step": 1, "total": 9, "loss": 0.5, "epoch": text},
        {**head, "kind": "sample", **sample},
        {**head, "kind": "sample", **sample, "type": text},
        {**head, "kind": "save", "step": text, "zero_tensors": text},
        {**head, "kind": "save", "step": 1, "zero_tensors": 2, "num_tensors": text},
        {**head, "kind": "note", "text": text},
        {**head, "kind": text, "text": text},
        {
            **head,
            "kind": "done",
            "file": text,
            "trigger": text,
            "losses": text,
            "saves": text,
            "samples": [sample],
        },
    ]


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes2"])
def test_event_payloads(open_comfy: Open, nodes2: bool) -> None:
    with open_comfy(nodes2=nodes2) as page:
        (node,) = page.build(TRAIN)
        page.frame()
        for text in PAYLOADS:
            for message in messages(text, node):
                page.ask("send(a[0])", message)
            page.wait("phase(a[0]) === 'done'", node)
            shown = page.ask("panel(a[0]).querySelector('.loragraft-report').textContent", node)
            assert text[:2000] in shown, f"{text[:60]!r} is shown as it is"
            page.ask("fail(a[0], a[1])", node, text)
            page.wait("phase(a[0]) === 'failed'", node)
            assert page.ask("part(a[0], 'hint')", node) == text[:4000]
            assert_harmless(page)
        page.ask("fail(a[0], a[1])", node, PAYLOADS[0])
        page.wait("part(a[0], 'hint') === a[1]", node, PAYLOADS[0])
        page.shoot(f"hostile-{nodes2}")


def sweep_messages(text: str, node: str) -> list[dict[str, Any]]:
    """Return every message of a sweep with the text in every place that holds text."""
    head, run = {"node": node}, {"name": text, "label": text}
    sample = {"step": 1, "prompt": text, "filename": text, "subfolder": text, "type": "output"}
    return [
        {**head, "kind": "sweep", "runs": text},
        {**head, "kind": "sweep", "runs": [text, run, {"name": [text], "label": {"x": text}}]},
        {**head, "kind": "plan", "run": text, "total_steps": text, "lines": [text]},
        {**head, "kind": "plan", "run": 0, "total_steps": 9, "first_step": text, "lines": [text]},
        {
            **head,
            "kind": "step",
            "steps": [{"run": 0, "step": 1, "total": 9, "loss": 0.5}],
            "pace": text,
            "left": text,
        },
        {**head, "kind": "sample", "run": 1, **sample},
        {**head, "kind": "failed", "run": 1, "error": text},
        {**head, "kind": "finished", "run": 0, "file": text, "step": text},
        {
            **head,
            "kind": "done",
            "file": text,
            "trigger": text,
            "runs": [{**run, "file": text}, {**run, "error": text}],
        },
    ]


def test_event_payloads_of_a_sweep(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        page.frame()
        for text in PAYLOADS:
            for message in sweep_messages(text, node):
                page.ask("send(a[0])", message)
            page.wait("lanes(a[0])[1]?.label === a[1]", node, text[:300])
            assert page.ask("lanes(a[0])[1].state", node) == f"Failed: {text[:4000]}"
            assert [row["label"] for row in page.ask("lanes(a[0])", node)] == [text[:300]] * 2
            assert_harmless(page)
        page.shoot("hostile-sweep")


def test_node_ids_and_workflow_ids(open_comfy: Open) -> None:
    with open_comfy() as page:
        (node,) = page.build(TRAIN)
        for text in PAYLOADS:
            page.ask("send(a[0])", {"node": text, "workflow": text, "kind": "note", "text": text})
            page.ask("send(a[0])", {"node": [text], "workflow": {"id": text}, "kind": "note", "text": text})
        assert page.ask("phase(a[0])", node) == "idle"
        page.reload()
        assert_harmless(page)


def test_widgets_of_a_shared_workflow(open_comfy: Open) -> None:
    """A workflow with hostile values in every text widget is refused with a message and does nothing."""
    with open_comfy() as page:
        for text in (*PAYLOADS[:4], PAYLOADS[8], "../../../../etc/passwd"):
            page.build("LoraGraftLoadImageFolder", "LoraGraftBuildDataset", TRAIN, "LoraGraftPreviewWithLoRA")
            page.ask("fillText(a[0])", text)
            page.frame()
            page.queue()
            page.wait("refused()")
            assert_harmless(page)
        page.shoot("hostile-refused")
