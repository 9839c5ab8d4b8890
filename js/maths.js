// The maths of a line chart: pure functions on plain values, so Node can test them.

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

/** Colour of the n-th of many lines: neighbours are far apart on the colour wheel. */
export const hue = (n) => `hsl(${Math.round(208 + n * 137.508) % 360} 62% 56%)`;
