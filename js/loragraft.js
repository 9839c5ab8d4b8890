// ComfyUI's side of the live panel: puts one on every Train LoRA node and feeds it; folds advanced widgets.
// Runs are kept per workflow and node, so that open workflows and several nodes never mix, and a
// page that is loaded again shows what it showed: from the session, else from the server's history.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { DRAWN, addAhead } from "./ahead.js";
import { translateNested } from "./nested.js";
import { PANEL_HEIGHT, createPanel } from "./panel.js";
import { addPresets } from "./presets.js";
import { BUSY, apply, begin, end, finish, newRun, pack, unpack } from "./runs.js";
import { strings } from "./strings.js";
import { addStyle } from "./style.js";

const NODE = "LoraGraftTrainLoRA";
const STORE = "loragraft.runs";
const panels = new WeakMap(); // node -> panel
const owners = new Map(); // execution id -> workflow id, for the prompt that runs now
let runs = new Map(); // "workflow id/execution id" -> run
let promptNow = "";

const graph = () => app.rootGraph ?? app.graph;
const keyOf = (workflow, id) => `${workflow || graph()?.id || ""}/${id}`;

/** All Train LoRA nodes of the open graph as [execution id, node]; "5:3" is node 3 inside subgraph node 5. */
function trainNodes(within = graph(), prefix = "") {
  const found = [];
  for (const node of within?.nodes ?? within?._nodes ?? []) {
    if (node.comfyClass === NODE) found.push([`${prefix}${node.id}`, node]);
    if (node.subgraph) found.push(...trainNodes(node.subgraph, `${prefix}${node.id}:`));
  }
  return found;
}

/** Draw every panel of the open graph; a node that runs under several ids shows the newest run. */
function refresh() {
  const newest = new Map();
  for (const [id, node] of trainNodes()) {
    const run = runs.get(keyOf("", id));
    if (!newest.has(node) || (run?.updated ?? 0) > (newest.get(node)?.updated ?? 0)) newest.set(node, run);
  }
  for (const [node, run] of newest) panels.get(node)?.show(run ?? newRun(), node.showAdvanced);
}

let frame = 0;
function refreshSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    refresh();
  });
}

function change(workflow, id, what) {
  const key = keyOf(workflow, id);
  const run = runs.get(key) ?? newRun();
  runs.set(key, run);
  run.prompt = promptNow || run.prompt;
  what(run);
  run.updated = Date.now();
  refreshSoon();
}

const isOurs = (id) => owners.has(id) || trainNodes().some(([other]) => other === id);

function listen() {
  api.addEventListener("execution_start", ({ detail }) => {
    promptNow = String(detail?.prompt_id ?? "");
    owners.clear();
  });
  api.addEventListener("executing", ({ detail }) => {
    const id = String(detail ?? "");
    if (id && isOurs(id)) change(owners.get(id), id, begin);
  });
  api.addEventListener("loragraft.train", ({ detail }) => {
    const id = String(detail?.node ?? "");
    if (detail?.workflow) owners.set(id, String(detail.workflow));
    else if (!owners.has(id)) owners.set(id, graph()?.id ?? "");
    change(owners.get(id), id, (run) => apply(run, detail));
  });
  api.addEventListener("executed", ({ detail }) => {
    const id = String(detail?.display_node ?? detail?.node ?? "");
    const payload = detail?.output?.loragraft?.[0];
    if (payload && isOurs(id)) change(owners.get(id), id, (run) => finish(run, payload));
  });
  api.addEventListener("execution_interrupted", () => {
    for (const [id, workflow] of owners) change(workflow, id, (run) => end(run, "stopped"));
  });
  api.addEventListener("execution_error", ({ detail }) => {
    const id = String(detail?.node_id ?? "");
    if (isOurs(id)) change(owners.get(id), id, (run) => end(run, "failed", detail?.exception_message));
  });
  api.addEventListener("reconnected", recallQuietly);
  addEventListener("pagehide", () => sessionStorage.setItem(STORE, pack(runs)));
}

/** Ask the server's history about nodes whose run this page has not seen end. */
async function recall() {
  const open = trainNodes().filter(([id]) => {
    const run = runs.get(keyOf("", id));
    return !run || BUSY.includes(run.phase);
  });
  if (!open.length) return;
  const history = await (await api.fetchApi("/history?max_items=32")).json();
  const entries = Object.values(history).reverse();
  for (const [id] of open) {
    const key = keyOf("", id);
    const entry = entries.find((e) => e?.prompt?.[3]?.extra_pnginfo?.workflow?.id === graph().id && e.prompt[2]?.[id]?.class_type === NODE);
    const run = runs.get(key);
    const payload = entry?.outputs?.[id]?.loragraft?.[0];
    if (!entry || (run && run.prompt !== entry.prompt[1])) continue;
    if (payload) runs.set(key, finish(run ?? newRun(), payload));
    else if (run) recallEnd(run, id, entry.status?.messages ?? []);
  }
  refresh();
}

