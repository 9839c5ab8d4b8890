// A small line chart: the maths as pure functions, and one SVG that draws them.
// Nothing here knows ComfyUI, and importing this file touches no page, so Node can test it.

export const MAX_POINTS = 2000;

/** Bias-corrected exponential mean; returns the new {sum, weight, value}. */
export function smooth(state, value, beta = 0.96) {
  const sum = beta * (state?.sum ?? 0) + (1 - beta) * value;
  const weight = beta * (state?.weight ?? 0) + (1 - beta);
  return { sum, weight, value: sum / weight };
}

/** Keep at most `limit` points: both ends, and the lowest and highest `key` of every bin between. */
export function thin(points, limit = MAX_POINTS, key = "loss") {
  if (points.length <= limit) return points;
  const bins = Math.max(1, Math.floor((limit - 2) / 2));
  const inner = points.length - 2;
  const kept = [points[0]];
  for (let bin = 0; bin < bins; bin++) {
    const from = 1 + Math.floor((bin * inner) / bins);
    const to = 1 + Math.floor(((bin + 1) * inner) / bins);
    let low = from;
    let high = from;
    for (let i = from + 1; i < to; i++) {
      if (points[i][key] < points[low][key]) low = i;
      if (points[i][key] > points[high][key]) high = i;
    }
    kept.push(points[Math.min(low, high)]);
    if (low !== high) kept.push(points[Math.max(low, high)]);
  }
  kept.push(points[points.length - 1]);
  return kept;
}

/** Return [low, high] that holds all but the wildest 1 % of the values, with some air around it. */
export function extent(values, log = false) {
  const sorted = values.filter((v) => Number.isFinite(v) && (!log || v > 0)).sort((a, b) => a - b);
  if (!sorted.length) return log ? [0.01, 1] : [0, 1];
  const cut = Math.floor(sorted.length * 0.005);
  const low = sorted[cut];
  const high = sorted[sorted.length - 1 - cut];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
  const air = high === low ? Math.abs(high) * 0.5 || 0.5 : (high - low) * 0.08;
  return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
}

/** Round tick values (1, 2 or 5 times a power of ten) inside [low, high]. */
export function ticks(low, high, count = 4) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.7);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.min(last - first + 1, 50) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Ticks for a logarithmic axis: 1, 2, 5 of each decade, thinned to whole decades when there are many. */
export function logTicks(low, high) {
  const all = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)) && all.length < 99; e++) {
    for (const m of [1, 2, 5]) all.push(Number((m * 10 ** e).toPrecision(6)));
  }
  const inside = all.filter((v) => v >= low && v <= high);
  return inside.length <= 5 ? inside : inside.filter((v) => Number.isInteger(Number(Math.log10(v).toFixed(6))));
}

/** Return a function from [low, high] to [from, to]. */
export function scale(low, high, from, to, log = false) {
  const at = log ? Math.log10 : (v) => v;
  const span = at(high) - at(low) || 1;
  return (v) => from + ((at(v) - at(low)) / span) * (to - from);
}

/** Index of the point whose x is nearest; points are in order of x. -1 for none. */
export function nearest(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (points[mid].x < x) low = mid + 1;
    else high = mid;
  }
  return low > 0 && x - points[low - 1].x <= points[low].x - x ? low - 1 : points.length ? low : -1;
}

/** SVG path through the points; a value that cannot be drawn breaks the line. */
export function path(points, key, sx, sy, log = false) {
  let pen = "M";
  let d = "";
  for (const point of points) {
    const v = point[key];
    if (!Number.isFinite(v) || (log && v <= 0)) {
      pen = "M";
      continue;
    }
    d += `${pen}${sx(point.x).toFixed(1)} ${sy(v).toFixed(1)}`;
    pen = "L";
  }
  return d;
}

/** Three significant digits, exponents only for the very small and the very large: 0.0843, 9.3e-5. */
export function short(value) {
  if (!Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return Number(value.toPrecision(2)).toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

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
 * draw({points: [{x, loss, smooth, lr}], saves: [x], last: x}) shows data; `onHover` gets a point or null.
 */
export function createChart(host, onHover = () => {}) {
  const svg = add(host, "svg", { class: "loragraft-chart", role: "img" });
  let data = { points: [], saves: [], last: 1 };
  let log = false;
  let hovered = null;
  let view = null;

  function render() {
    const [width, height] = [host.clientWidth, host.clientHeight];
    svg.replaceChildren();
    if (width < 60 || height < 40) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const points = thin(data.points);
    const hasRate = points.some((p) => p.lr > 0);
    const [left, right, top, bottom] = [38, hasRate ? width - 38 : width - 8, 8, height - 18];
    const [low, high] = extent(points.map((p) => p.loss), log);
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
    add(plot, "path", { class: "raw", d: path(points, "loss", sx, sy, log) });
    add(plot, "path", { class: "smooth", d: path(points, "smooth", sx, sy, log) });
    view = { points, sx, sy, left, right, top, bottom, cursor: add(svg, "g", { class: "cursor" }) };
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
      if (!log || found.smooth > 0) add(view.cursor, "circle", { cx: at, cy: view.sy(found.smooth), r: 3 });
    }
    onHover(found ?? null);
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
    draw: (next) => ((data = next), render()),
    setLog: (on) => ((log = on), render()),
    dispose: () => observer.disconnect(),
  };
}
