// What the browser tests ask ComfyUI's page; evaluated in it, gives window.probe.
(() => {
  const { app } = window.comfyAPI.app;
  const { api } = window.comfyAPI.api;
  const node = (id) => (app.canvas.graph ?? app.rootGraph).getNodeById(id);
  const panel = (id) => node(id)?.widgets?.find((w) => w.name === "loragraft_panel")?.element;
  const frames = async (n) => {
    for (let i = 0; i < n; i++) await new Promise(requestAnimationFrame);
  };

  window.probe = {
    app,
    api,
    node,
    panel,
    /** The page is there, and so is the workflow that it opens by itself. */
    ready: () =>
      Boolean(app.isGraphReady && app.extensionManager?.workflow?.activeWorkflow && !app.extensionManager.spinner),
    find: (type) => app.rootGraph.nodes.filter((n) => n.type === type).map((n) => n.id),
    phase: (id) => panel(id)?.dataset.phase,
    text: (id) => panel(id)?.innerText,
    part: (id, name) => panel(id)?.querySelector(`.loragraft-${name}`)?.textContent,
    points: (id) => (panel(id)?.querySelector("path.raw")?.getAttribute("d").match(/[ML]/g) ?? []).length,
    lines: (id) => panel(id)?.querySelectorAll("path.run").length,
    lanes: (id) =>
      [...(panel(id)?.querySelectorAll(".loragraft-lane") ?? [])].map((row) => ({
        phase: row.dataset.phase,
        colour: row.children[0].style.background,
        label: row.children[1].textContent,
        loss: row.children[2].textContent,
        state: row.children[3].textContent,
      })),
    saves: (id) => panel(id)?.querySelectorAll("line.save").length,
    samples: (id) =>
      [...(panel(id)?.querySelectorAll(".loragraft-image") ?? [])].filter((i) => i.complete && i.naturalWidth).length,
    /** Open a new workflow with one node of each type in a row; gives their ids. */
    async build(types) {
      const graph = app.rootGraph;
      graph.clear();
      let x = 0;
      for (const type of types) {
        const made = LiteGraph.createNode(type);
        made.pos = [x, 0];
        graph.add(made);
        x += made.size[0] + 60;
      }
      await app.loadGraphData({ ...graph.serialize(), id: crypto.randomUUID() }, true, true, null);
      return app.rootGraph.nodes.map((n) => n.id);
    },
    count: (selector) => document.querySelectorAll(selector).length,
    attribute: (selector, name) => document.querySelector(selector)?.getAttribute(name),
    texts: (selector) => [...document.querySelectorAll(selector)].map((element) => element.textContent),
    choose(selector, index, value) {
      document.querySelectorAll(selector)[index].value = value;
    },
    click: (selector) => document.querySelector(selector).click(),
    value: (id, name) => node(id)?.widgets?.find((w) => w.name === name)?.value,
    setValue(id, name, value) {
      node(id).widgets.find((w) => w.name === name).value = value;
    },
    names: (id) => node(id).widgets.map((w) => w.name),
    labels: (id) => node(id).widgets.map((w) => [w.name, w.label]),
    /** Move the n-th node into a subgraph; gives the execution ids of the subgraph node and of the node in it. */
    wrap(n) {
      const { node: outer } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.nodes[n]]));
      return [outer.id, outer.subgraph.nodes[0].id];
    },
    enter: (id) => app.canvas.setGraph(app.rootGraph.getNodeById(id).subgraph),
    fail: (id, message) => api.dispatchCustomEvent("execution_error", { node_id: id, exception_message: message }),
    /** Send very many steps; gives the milliseconds until the panel has drawn them. */
    async flood(id, count) {
      const begun = performance.now();
      for (let first = 1; first <= count; first += 500) {
        const steps = Array.from({ length: 500 }, (_, i) => ({ step: first + i, total: count, loss: Math.random(), lr: 1e-4 }));
        api.dispatchCustomEvent("loragraft.train", { node: id, kind: "step", steps });
        if (first % 10000 === 1) await frames(1);
      }
      await frames(2);
      return performance.now() - begun;
    },
    /** Send the steps of many runs side by side; gives the milliseconds until the panel has drawn them. */
    async floodMany(id, count, steps) {
      const begun = performance.now();
      const runs = Array.from({ length: count }, (_, run) => ({ name: `run${run}`, label: `seed ${run}` }));
      api.dispatchCustomEvent("loragraft.train", { node: id, kind: "sweep", runs });
      for (let step = 1; step <= steps; step++) {
        const taken = runs.map((_, run) => ({ run, step, total: steps, loss: Math.random(), lr: 1e-4 }));
        api.dispatchCustomEvent("loragraft.train", { node: id, kind: "step", steps: taken, pace: 0.1, left: 1 });
        if (step % 20 === 0) await frames(1);
      }
      await frames(2);
      return performance.now() - begun;
    },
    /** Write a text into every text widget and title. */
    fillText(text) {
      for (const each of app.rootGraph.nodes) {
        each.title = text;
        for (const w of each.widgets ?? []) if (typeof w.value === "string" && !w.options?.values && w.name !== "loragraft_panel") w.value = text;
      }
    },
    /** Draw the graph at a scale with its corner at (left, top); gives the rectangle it takes, in the page's pixels. */
    async place(scale, left, top) {
      await frames(3);
      const { ds } = app.canvas;
      const areas = [...app.rootGraph.nodes.map((n) => n.getBounding()), ...app.rootGraph.groups.map((g) => g._bounding)];
      const x = Math.min(...areas.map((a) => a[0]));
      const y = Math.min(...areas.map((a) => a[1]));
      const width = Math.max(...areas.map((a) => a[0] + a[2])) - x;
      const height = Math.max(...areas.map((a) => a[1] + a[3])) - y;
      const box = app.canvas.canvas.getBoundingClientRect();
      ds.scale = scale;
      ds.offset[0] = (left - box.left) / scale - x;
      ds.offset[1] = (top - box.top) / scale - y;
      app.canvas.deselectAll();
      app.canvas.setDirty(true, true);
      await frames(5);
      return { x: left, y: top, width: width * scale, height: height * scale };
    },
    /** Set widgets by name. */
    put(id, values) {
      for (const [name, value] of Object.entries(values)) {
        const widget = node(id).widgets.find((w) => w.name === name);
        if (!widget) throw new Error(`no widget ${name}`);
        widget.value = value;
      }
    },
    /** The training is past its middle, and the panel has drawn it. */
    halfway: (id) => {
      const [done, total] = (panel(id)?.querySelector(".loragraft-count")?.textContent.match(/(\d+) \/ (\d+)/) ?? []).slice(1).map(Number);
      return panel(id)?.dataset.phase === "training" && done > total * 0.6;
    },
    /** The node shows its output images, and every image of the page is loaded. */
    showsImages: (id) =>
      (LiteGraph.vueNodesMode
        ? Boolean(document.querySelector(`[data-node-id="${id}"] img`))
        : Boolean(node(id).imgs?.length && node(id).imgs.every((i) => i.complete))) &&
      [...document.images].every((i) => i.complete),
    hasImages: (id) => Boolean(app.nodeOutputs[id]?.images?.length),
    /** Nothing is queued and nothing runs. */
    idle: async () => {
      const queue = await (await api.fetchApi("/queue")).json();
      return queue.queue_running.length + queue.queue_pending.length === 0;
    },
    unknown: () =>
      app.rootGraph.nodes.filter((n) => !n.constructor?.nodeData && !n.isVirtualNode).map((n) => n.type),
    refused: () => Boolean(app.lastNodeErrors && Object.keys(app.lastNodeErrors).length),
    /** Pretend that the server sent a message. */
    send: (detail) => api.dispatchCustomEvent("loragraft.train", detail),
    /** Bring all nodes into view, centred. */
    async frame(margin) {
      await frames(3);
      const { canvas, ds } = app.canvas;
      const boxes = app.canvas.graph.nodes.map((n) => n.getBounding());
      const left = Math.min(...boxes.map((b) => b[0]));
      const top = Math.min(...boxes.map((b) => b[1]));
      const right = Math.max(...boxes.map((b) => b[0] + b[2]));
      const bottom = Math.max(...boxes.map((b) => b[1] + b[3]));
      const [width, height] = [canvas.clientWidth, canvas.clientHeight];
      ds.scale = Math.min(1, (width - 2 * margin) / (right - left), (height - 2 * margin) / (bottom - top));
      ds.offset[0] = (width / ds.scale - right - left) / 2;
      ds.offset[1] = (height / ds.scale - bottom - top) / 2;
      app.canvas.setDirty(true, true);
      await frames(3);
    },
  };
})();
