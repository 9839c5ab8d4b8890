// The pictures on settings nodes: how widgets are read and lines are laid out.

import assert from "node:assert/strict";
import { test } from "node:test";

import { besideOf, linePath, stepsOf, valuesOf } from "../../js/ahead.js";

test("a line runs from left to right between zero and its largest value", () => {
  assert.equal(linePath([0, 1, 0.5], 10, 100), "M0.0 100.0L5.0 0.0L10.0 50.0");
  assert.equal(linePath([0, 0], 10, 100), "M0.0 100.0L10.0 100.0");
  assert.equal(linePath([], 10, 100), "");
});

test("widgets are read by name, without buttons and pictures", () => {
  const widgets = [
    { name: "lr_scheduler", value: "cosine" },
    { name: "lr_scheduler.lr_scheduler_power", value: 2 },
    { name: "loragraft_ahead", value: "", serialize: false },
  ];
  assert.deepEqual(valuesOf({ widgets }), { lr_scheduler: "cosine", "lr_scheduler.lr_scheduler_power": 2 });
  assert.deepEqual(valuesOf({}), {});
});

function chain(count, steps) {
  const graph = { links: {}, nodes: [], getNodeById: (id) => graph.nodes[id] };
  for (let id = 0; id < count; id++) {
    graph.nodes.push({ graph, outputs: [{ links: id + 1 < count ? [id] : [] }], widgets: [] });
    graph.links[id] = { target_id: id + 1 };
  }
  if (steps) graph.nodes[count - 1].widgets.push({ name: "max_train_steps", value: steps });
  return graph;
}

test("the steps are those of the Train LoRA at the end of a row", () => {
  assert.equal(stepsOf(chain(3, 250).nodes[0]), 250);
  assert.equal(stepsOf(chain(1).nodes[0]), 1000);
});

test("a row that runs in a circle ends", () => {
  const graph = chain(2);
  graph.nodes[1].outputs[0].links = [7];
  graph.links[7] = { target_id: 0 };
  assert.equal(stepsOf(graph.nodes[0]), 1000);
});

test("the rates are those of Train LoRA, and of a settings node where one says otherwise", () => {
  const graph = chain(2, 250);
  const [schedule, train] = graph.nodes;
  train.widgets.push({ name: "learning_rate", value: 3e-4 }, { name: "output_name", value: "x" });
  assert.deepEqual(besideOf(schedule), { learning_rate: 3e-4 });
  train.inputs = [{ name: "settings", link: 5 }];
  graph.links[5] = { origin_id: 2 };
  graph.nodes.push({ graph, widgets: [{ name: "learning_rate", value: 1 }, { name: "optimizer_type", value: "Prodigy" }] });
  assert.deepEqual(besideOf(schedule), { learning_rate: 1, optimizer_type: "Prodigy" });
  assert.deepEqual(besideOf(chain(1).nodes[0]), {});
});
