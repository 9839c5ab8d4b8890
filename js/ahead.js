// What a settings node will do, drawn on it before anything is trained: a learning rate's curve, or bars of
// blocks. The server computes it with the very functions that train, so that the picture cannot differ.

import { short } from "./maths.js";
import { settingsChain } from "./presets.js";

const NS = "http://www.w3.org/2000/svg";
const ROUTE = "/loragraft/ahead";
// As in nodes/ahead.py.
const BESIDE = [
  ...["learning_rate", "unet_lr", "text_encoder_lr", "network_train_unet_only"],
  ...["network_train_text_encoder_only", "optimizer_type", "optimizer_args", "scale_lr"],
];
const HEIGHT = 110;
const HEIGHTS = { LoraGraftBlocks: 190 }; // two rows of bars
const WAIT = 400; // ms between two looks at the widgets; typing draws once

/** Nodes that draw: what a picture is made of. */
export const DRAWN = { LoraGraftSchedule: curve, LoraGraftBlocks: bars };

function add(parent, tag, attributes = {}, text = "") {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

/** The points of a line through `values`, between 0 and their largest, as an SVG path. */
export function linePath(values, width, height) {
  const peak = Math.max(...values, Number.MIN_VALUE);
  const x = (i) => (i * width) / Math.max(1, values.length - 1);
  return values.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${(height * (1 - v / peak)).toFixed(1)}`).join("");
}

function curve(svg, answer, width, height) {
  add(svg, "path", { class: "rate", d: linePath(answer.curve, width - 2, height - 36), transform: "translate(1 18)" });
  add(svg, "text", { class: "tick", x: 2, y: 11 }, short(Math.max(...answer.curve)));
  add(svg, "text", { class: "tick", x: width - 2, y: height - 4, "text-anchor": "end" }, String(answer.steps));
}

/** Rows of bars, one for each kind of base model, of one scale. */
function bars(svg, answer, width, height) {
  const rows = Object.entries(answer.bars);
  const peak = Math.max(...rows.flatMap(([, row]) => row.map(([, weight]) => weight)), 1);
  rows.forEach(([title, row], number) => {
    const group = add(svg, "g", { transform: `translate(0 ${(number * height) / rows.length})` });
    barRow(group, `${title}: ${short(peak)}`, row, peak, width, height / rows.length);
  });
}

function barRow(group, title, row, peak, width, height) {
  const each = width / Math.max(1, row.length);
  row.forEach(([name, weight], i) => {
    const high = ((height - 30) * weight) / peak;
    const bar = add(group, "rect", { class: "bar", x: i * each + 1, y: height - 16 - high, width: Math.max(1, each - 2), height: high });
    add(bar, "title", {}, `${name}: ${short(weight)}`);
    if (weight === 0) add(group, "text", { class: "tick", x: (i + 0.5) * each, y: height - 20, "text-anchor": "middle" }, "\u00d7");
  });
  add(group, "text", { class: "tick", x: 2, y: 11 }, title);
  for (const i of [0, Math.floor(row.length / 2), row.length - 1]) {
    const end = i === 0 ? "start" : i === row.length - 1 ? "end" : "middle";
    add(group, "text", { class: "tick", x: end === "start" ? 1 : end === "end" ? width - 1 : (i + 0.5) * each, y: height - 4, "text-anchor": end }, row[i]?.[0] ?? "");
  }
}

/** What the node's widgets say, by name; a choice's own widgets are called "choice.name". */
export const valuesOf = (node) =>
  Object.fromEntries((node.widgets ?? []).filter((w) => w.serialize !== false && w.name).map((w) => [w.name, w.value]));

/** The Train LoRA node that the settings lead to, or undefined. */
export function trainOf(node, seen = new Set()) {
  if (!node || seen.has(node)) return undefined;
  seen.add(node);
  for (const link of node.outputs?.flatMap((output) => output.links ?? []) ?? []) {
    const target = node.graph?.getNodeById?.(node.graph.links?.[link]?.target_id ?? node.graph.getLink?.(link)?.target_id);
    if (target?.widgets?.some((w) => w.name === "max_train_steps")) return target;
    const further = trainOf(target, seen);
    if (further) return further;
  }
  return undefined;
}

/** The number of steps of the Train LoRA node that the settings lead to, else 1000. */
export const stepsOf = (node) => trainOf(node)?.widgets.find((w) => w.name === "max_train_steps").value || 1000;

/** What else a picture depends on: Train LoRA's rates, and what the other settings nodes say instead. */
export function besideOf(node) {
  const train = trainOf(node);
  const all = {};
  for (const other of train ? [train, ...settingsChain(train)] : [])
    for (const [name, value] of Object.entries(valuesOf(other))) if (BESIDE.includes(name)) all[name] = value;
  return all;
}

/** Put the picture on a node and keep it up to date; returns what stops that. */
export function addAhead(node, api) {
  const host = document.createElement("div");
  host.className = "loragraft-ahead";
  const svg = add(host, "svg", { class: "loragraft-chart", role: "img" });
  const note = document.createElement("div");
  note.className = "loragraft-ahead-note";
  host.append(note);
  const widget = node.addDOMWidget("loragraft_ahead", "loragraft_ahead", host, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => (HEIGHTS[node.comfyClass] ?? HEIGHT) + 20,
  });
  widget.serialize = false;
  let asked = "";
  let answer = null;

  function render() {
    const [width, height] = [host.clientWidth, host.clientHeight];
    svg.replaceChildren();
    note.textContent = answer?.error ?? "";
    if (width < 40 || height < 40 || !answer || answer.error) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    DRAWN[node.comfyClass](svg, answer, width, height);
  }

  async function look() {
    if (document.hidden || !host.isConnected) return;
    const question = JSON.stringify({ node: node.comfyClass, values: valuesOf(node), beside: besideOf(node), steps: stepsOf(node) });
    if (question === asked) return;
    asked = question;
    try {
      const reply = await api.fetchApi(`${ROUTE}?${new URLSearchParams({ ask: question })}`);
      const found = await reply.json();
      if (question === asked) answer = found;
    } catch (error) {
      answer = { error: String(error) };
    }
    render();
  }

  const timer = setInterval(look, WAIT);
  const observer = new ResizeObserver(render);
  observer.observe(host);
  const { onRemoved } = node;
  node.onRemoved = function (...args) {
    clearInterval(timer);
    observer.disconnect();
    return onRemoved?.apply(this, args);
  };
}
