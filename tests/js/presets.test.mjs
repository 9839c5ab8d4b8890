// Presets fill widgets in: those of Train LoRA, of Build Dataset before it, and of settings nodes beside it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { apply, before, fillIn, settingsChain, titleOf } from "../../js/presets.js";
import { strings } from "../../js/strings.js";

function node(graph, id, comfyClass, widgets, inputs = []) {
  const made = {
    id,
    comfyClass,
    graph,
    pos: [0, 0],
    widgets: widgets.map((name) => ({ name, value: 0 })),
    inputs: inputs.map((name) => ({ name, link: null })),
    outputs: [{}],
    connectSlots(output, target, input) {
      assert.ok(output);
      const link = graph.next++;
      graph.links[link] = { origin_id: id, target_id: target.id };
      input.link = link;
    },
  };
  graph.nodes[id] = made;
  return made;
}

function scene() {
  const graph = { nodes: {}, links: {}, next: 1, getNodeById: (id) => graph.nodes[id], add: (n) => (graph.nodes[n.id] = n) };
  const train = node(graph, 1, "LoraGraftTrainLoRA", ["network_dim", "conv_dim"], ["train_set", "settings"]);
  const data = node(graph, 2, "LoraGraftBuildDataset", ["keep_tokens"]);
  data.connectSlots(data.outputs[0], train, train.inputs[0]);
  const create = (kind) => node(graph, 10 + Object.keys(graph.nodes).length, kind, ["algo", "algo.conv_dim"], ["settings"]);
  return { graph, train, data, create };
}

const FOUND = { train: { network_dim: 6 }, dataset: { keep_tokens: 1 }, nodes: { LoraGraftNetwork: { algo: "loha", conv_dim: 3 } } };
const value = (n, name) => n.widgets.find((w) => w.name === name).value;

test("values go to the widgets where they stand", () => {
  const { train, data, create } = scene();
  assert.deepEqual(apply(train, FOUND, create), []);
  assert.equal(value(train, "network_dim"), 6);
  assert.equal(value(data, "keep_tokens"), 1);
  const [network] = settingsChain(train);
  assert.equal(network.comfyClass, "LoraGraftNetwork");
  assert.equal(value(network, "algo"), "loha");
  assert.equal(value(network, "algo.conv_dim"), 3);
  assert.equal(value(train, "conv_dim"), 0);
});

test("a settings node that stands there already is used", () => {
  const { train, graph, create } = scene();
  apply(train, FOUND, create);
  const count = Object.keys(graph.nodes).length;
  apply(train, { ...FOUND, nodes: { LoraGraftNetwork: { algo: "locon" } } }, create);
  assert.equal(Object.keys(graph.nodes).length, count);
  assert.equal(value(settingsChain(train)[0], "algo"), "locon");
});

test("a linked node's widget of the same name is filled in too, for it is the one that counts", () => {
  const { train, graph } = scene();
  const schedule = node(graph, 7, "LoraGraftSchedule", ["network_dim"], ["settings"]);
  schedule.connectSlots(schedule.outputs[0], train, train.inputs[1]);
  assert.deepEqual(apply(train, { train: { network_dim: 6 }, dataset: {}, nodes: {} }, null), []);
  assert.equal(value(schedule, "network_dim"), 6);
});

test("settings that a pasted config overrides are told", () => {
  const { train, graph } = scene();
  const pasted = node(graph, 7, "LoraGraftKohyaConfig", ["config"], ["settings"]);
  pasted.connectSlots(pasted.outputs[0], train, train.inputs[1]);
  assert.deepEqual(apply(train, { train: { network_dim: 6 }, dataset: {}, nodes: {} }, null), ["network_dim"]);
});

test("what has no widget is told", () => {
  const { train, graph, create } = scene();
  graph.links = {};
  assert.deepEqual(apply(train, { train: { nothing: 1 }, dataset: { keep_tokens: 1 }, nodes: {} }, create), ["nothing", "keep_tokens"]);
});

test("a widget's own callback hears of it, a choice before what it shows", () => {
  const heard = [];
  const widgets = [{ name: "algo", callback: (v) => heard.push(v) && widgets.push({ name: "algo.factor", value: 0 }) }];
  assert.deepEqual(fillIn({ widgets }, { algo: "lokr", factor: 8 }), []);
  assert.deepEqual([heard, widgets[1].value], [["lokr"], 8]);
});

test("a row that runs in a circle ends", () => {
  const { train, graph } = scene();
  const one = node(graph, 5, "LoraGraftLoss", [], ["settings"]);
  one.connectSlots(one.outputs[0], train, train.inputs[1]);
  one.connectSlots(one.outputs[0], one, one.inputs[0]);
  assert.equal(settingsChain(train).length, 1);
  assert.equal(before(one, "nothing"), undefined);
});

test("presets are called by words of the page's language, and a new one as the server says", () => {
  assert.equal(titleOf(strings("ru"), "style", "Style"), "Стиль");
  assert.equal(titleOf(strings("zh"), "8gb", "8 GB"), "8 GB");
});
