// A small line chart: one SVG that draws one run's loss, or a line for each of several runs.
// Nothing here knows ComfyUI, and importing this file touches no page.

import { extent, hue, logTicks, nearest, path, scale, short, thin, ticks } from "./maths.js";

const NS = "http://www.w3.org/2000/svg";

function add(parent, tag, attributes = {}, text = "") {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

/**
 * Make a chart that fills `host`. Colours come from the style sheet by class name.
 * draw({points: [{x, loss, smooth, lr}], saves: [x], validations: [{x, loss}], best: x, last: x}) shows data; `onHover` gets a point or null.
 * With `many`, a list of such points, each run has a smoothed line of its own colour; `onHover` then gets {x}.
 */
export function createChart(host, onHover = () => {}) {
  const svg = add(host, "svg", { class: "loragraft-chart", role: "img" });
  let data = { points: [], many: [], saves: [], validations: [], last: 1 };
  let log = false;
  let hovered = null;
  let view = null;

  function render() {
    const [width, height] = [host.clientWidth, host.clientHeight];
    svg.replaceChildren();
    if (width < 60 || height < 40) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const many = data.many.map((points) => thin(points, Math.max(60, Math.floor(4000 / data.many.length))));
    const points = many.length ? many.flat().sort((a, b) => a.x - b.x) : thin(data.points);
    const hasRate = many.length === 0 && points.some((p) => p.lr > 0);
    const [left, right, top, bottom] = [38, hasRate ? width - 38 : width - 8, 8, height - 18];
    const kept = many.length ? [] : data.validations;
    const [low, high] = extent([...points, ...kept].map((p) => (many.length ? p.smooth : p.loss)), log);
    const first = points.length ? Math.min(points[0].x, data.last) : 0;
    const sx = scale(first, Math.max(data.last, first + 1), left, right);
    const sy = scale(low, high, bottom, top, log);
    for (const v of log ? logTicks(low, high) : ticks(low, high, height > 130 ? 4 : 3)) {
      add(svg, "line", { class: "grid", x1: left, x2: right, y1: sy(v), y2: sy(v) });
      add(svg, "text", { class: "tick", x: left - 5, y: sy(v) + 3, "text-anchor": "end" }, short(v));
    }
    for (const v of ticks(first, Math.max(data.last, first + 1), Math.max(2, Math.floor(width / 90))).filter(Number.isInteger)) {
      add(svg, "text", { class: "tick", x: sx(v), y: height - 4, "text-anchor": "middle" }, String(v));
    }
    const clip = `loragraft-clip-${(createChart.count = (createChart.count ?? 0) + 1)}`;
    add(add(svg, "clipPath", { id: clip }), "rect", { x: left, y: top - 2, width: right - left + 1, height: bottom - top + 3 });
    const plot = add(svg, "g", { "clip-path": `url(#${clip})` });
    for (const x of data.saves) add(plot, "line", { class: "save", x1: sx(x), x2: sx(x), y1: top, y2: bottom });
    if (hasRate) {
      const peak = Math.max(...points.map((p) => p.lr || 0));
      const sr = scale(0, peak * 1.05, bottom, top);
      add(plot, "path", { class: "rate", d: path(points, "lr", sx, sr) });
      for (const v of [0, peak]) add(svg, "text", { class: "tick rate-tick", x: right + 5, y: sr(v) + 3 }, v ? short(v) : "0");
    }
    many.forEach((own, n) => add(plot, "path", { class: "run", stroke: hue(n), d: path(own, "smooth", sx, sy, log) }));
    if (!many.length) {
      add(plot, "path", { class: "raw", d: path(points, "loss", sx, sy, log) });
      add(plot, "path", { class: "smooth", d: path(points, "smooth", sx, sy, log) });
      add(plot, "path", { class: "validation", d: path(kept, "loss", sx, sy, log) });
      for (const v of kept.filter((v) => !log || v.loss > 0)) {
        add(plot, "circle", { class: v.x === data.best ? "validation best" : "validation", cx: sx(v.x), cy: sy(v.loss), r: v.x === data.best ? 4 : 2 });
      }
    }
    view = { points, many: many.length > 0, sx, sy, left, right, top, bottom, cursor: add(svg, "g", { class: "cursor" }) };
    point(hovered);
  }

  function point(x) {
    hovered = x;
    if (!view) return;
    view.cursor.replaceChildren();
    const found = x === null ? undefined : view.points[nearest(view.points, x)];
    if (found) {
      const at = view.sx(found.x);
      add(view.cursor, "line", { x1: at, x2: at, y1: view.top, y2: view.bottom });
      if (!view.many && (!log || found.smooth > 0)) add(view.cursor, "circle", { cx: at, cy: view.sy(found.smooth), r: 3 });
    }
    onHover(found && view.many ? { x: found.x } : (found ?? null));
  }

  host.addEventListener("pointermove", (event) => {
    const box = host.getBoundingClientRect(); // scaled by the canvas zoom, unlike clientWidth
    const local = ((event.clientX - box.left) / (box.width || 1)) * host.clientWidth;
    if (view) point(view.points[0]?.x + ((local - view.sx(view.points[0]?.x)) / (view.sx(1) - view.sx(0))));
  });
  host.addEventListener("pointerleave", () => point(null));
  const observer = new ResizeObserver(() => render());
  observer.observe(host);

  return {
    draw: (next) => ((data = { many: [], validations: [], ...next }), render()),
    setLog: (on) => ((log = on), render()),
    dispose: () => observer.disconnect(),
  };
}
