// Nested widgets have no tooltip of their own, so that ComfyUI looks for the translated one.

import assert from "node:assert/strict";
import { test } from "node:test";

import { translateNested } from "../../js/nested.js";

test("nested widgets lose their tooltip, those there and those to come; others keep it", () => {
  const node = {
    widgets: [{ name: "algo", tooltip: "kind" }, { name: "algo.conv_dim", tooltip: "rank" }],
    addCustomWidget(widget) {
      this.widgets.push(widget);
      return widget;
    },
  };
  translateNested(node);
  node.addCustomWidget({ name: "algo.factor" }).tooltip = "side";
  node.addCustomWidget({ name: "preset" }).tooltip = "modules";
  assert.deepEqual(node.widgets.map((w) => w.tooltip), ["kind", undefined, undefined, "modules"]);
});
