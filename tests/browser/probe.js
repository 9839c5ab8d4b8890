// What the browser tests ask ComfyUI's page; evaluated in it, gives window.probe.
(() => {
  const { app } = window.comfyAPI.app;
  const { api } = window.comfyAPI.api;
  const node = (id) => app.rootGraph.getNodeById(id);
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
    saves: (id) => panel(id)?.querySelectorAll("line.save").length,
    samples: (id) =>
      [...(panel(id)?.querySelectorAll(".loragraft-image") ?? [])].filter((i) => i.complete && i.naturalWidth).length,
    /** Pretend that the server sent a message. */
    send: (detail) => api.dispatchCustomEvent("loragraft.train", detail),
    /** Bring all nodes into view, centred. */
    async frame(margin) {
      await frames(3);
      const { canvas, ds } = app.canvas;
      const boxes = app.rootGraph.nodes.map((n) => n.getBounding());
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
