// The row of presets on Train LoRA: what to learn, with which network, on which base, for how much memory. Choosing fills
// widgets in, where everybody sees them; nothing else happens, and every value can be changed afterwards.

const ROUTE = "/loragraft/ahead";
const PARTS = ["kind", "network", "base", "memory"];
const TRAIN = "LoraGraftTrainLoRA";
const PASTED = "LoraGraftKohyaConfig"; // its settings stand in a text, where no widget can be filled in

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name || widget.name.endsWith(`.${name}`));

/** Set widgets by name, a choice first: what it shows exists only afterwards. Returns the names that were not found. */
export function fillIn(node, values) {
  const missing = [];
  for (const [name, value] of Object.entries(values)) {
    const widget = widgetOf(node, name);
    if (!widget) {
      missing.push(name);
      continue;
    }
    widget.value = value;
    widget.callback?.(value);
  }
  node.setDirtyCanvas?.(true, true);
  return missing;
}

const linkOf = (node, link) => node.graph?.getLink?.(link) ?? node.graph?.links?.[link];

/** The node that is linked to an input, or undefined. */
export function before(node, input) {
  const link = linkOf(node, node.inputs?.find((slot) => slot.name === input)?.link);
  return link ? node.graph.getNodeById(link.origin_id) : undefined;
}

/** The settings nodes that lead to a node, the nearest first. */
export function settingsChain(node) {
  const found = [];
  for (let at = before(node, "settings"); at && !found.includes(at); at = before(at, "settings")) found.push(at);
  return found;
}

/** Fill in what the server says: Train LoRA, the Build Dataset before it, and settings nodes, which are added where missing. */
export function apply(node, found, create) {
  const missing = fillIn(node, found.train);
  for (const other of settingsChain(node)) {
    fillIn(other, found.train); // what is linked counts, and not the widget of Train LoRA
    if (other.comfyClass === PASTED) missing.push(...Object.keys(found.train));
  }
  const data = before(node, "train_set");
  if (data?.comfyClass === "LoraGraftBuildDataset") missing.push(...fillIn(data, found.dataset));
  else missing.push(...Object.keys(found.dataset));
  for (const [kind, values] of Object.entries(found.nodes)) {
    const chain = settingsChain(node);
    let beside = chain.find((other) => other.comfyClass === kind);
    if (!beside) {
      beside = create(kind);
      const last = chain.at(-1) ?? node;
      beside.pos = [node.pos[0] - 420, node.pos[1] + 220 * chain.length];
      node.graph.add(beside);
      beside.connectSlots(beside.outputs[0], last, last.inputs.find((slot) => slot.name === "settings"));
    }
    missing.push(...fillIn(beside, values));
  }
  return missing;
}

const HEIGHT = 76; // two rows of controls and a line of text; what is spare belongs to the panel below

/** What a preset is called: in the page's language, or as the server says where that has no word for it. */
export const titleOf = (words, name, title) => words[`preset_${name}`] ?? title;

function select(words, part, options) {
  const element = document.createElement("select");
  element.title = words[`preset_${part}`];
  element.append(new Option(words[`preset_${part}`], ""));
  for (const [name, title] of Object.entries(options)) element.append(new Option(titleOf(words, name, title), name));
  return element;
}

/** Put the row on a Train LoRA node. */
export function addPresets(node, { api, words, create }) {
  if (node.comfyClass !== TRAIN) return;
  const row = document.createElement("div");
  row.className = "loragraft-presets";
  const widget = node.addDOMWidget("loragraft_presets", "loragraft_presets", row, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false;
  const note = document.createElement("div");
  note.className = "loragraft-presets-note";

  async function ask(names) {
    const reply = await api.fetchApi(`${ROUTE}?${new URLSearchParams({ ask: JSON.stringify({ presets: names }) })}`);
    return reply.json();
  }

  async function build() {
    const { parts } = await ask([]);
    const selects = PARTS.map((part) => select(words, part, parts?.[part] ?? {}));
    const button = document.createElement("button");
    button.textContent = words.preset_fill;
    button.addEventListener("click", async () => {
      const names = selects.map((element) => element.value).filter(Boolean);
      if (!names.length) return;
      const found = await ask(names);
      const missing = found.error ? [] : apply(node, found, create);
      note.textContent = found.error ?? (missing.length ? `${words.preset_not_set} ${missing.join(", ")}` : words.preset_set);
      note.title = Object.entries(found.sources ?? {}).map(([name, source]) => `${name}: ${source}`).join("\n");
    });
    row.replaceChildren(...selects, button, note);
  }

  build().catch((error) => {
    note.textContent = String(error);
    row.replaceChildren(note);
  });
}
