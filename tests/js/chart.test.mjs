import assert from "node:assert/strict";
import { test } from "node:test";

import { MAX_POINTS, extent, hue, logTicks, nearest, path, scale, short, smooth, thin, ticks } from "../../js/maths.js";

const wave = (n) => Array.from({ length: n }, (_, i) => ({ x: i + 1, loss: Math.sin(i / 7) + 2 }));

test("the smoothed line starts at the first value and stays inside the values", () => {
  let mean = smooth(null, 0.8);
  assert.equal(mean.value, 0.8);
  for (let i = 0; i < 500; i++) mean = smooth(mean, i % 2 ? 0.2 : 0.4);
  assert.ok(Math.abs(mean.value - 0.3) < 0.01);
  const by_hand = (0.9 * 0.1 * 5 + 0.1 * 7) / (0.9 * 0.1 + 0.1);
  assert.ok(Math.abs(smooth(smooth(null, 5, 0.9), 7, 0.9).value - by_hand) < 1e-12);
});

test("thinning keeps the order, both ends, every extreme, and at most 2000 points", () => {
  for (const n of [3, 1999, 2000, 2001, 12345, 100000]) {
    const points = wave(n);
    points[Math.floor(n / 2)].loss = 99;
    const kept = thin(points);
    assert.ok(kept.length <= MAX_POINTS, `${n} gives ${kept.length}`);
    assert.equal(kept[0], points[0]);
    assert.equal(kept.at(-1), points.at(-1));
    assert.ok(kept.some((p) => p.loss === 99), "the spike is still there");
    assert.ok(kept.every((p, i) => i === 0 || p.x > kept[i - 1].x), "x rises");
  }
  assert.equal(thin(wave(10)).length, 10);
});

test("the extent ignores the wildest values and never collapses", () => {
  const values = [...Array(1000).fill(0.1), ...Array(1000).fill(0.2), 50, -50];
  const [low, high] = extent(values);
  assert.ok(low >= 0 && low < 0.1 && high > 0.2 && high < 0.3);
  for (const same of [0, 0.5, -3]) {
    const [a, b] = extent([same, same]);
    assert.ok(b > a, String(same));
  }
  assert.deepEqual(extent([]), [0, 1]);
  const [p, q] = extent([0, -1, 0.01, 0.1], true);
  assert.ok(p > 0.005 && p < 0.01 && q > 0.1, "a logarithmic axis leaves out what is not positive");
});

test("ticks are round, inside, and few", () => {
  assert.deepEqual(ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]);
  assert.deepEqual(ticks(0, 400, 4), [0, 100, 200, 300, 400]);
  assert.deepEqual(ticks(0.051, 0.119, 3), [0.06, 0.08, 0.1]);
  for (const [low, high] of [[0, 1e-5], [3, 3.0001], [-7, 12], [0, 1e9]]) {
    const found = ticks(low, high);
    assert.ok(found.length >= 2 && found.length <= 8, `${low}..${high}: ${found}`);
    assert.ok(found.every((v) => v >= low - 1e-9 && v <= high * (1 + 1e-9)));
  }
  assert.deepEqual(ticks(5, 5), [5]);
});

test("logarithmic ticks", () => {
  assert.deepEqual(logTicks(0.04, 0.3), [0.05, 0.1, 0.2]);
  assert.deepEqual(logTicks(0.0005, 20), [0.001, 0.01, 0.1, 1, 10]);
});

test("scales map ends to ends, straight or logarithmic", () => {
  const linear = scale(10, 20, 0, 100);
  assert.equal(linear(10), 0);
  assert.equal(linear(15), 50);
  const log = scale(0.01, 1, 100, 0, true);
  assert.equal(log(0.01), 100);
  assert.ok(Math.abs(log(0.1) - 50) < 1e-9);
  assert.ok(Number.isFinite(scale(3, 3, 0, 1)(3)));
});

test("the nearest point by step", () => {
  const points = [1, 5, 9, 20].map((x) => ({ x }));
  assert.deepEqual([-4, 2, 3.1, 7, 14, 15, 99].map((x) => nearest(points, x)), [0, 0, 1, 1, 2, 3, 3]);
  assert.equal(nearest([], 3), -1);
});

test("a path breaks where a value cannot be drawn", () => {
  const points = [{ x: 0, y: 1 }, { x: 1, y: 2 }, { x: 2, y: NaN }, { x: 3, y: 0 }, { x: 4, y: 5 }];
  const same = (v) => v;
  assert.equal(path(points, "y", same, same), "M0.0 1.0L1.0 2.0M3.0 0.0L4.0 5.0");
  assert.equal(path(points, "y", same, same, true), "M0.0 1.0L1.0 2.0M4.0 5.0");
});

test("short numbers", () => {
  assert.deepEqual([0.08431, 1e-4, 9.27e-5, 0, 12.345, 250000, NaN, 1].map(short), ["0.0843", "1e-4", "9.3e-5", "0", "12.3", "2.5e5", "-", "1"]);
});

test("many lines have colours of their own, the same ones every time", () => {
  const colours = Array.from({ length: 64 }, (_, n) => hue(n));
  assert.equal(new Set(colours).size, 64);
  assert.ok(colours.every((c) => /^hsl\(\d{1,3} 62% 56%\)$/.test(c)));
});
