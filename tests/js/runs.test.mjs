import assert from "node:assert/strict";
import { test } from "node:test";

import { apply, begin, clock, end, finish, newRun, pack, progress, timing, unpack } from "../../js/runs.js";
import { LOCALES, strings } from "../../js/strings.js";

const steps = (from, to, loss = (i) => 1 / i) =>
  Array.from({ length: to - from + 1 }, (_, i) => ({ step: from + i, total: 40, epoch: 1, loss: loss(from + i), lr: 1e-4, seconds: 0.5 }));

const stepsOf = (run) => run.saves.map((save) => save.step);

test("a run from plan to product", () => {
  const run = newRun();
  apply(run, { kind: "plan", total_steps: 40, first_step: 1, lines: ["12 images x 4 repeats"] });
  assert.equal(run.phase, "preparing");
  apply(run, { kind: "cache", what: "images", done: 3, total: 12 });
  assert.equal(run.phase, "encoding");
  assert.equal(progress(run), 0.25);
  apply(run, { kind: "step", ...steps(1, 1)[0] });
  apply(run, { kind: "step", steps: steps(2, 20) });
  assert.equal(run.phase, "training");
  assert.deepEqual([run.points.length, run.step, run.total, progress(run)], [20, 20, 40, 0.5]);
  assert.equal(clock(timing(run).left), "0:10");
  apply(run, { kind: "save", step: 20, zero_tensors: 0, num_tensors: 10 });
  apply(run, { kind: "sample", step: 20, prompt: "a cat", filename: "x.png", subfolder: "s", type: "temp" });
  apply(run, { kind: "note", text: "hello" });
  apply(run, { kind: "step", steps: steps(21, 40) });
  apply(run, { kind: "done", file: "loras/a.safetensors", losses: [[1, 1], [40, 0.1]], saves: [20, 40], trigger: "sks" });
  assert.deepEqual([run.phase, run.points.length, stepsOf(run), run.samples.length, run.trigger], ["done", 40, [20, 40], 1, "sks"]);
  assert.equal(progress(run), 1);
});

test("resuming keeps the line up to the checkpoint and replaces what is trained again", () => {
  const run = newRun();
  apply(run, { kind: "step", steps: steps(1, 30) });
  end(run, "stopped");
  apply(run, { kind: "plan", total_steps: 40, first_step: 21, lines: [] });
  apply(run, { kind: "step", steps: steps(21, 40, () => 7) });
  assert.deepEqual(run.points.map((p) => p.x), Array.from({ length: 40 }, (_, i) => i + 1));
  assert.equal(run.points[20].loss, 7);
  apply(run, { kind: "plan", total_steps: 40, first_step: 1, lines: [] });
  assert.equal(run.points.length, 0);
});

test("the last output alone restores a finished run, whatever form its losses have", () => {
  const pairs = finish(newRun(), { file: "a", losses: [[10, 3], [20, 2]], saves: [{ step: 20 }], trigger: "t", step: 20, total_steps: 20 });
  assert.deepEqual(pairs.points.map((p) => [p.x, p.loss]), [[10, 3], [20, 2]]);
  assert.deepEqual([stepsOf(pairs), pairs.step, pairs.phase], [[20], 20, "done"]);
  const bare = finish(newRun(), { file: "a", losses: [4, 3, 2, 1], saves: [] });
  assert.deepEqual(bare.points.map((p) => p.x), [1, 2, 3, 4]);
  const spread = finish(newRun(), { file: "a", losses: [4, 3, 2, 1], total_steps: 40, lrs: [1, 2, 3, 4] });
  assert.deepEqual(spread.points.map((p) => [p.x, p.lr]), [[10, 1], [20, 2], [30, 3], [40, 4]]);
});

