"""A workflow in UI format that grows node by node, and the same read as the prompt that a browser queues.

UI-format workflows keep widget values by position, in the order that the server's node definitions give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loragraft_tests.comfyui import prompts

Info = dict[str, Any]
Workflow = dict[str, Any]
Place = Sequence[int]

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice that shows widgets of its own
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
# LiteGraph's modes of a node: left out with its links, or passing its inputs on.
MUTED, BYPASSED = 2, 4
WITHOUT_WIDGETS = ("MarkdownNote", "Note", "Reroute")
GROUP_COLORS = ("#3f789e", "#8A8", "#a1309b", "#b58b2a", "#88A")
# Room for a node's title bar and what the page adds to it, and for a group's title.
GAP, TITLE, PAD, HEAD = 70, 30, 20, 40


class Sheet:
    """A workflow that grows; node ids are counted from 1."""

    def __init__(self, info: Info, uuid: str) -> None:
        self.info, self.uuid = info, uuid
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.groups: list[dict[str, Any]] = []

    def note(self, text: str, pos: Place, size: Place, title: str = "") -> int:
        """Add a note in Markdown; return its id."""
        return self._append("MarkdownNote", pos, size, [], [], [text], title)

    def add(
        self,
        kind: str,
        pos: Place,
        size: Place,
        values: Mapping[str, Any] | None = None,
        *,
        title: str = "",
        mode: int = 0,
    ) -> int:
        """Add a node and return its id; widgets not named keep their defaults, a.b is shown by choice a."""
        given = dict(values or {})
        chosen: dict[str, Any] = {}
        inputs, widgets = [], []
        for name, spec in _walk(self.info[kind], chosen):
            if not _is_widget(spec):
                inputs.append({"name": name, "type": spec[0], "link": None})
                continue
            value = given.pop(name, _default(spec))
            chosen[name] = float(value) if _kind(spec) == "FLOAT" else value
            widgets.append(chosen[name])
            if _options(spec).get("control_after_generate"):
                widgets.append("fixed")
        assert not given, f"{kind} has no widget {sorted(given)}"
        outputs = [
            {"name": n, "type": t, "links": []}
            for n, t in zip(self.info[kind]["output_name"], self.info[kind]["output"], strict=True)
        ]
        return self._append(kind, pos, size, inputs, outputs, widgets, title, mode)

    def _append(
        self,
        kind: str,
        pos: Place,
        size: Place,
        inputs: list[Any],
        outputs: list[Any],
        values: list[Any],
        title: str = "",
        mode: int = 0,
    ) -> int:
        number = len(self.nodes) + 1
        node = {
            "id": number,
            "type": kind,
            "pos": list(pos),
            "size": list(size),
            "flags": {},
            "order": number - 1,
            "mode": mode,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        self.nodes.append(node | {"title": title} if title else node)
        return number

    def link(self, source: int, slot: int | str, target: int, name: str) -> None:
        """Link an output, by its number or name, to an input or to a widget."""
        outputs, node = self.nodes[source - 1]["outputs"], self.nodes[target - 1]
        if isinstance(slot, str):
            slot = next(i for i, output in enumerate(outputs) if output["name"] == slot)
        number = len(self.links) + 1
        if not any(i["name"] == name for i in node["inputs"]):
            spec = dict(_inputs(self.info[node["type"]]))[name]
            node["inputs"].append({"name": name, "type": spec[0], "widget": {"name": name}, "link": None})
        place = next(k for k, i in enumerate(node["inputs"]) if i["name"] == name)
        node["inputs"][place]["link"] = number
        outputs[slot]["links"].append(number)
        self.links.append([number, source, slot, target, place, outputs[slot]["type"]])

    def group(self, title: str, box: Place) -> None:
        """Frame a part of the sheet: left, top, width, height."""
        number = len(self.groups) + 1
        self.groups.append(
            {
                "id": number,
                "title": title,
                "bounding": list(box),
                "color": GROUP_COLORS[(number - 1) % len(GROUP_COLORS)],
                "font_size": 24,
                "flags": {},
            }
        )

    def below(self, number: int) -> int:
        """Return where a node below this one begins."""
        node = self.nodes[number - 1]
        return int(node["pos"][1] + node["size"][1] + GAP)

    def frame(self, title: str, ids: Sequence[int]) -> None:
        """Frame these nodes."""
        nodes = [self.nodes[number - 1] for number in ids]
        left, top = (min(n["pos"][axis] for n in nodes) for axis in (0, 1))
        right, bottom = (max(n["pos"][axis] + n["size"][axis] for n in nodes) for axis in (0, 1))
        self.group(
            title,
            (left - PAD, top - TITLE - HEAD, right - left + 2 * PAD, bottom - top + TITLE + HEAD + PAD),
        )

    def workflow(self) -> Workflow:
        """Return the workflow in UI format."""
        return {
            "id": self.uuid,
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 80]}},
            "version": 0.4,
        }


def to_prompt(workflow: Workflow, info: Info) -> prompts.Prompt:
    """Read a UI-format workflow as the API prompt that the browser would queue."""
    sources = _sources(workflow)
    graph: prompts.Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in WITHOUT_WIDGETS or node.get("mode") in (MUTED, BYPASSED):
            continue
        values = list(node.get("widgets_values", []))
        linked = {i["name"]: sources[i["link"]] for i in node["inputs"] if i.get("link") in sources}
        inputs: dict[str, Any] = {}
        for name, spec in _walk(info[node["type"]], inputs):
            if _is_widget(spec):
                inputs[name] = values.pop(0)
                if _options(spec).get("control_after_generate"):
                    assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        assert not values, f"{node['type']} has {len(values)} values too many"
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": {**inputs, **linked}}
    return graph


def _sources(workflow: Workflow) -> dict[int, list[Any]]:
    """Return where each link comes from; links of muted nodes, and bypassed ones without input, are gone."""
    modes = {node["id"]: node.get("mode") for node in workflow["nodes"]}
    found = {link[0]: [str(link[1]), link[2]] for link in workflow["links"] if modes[link[1]] != MUTED}
    for node in workflow["nodes"]:
        if node.get("mode") == BYPASSED:
            for output in node["outputs"]:
                through = next((i["link"] for i in node["inputs"] if i["type"] == output["type"]), None)
                for link in output["links"]:
                    before = found.pop(link)
                    assert before[0] == str(node["id"])
                    if through in found:
                        found[link] = found[through]
    return found


def _inputs(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, spec)
        for kind in ("required", "optional")
        for name, spec in schema["input"].get(kind, {}).items()
    ]


def _walk(schema: dict[str, Any], chosen: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """List all inputs in their order; behind a choice come those that it shows.

    Whoever takes a choice puts its value into ``chosen`` before asking for the next input.
    """
    for name, spec in _inputs(schema):
        yield name, spec
        if _kind(spec) == DYNAMIC:
            option = next(o for o in _options(spec)["options"] if o["key"] == chosen[name])
            for inner, inner_spec in _inputs({"input": option["inputs"]}):
                yield f"{name}.{inner}", inner_spec


def _options(spec: Any) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _kind(spec: Any) -> str:
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def _is_widget(spec: Any) -> bool:
    return _kind(spec) in WIDGETS and not _options(spec).get("forceInput")


def _default(spec: Any) -> Any:
    options = _options(spec)
    if "default" in options:
        return options["default"]
    if _kind(spec) == DYNAMIC:
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    return (
        choices[0]
        if choices
        else {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": ""}[_kind(spec)]
    )