const recallQuietly = () => recall().catch((error) => console.warn("LoraGraft: no history", error));

function recallEnd(run, id, messages) {
  const error = messages.find(([kind, detail]) => kind === "execution_error" && String(detail?.node_id) === id);
  if (error) end(run, "failed", error[1].exception_message);
  else end(run, "stopped");
}

function addPanel(node) {
  const imageUrl = ({ filename, subfolder, type }) => api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  const panel = createPanel(words(), imageUrl, () => toggleMore(node));
  panels.set(node, panel);
  const margin = 10; // the classic renderer's, above and below a DOM widget
  const options = { serialize: false, hideOnZoom: false, margin, getMinHeight: () => PANEL_HEIGHT + 2 * margin };
  const widget = node.addDOMWidget("loragraft_panel", "loragraft_panel", panel.element, options);
  widget.serialize = false; // options.serialize keeps it out of the prompt, this out of the workflow file
  panel.element.addEventListener("wheel", (event) => passWheel(event, panel), { passive: false });
  const { onRemoved } = node;
  node.onRemoved = function (...args) {
    panel.dispose();
    return onRemoved?.apply(this, args);
  };
}

/**
 * Nodes 2.0 folds widgets that are marked as advanced away. The classic renderer shows them all, and both
 * make a node high enough for all, which fills the screen here. So they are hidden until node.showAdvanced.
 */
function foldAdvanced(node) {
  const folded = (widget) => {
    if (node.showAdvanced || app.extensionManager?.setting?.get("Comfy.Node.AlwaysShowAdvancedWidgets")) return false;
    return !node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
  };
  for (const widget of node.widgets ?? []) {
    if (!widget.options?.advanced) continue;
    Object.defineProperty(widget, "hidden", { configurable: true, get: () => folded(widget), set: () => {} });
  }
  node.setSize([node.size[0], node.computeSize()[1]]); // a new node's; a loaded one gets its saved size after this
}

const words = () => strings(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");

/** The button below a folded node's widgets; Train LoRA has its own in the panel, Nodes 2.0 one on every node. */
function addMore(node) {
  const label = () => (node.showAdvanced ? `\u25b4 ${words().less}` : `\u25be ${words().more}`);
  const more = node.addWidget("button", "loragraft_more", null, () => toggleMore(node), { serialize: false, canvasOnly: true });
  more.serialize = false; // see addPanel
  Object.defineProperty(more, "label", { configurable: true, get: label, set: () => {} });
  Object.defineProperty(more, "hidden", { configurable: true, get: () => Boolean(LiteGraph.vueNodesMode), set: () => {} });
}

function toggleMore(node) {
  const spare = Math.max(0, node.size[1] - node.computeSize()[1]); // the height that the user gave to the panel
  node.showAdvanced = !node.showAdvanced;
  node.setSize([node.size[0], node.computeSize()[1] + spare]);
  node.setDirtyCanvas(true, true);
  refreshSoon();
}

/** The wheel zooms the canvas, as everywhere on a node, except over text that scrolls. */
function passWheel(event, panel) {
  event.stopPropagation();
  const list = event.target.closest(".loragraft-lanes");
  const scrolls = (panel.reading() && event.target.closest(".loragraft-report")) || (list && list.scrollHeight > list.clientHeight);
  if (scrolls && !event.ctrlKey) return;
  event.preventDefault();
  app.canvas.processMouseWheel(event);
}

app.registerExtension({
  name: "LoraGraft",
  init() {
    addStyle();
    runs = unpack(sessionStorage.getItem(STORE));
    listen();
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LoraGraft")) return;
    translateNested(node);
    if (node.comfyClass in DRAWN) return addAhead(node, api);
    if (node.comfyClass === NODE) {
      addPresets(node, { api, words: words(), create: (kind) => LiteGraph.createNode(kind) });
      addPanel(node);
    } else if (node.widgets?.some((widget) => widget.options?.advanced)) addMore(node);
    else return;
    foldAdvanced(node);
  },
  async afterConfigureGraph() {
    refresh();
    await recallQuietly();
  },
});