test("another finished run returned at once replaces the one shown; the same payload twice changes nothing", () => {
  const run = newRun();
  apply(run, { kind: "plan", total_steps: 40, first_step: 1 });
  apply(run, { kind: "step", steps: steps(1, 40) });
  const payload = { file: "a.safetensors", losses: [[40, 1]], saves: [40] };
  finish(run, payload);
  finish(run, payload);
  assert.equal(run.points.length, 40);
  finish(run, { file: "b.safetensors", losses: [[1, 9], [2, 8]], saves: [2], reused: true });
  assert.deepEqual([run.points.length, stepsOf(run), run.reused], [2, [2], true]);
});

const RUNS = [1, 2, 3].map((seed) => ({ name: `cat_seed${seed}`, label: `seed ${seed}` }));
const laneSteps = (run, from, to, total = 10) => steps(from, to).map((step) => ({ ...step, total, run }));

test("a sweep's runs have a line each, and their steps add up", () => {
  const run = apply(newRun(), { kind: "sweep", runs: RUNS });
  assert.deepEqual([run.phase, run.many.map((lane) => lane.label)], ["preparing", ["seed 1", "seed 2", "seed 3"]]);
  for (const i of [0, 1, 2]) apply(run, { kind: "plan", run: i, total_steps: 10, first_step: 0, lines: ["4 images"] });
  apply(run, { kind: "cache", run: 0, what: "images", done: 1, total: 4 });
  assert.equal(run.phase, "encoding");
  apply(run, { kind: "step", steps: [...laneSteps(0, 1, 4), ...laneSteps(1, 1, 3), ...laneSteps(2, 1, 3)], pace: 0.5, left: 10 });
  assert.deepEqual([run.phase, run.step, run.total, progress(run)], ["training", 10, 30, 1 / 3]);
  assert.deepEqual(run.many.map((lane) => lane.points.length), [4, 3, 3]);
  assert.deepEqual([timing(run), run.points.length], [{ pace: 0.5, left: 10 }, 0]);
  apply(run, { kind: "sample", run: 1, step: 3, prompt: "a", filename: "x.png", type: "temp" });
  assert.equal(run.samples[0].label, "seed 2");
  apply(run, { kind: "save", run: 1, step: 3, zero_tensors: 2, num_tensors: 4 });
  assert.deepEqual([run.saves, run.many[1].saves], [[], [{ step: 3, zero: 2, total: 4 }]]);
  apply(run, { kind: "failed", run: 1, error: "LG-RUN-004  no number" });
  assert.deepEqual([run.many[1].phase, run.many[1].error, run.total], ["failed", "LG-RUN-004  no number", 23]);
  apply(run, { kind: "finished", run: 0, file: "cat_seed1.safetensors", step: 10 });
  assert.deepEqual([run.many[0].phase, run.many[0].step, run.phase], ["done", 10, "training"]);
});

test("a sweep that continues keeps its lines up to the checkpoint; another one begins with none", () => {
  const run = apply(newRun(), { kind: "sweep", runs: RUNS });
  apply(run, { kind: "step", steps: [...laneSteps(0, 1, 6), ...laneSteps(1, 1, 6)] });
  end(run, "stopped");
  apply(run, { kind: "sweep", runs: [RUNS[1], { name: "new", label: "seed 9" }] });
  assert.deepEqual(run.many.map((lane) => lane.points.length), [6, 0]);
  apply(run, { kind: "plan", run: 0, total_steps: 10, first_step: 4 });
  assert.deepEqual([run.many[0].points.length, run.many[0].step, run.step], [4, 4, 4]);
  apply(run, { kind: "plan", total_steps: 5, first_step: 0 });
  assert.deepEqual([run.many, run.total], [[], 5], "a single run again");
});

const ENDED = {
  file: "cat_seed1.safetensors\ncat_seed3.safetensors", trigger: "cat", step: 12, total_steps: 15, losses: [], saves: [],
  runs: [
    { ...RUNS[0], file: "cat_seed1.safetensors", step: 5, total_steps: 5, losses: [[1, 3], [5, 2]] },
    { ...RUNS[1], file: "", error: "LG-RUN-004  no number", step: 2, total_steps: 5, losses: [[1, 3], [2, 2]] },
    { ...RUNS[2], file: "cat_seed3.safetensors", step: 5, total_steps: 5, losses: [[1, 3], [5, 2]] },
  ],
};

test("the last output alone restores a sweep, and a reload keeps it", () => {
  const run = finish(newRun(), ENDED);
  assert.deepEqual([run.phase, run.many.map((lane) => lane.phase)], ["done", ["done", "failed", "done"]]);
  assert.deepEqual([run.step, run.total, run.many[1].error], [12, 12, "LG-RUN-004  no number"]);
  const back = unpack(pack(new Map([["w/4", run]]))).get("w/4");
  assert.deepEqual(back.many.map((lane) => lane.points.map((p) => p.x)), [[1, 5], [1, 2], [1, 5]]);
  finish(back, { file: "one.safetensors", losses: [[1, 1]] });
  assert.deepEqual([back.many, back.points.length], [[], 1], "a single run's output is that of one run");
});

test("a page that missed the beginning of a sweep shows what comes", () => {
  const run = apply(newRun(), { kind: "step", steps: laneSteps(2, 5, 6) });
  assert.deepEqual(run.many.map((lane) => [lane.label, lane.points.length]), [["1", 0], ["2", 0], ["3", 2]]);
  for (const odd of [64, -1, 1.5, "0", null, NaN, [0]]) apply(run, { kind: "step", run: odd, steps: [{ step: 1, loss: 1, run: odd }] });
  assert.equal(run.many.length, 3);
});

test("validations make a curve with the best save marked, live and from the last payload", () => {
  const run = apply(newRun(), { kind: "plan", total_steps: 40, first_step: 0 });
  apply(run, { kind: "validation", step: 10, loss: 0.5, best: true });
  apply(run, { kind: "validation", step: 20, loss: 0.4, best: true });
  apply(run, { kind: "validation", step: 30, loss: 0.6, best: false });
  assert.deepEqual([run.validations, run.best], [[{ x: 10, loss: 0.5 }, { x: 20, loss: 0.4 }, { x: 30, loss: 0.6 }], 20]);
  apply(run, { kind: "plan", total_steps: 40, first_step: 10 });
  assert.deepEqual([run.validations, run.best], [[{ x: 10, loss: 0.5 }], 0], "what is trained again is measured again");
  const alone = finish(newRun(), { file: "a", losses: [[1, 1]], validations: [[10, 0.5], [20, 0.4]], best: 20 });
  assert.deepEqual([alone.validations.map((v) => v.x), alone.best], [[10, 20], 20]);
  for (const odd of [null, "x", NaN, {}, [1]]) {
    apply(run, { kind: "validation", step: odd, loss: odd });
    finish(newRun(), { file: "a", validations: [odd, [odd, odd]], best: odd });
  }
  assert.equal(run.validations.length, 1);
});

test("stop and failure", () => {
  const run = apply(newRun(), { kind: "step", steps: steps(1, 3) });
  assert.equal(end(run, "stopped").phase, "stopped");
  assert.equal(end(finish(newRun(), { file: "a" }), "stopped").phase, "done", "a finished run is not stopped");
  assert.deepEqual([end(run, "failed", "LG-RUN-001  x").phase, run.error], ["failed", "LG-RUN-001  x"]);
});

test("zero tensors at a save are kept, from the messages or from the last payload", () => {
  const run = apply(newRun(), { kind: "save", step: 5, zero_tensors: 3, num_tensors: 9 });
  assert.deepEqual(run.saves, [{ step: 5, zero: 3, total: 9 }]);
  assert.deepEqual(finish(newRun(), { file: "a", saves: [{ step: 5, zero_tensors: 3, num_tensors: 9 }] }).saves, run.saves);
});

test("queueing again shows at once that work begins, and does not mix the old run into another", () => {
  const run = apply(newRun(), { kind: "step", steps: steps(1, 40) });
  finish(run, { file: "a.safetensors", losses: [[40, 1]] });
  assert.equal(begin(run).phase, "preparing");
  assert.equal(run.points.length, 40, "the old line stays in sight");
  finish(run, { file: "b.safetensors", losses: [[1, 9], [2, 8]], reused: true });
  assert.equal(run.points.length, 2);
  assert.equal(begin(apply(newRun(), { kind: "step", steps: steps(1, 3) })).phase, "training", "a running one goes on");
});

test("no message can break a run: wrong kinds, wrong types, huge lists", () => {
  const odd = [undefined, null, NaN, Infinity, -1, "<img src=x onerror=alert(1)>", {}, [], [[]], true, "9".repeat(99999)];
  const kinds = ["sweep", "plan", "cache", "step", "sample", "save", "note", "finished", "failed", "done", "toString", "__proto__", undefined];
  const fields = ["total_steps", "first_step", "lines", "what", "done", "total", "steps", "step", "loss", "lr", "seconds", "prompt",
    "filename", "subfolder", "type", "zero_tensors", "text", "file", "losses", "saves", "trigger", "samples", "lrs", "notes", "run", "runs", "error", "pace", "left"];
  const run = newRun();
  for (const kind of kinds) for (const field of fields) for (const value of odd) {
    apply(run, { kind, [field]: value });
    apply(run, { kind, run: 1, [field]: value });
    apply(run, { kind, runs: [value, { name: value, label: value, losses: value, saves: value, file: value, error: value }] });
  }
  for (const value of odd) apply(run, value);
  for (let i = 0; i < 500; i++) {
    apply(run, { kind: "note", text: "n" });
    apply(run, { kind: "sample", filename: `${i}.png`, type: "temp" });
  }
  apply(run, { kind: "step", steps: Array.from({ length: 20000 }, (_, i) => ({ step: i, total: 1, loss: 1 })) });
  assert.ok(run.points.length <= 4000 && run.notes.length <= 200 && run.samples.length <= 24);
  assert.ok(run.points.every((p) => Number.isFinite(p.x) && Number.isFinite(p.loss) && Number.isFinite(p.smooth)));
  assert.equal(typeof run.file, "string");
  assert.ok(run.many.length <= 64 && run.many.every((lane) => [lane.label, lane.file, lane.error].every((t) => typeof t === "string")));
  assert.ok(run.many.every((lane) => Number.isFinite(lane.step) && Number.isFinite(lane.total) && lane.points.every((p) => Number.isFinite(p.smooth))));
  assert.ok([run.step, run.total, run.seconds, progress(run)].every(Number.isFinite));
});

test("images come only from ComfyUI's own folders", () => {
  const run = newRun();
  for (const type of ["models", "..", "javascript:", "TEMP"]) apply(run, { kind: "sample", filename: "a.png", type });
  assert.equal(run.samples.length, 0);
});

test("runs survive the session storage; rubbish there is ignored", () => {
  const run = apply(newRun(), { kind: "step", steps: steps(1, 30) });
  const back = unpack(pack(new Map([["w/4", run]])));
  assert.equal(back.get("w/4").points.length, 30);
  apply(back.get("w/4"), { kind: "step", steps: steps(31, 32) });
  assert.equal(back.get("w/4").points.length, 32);
  for (const bad of [null, "", "x", "{}", "[1]", "[[1]]"]) assert.ok(unpack(bad) instanceof Map);
});

test("clock", () => {
  assert.deepEqual([0.4, 75, 3700, 0].map(clock), ["0:01", "1:15", "1:01:40", "0:00"]);
});

test("every language has every string, and none is left in English by mistake", () => {
  const names = Object.keys(strings("en")).sort();
  assert.deepEqual(LOCALES, ["en", "zh", "zh-TW", "ru"]);
  for (const locale of LOCALES) {
    assert.deepEqual(Object.keys(strings(locale)).sort(), names, locale);
    for (const name of names) {
      assert.ok(strings(locale)[name].trim(), `${locale} ${name}`);
      if (locale !== "en" && name !== "file") assert.notEqual(strings(locale)[name], strings("en")[name], `${locale} ${name}`);
    }
  }
  assert.equal(strings("pt-BR"), strings("en"));
  assert.equal(strings("zh-CN"), strings("zh"));
  assert.equal(strings("toString").idle, "Not trained yet");
});
