// What is known of one training, and how each message of the server changes it. A sweep trains several
// runs side by side: a message's `run` then says which one of `many` it is about.
// Plain values in, plain values out: no page, no ComfyUI. Whatever the server sends is only ever
// turned into numbers and strings here, so that nothing behind this file meets a surprise.

import { smooth, thin } from "./maths.js";

const MOST_SAMPLES = 24;
const MOST_LINES = 200;
const MOST_RUNS = 64;
const MOST_POINTS = 4000;
const PLACES = ["temp", "output", "input"];
export const BUSY = ["preparing", "encoding", "training"];

const number = (value, fallback = 0) => (typeof value === "number" && Number.isFinite(value) ? value : fallback);
const text = (value, limit = 2000) => (value === undefined || value === null ? "" : String(value).slice(0, limit));
const list = (value) => (Array.isArray(value) ? value : []);

export function newRun() {
  return {
    phase: "idle", // idle, preparing, encoding, training, done, stopped, failed
    prompt: "",
    total: 0,
    step: 0,
    epoch: 0,
    points: [], // {x, loss, smooth, lr}: x is the step
    mean: null, // state of the smoothed line
    pace: null, // state of the mean of seconds per step
    seconds: 0,
    cache: { what: "", done: 0, total: 0 },
    samples: [], // {step, prompt, filename, subfolder, type}
    saves: [], // {step, zero, total}: zero of total tensors are all zero
    validations: [], // {x, loss}: the loss on images kept out of training
    best: 0, // the saved step of the lowest of them; 0 where there is none
    lines: [], // the plan in words
    notes: [],
    file: "",
    trigger: "",
    error: "",
    reused: false,
    live: false, // this page has seen it train
    updated: 0,
    many: [], // the runs of a sweep, see newLane
    together: null, // a sweep's {pace, left}, seconds a step and seconds left, as the server counts them
  };
}

/** One run of a sweep; `label` says what sets it apart. */
function newLane(item, number) {
  return {
    name: text(item?.name, 300),
    label: text(item?.label, 300) || String(number + 1),
    phase: "idle", // idle, preparing, training, done, failed
    step: 0,
    total: 0,
    points: [],
    mean: null,
    saves: [],
    file: "",
    error: "",
  };
}

/** The run of a sweep that a message is about; undefined for a message about the whole training. */
function laneOf(run, message) {
  const at = message?.run;
  if (!Number.isInteger(at) || at < 0 || at >= MOST_RUNS) return undefined;
  for (let i = run.many.length; i <= at; i++) run.many.push(newLane({}, i)); // a page that missed the beginning
  return run.many[at];
}

function addUp(run) {
  if (!run.many.length) return;
  run.step = run.many.reduce((sum, lane) => sum + lane.step, 0);
  run.total = run.many.reduce((sum, lane) => sum + (lane.phase === "failed" ? lane.step : lane.total), 0);
}

/** Apply one `loragraft.train` message; unknown kinds are left alone. Returns the same run. */
export function apply(run, message) {
  const lane = laneOf(run, message);
  const changes = lane && Object.hasOwn(LANE_CHANGES, message?.kind ?? "") ? LANE_CHANGES : CHANGES;
  if (Object.hasOwn(changes, message?.kind ?? "")) changes[message.kind](run, message, lane);
  addUp(run);
  return run;
}

const LANE_CHANGES = {
  plan(run, message, lane) {
    const first = number(message.first_step);
    lane.points = lane.points.filter((p) => p.x <= first);
    lane.saves = lane.saves.filter((s) => s.step <= first);
    Object.assign(lane, { phase: "preparing", total: number(message.total_steps), step: first, file: "", error: "" });
    takeLines(run, message);
  },
  step: (run, message) => takeSteps(run, message),
  save(run, message, lane) {
    addSave(lane, message);
  },
  validation() {}, // a sweep's chart has a line for each run's loss and no more; its notes tell the values
  finished(run, message, lane) {
    Object.assign(lane, { phase: "done", file: text(message.file, 600), step: number(message.step, lane.step) });
    lane.total = Math.max(lane.total, lane.step);
  },
  failed(run, message, lane) {
    Object.assign(lane, { phase: "failed", error: text(message.error, 4000) });
  },
};

function takeLines(run, message) {
  run.lines = list(message.lines).slice(0, MOST_LINES).map((line) => text(line));
}

function takeSteps(run, message) {
  for (const step of Array.isArray(message.steps) ? message.steps : [message]) {
    const lane = laneOf(run, step);
    if (lane) addLaneStep(run, lane, step);
    else addStep(run, step);
  }
  if (Number.isFinite(message.pace) && Number.isFinite(message.left)) run.together = { pace: message.pace, left: message.left };
}

function addLaneStep(run, lane, message) {
  const step = number(message?.step, -1);
  if (step < 0) return;
  Object.assign(run, { phase: "training", live: true });
  Object.assign(lane, { phase: "training", step, total: Math.max(number(message.total, lane.total), step) });
  addPoint(lane, step, message.loss, message.lr, MOST_POINTS / 4);
}

const CHANGES = {
  plan(run, message) {
    const first = number(message.first_step);
    const kept = first > 1 ? { points: run.points.filter((p) => p.x <= first), mean: run.mean } : {};
    const samples = first > 1 ? run.samples.filter((s) => s.step <= first) : [];
    const saves = first > 1 ? run.saves.filter((s) => s.step <= first) : [];
    const validations = first > 1 ? run.validations.filter((v) => v.x <= first) : [];
    const best = validations.some((v) => v.x === run.best) ? run.best : 0;
    Object.assign(run, newRun(), kept, { samples, saves, validations, best, prompt: run.prompt, phase: "preparing", live: true });
    run.total = number(message.total_steps);
    run.step = Math.max(0, first - 1);
    takeLines(run, message);
  },
  sweep(run, message) {
    const before = new Map(run.many.map((lane) => [lane.name, lane]));
    const many = list(message.runs).slice(0, MOST_RUNS).map((item, i) => ({ ...newLane(item, i), ...kept(before.get(text(item?.name, 300))) }));
    Object.assign(run, newRun(), { prompt: run.prompt, samples: run.samples, phase: "preparing", live: true, many });
  },
  cache(run, message) {
    run.phase = "encoding";
    run.cache = { what: text(message.what, 60), done: number(message.done), total: number(message.total) };
  },
  step: (run, message) => takeSteps(run, message),
  sample(run, message) {
    addSample(run, message);
  },
  save(run, message) {
    addSave(run, message);
  },
  validation(run, message) {
    addValidation(run, message.step, message.loss);
    if (message.best === true) run.best = number(message.step);
  },
  note(run, message) {
    run.notes = [...run.notes, text(message.text)].slice(-MOST_LINES);
  },
  done(run, message) {
    finish(run, message);
  },
};

/** What a stopped sweep's run keeps in sight until its plan says where it goes on. */
const kept = (lane) => (lane?.name ? { points: lane.points, mean: lane.mean, saves: lane.saves } : {});

function addStep(run, message) {
  const step = number(message?.step, -1);
  if (step < 0) return;
  run.phase = "training";
  run.live = true;
  run.step = step;
  run.total = Math.max(number(message.total, run.total), step);
  run.epoch = number(message.epoch, run.epoch);
  const seconds = number(message.seconds, -1);
  if (seconds >= 0) {
    run.pace = smooth(run.pace, seconds, 0.9);
    run.seconds += seconds;
  }
  addPoint(run, step, message.loss, message.lr);
}

function addPoint(run, x, loss, lr, most = MOST_POINTS) {
  if (typeof loss !== "number" || !Number.isFinite(loss)) return;
  while (run.points.length && run.points[run.points.length - 1].x >= x) run.points.pop(); // a resumed run repeats steps
  run.mean = smooth(run.mean, loss);
  run.points.push({ x, loss, smooth: run.mean.value, lr: number(lr, NaN) });
  if (run.points.length > most) run.points = thin(run.points, most / 2);
}

function addValidation(run, step, loss) {
  const x = number(step, -1);
  if (x < 0 || typeof loss !== "number" || !Number.isFinite(loss)) return;
  run.validations = [...run.validations.filter((v) => v.x < x), { x, loss }].slice(-MOST_POINTS);
}

function addSample(run, image) {
  const type = text(image?.type, 10) || "temp";
  const filename = text(image?.filename, 300);
  if (!filename || !PLACES.includes(type)) return;
  const lane = laneOf(run, image);
  const of = lane ? { run: run.many.indexOf(lane), label: lane.label } : {}; // the run of a sweep that drew it
  const sample = { step: number(image.step), prompt: text(image.prompt), ...of, filename, subfolder: text(image.subfolder, 600), type };
  run.samples = [...run.samples, sample].slice(-MOST_SAMPLES);
}

function addSave(run, save) {
  const step = number(typeof save === "object" && save !== null ? save.step : save, -1);
  if (step < 0 || run.saves.some((s) => s.step === step)) return;
  run.saves.push({ step, zero: number(save?.zero_tensors), total: number(save?.num_tensors) });
}

/** ComfyUI has come to the node; until the plan arrives, the last run stays in sight. */
export function begin(run) {
  if (BUSY.includes(run.phase)) return run;
  return Object.assign(run, { phase: "preparing", error: "", live: false });
}

/** Take over the payload that closes a run; it is also the node's last output, so it may come alone. */
export function finish(run, done) {
  if (!run.live && run.file !== text(done?.file, 600)) Object.assign(run, newRun(), { prompt: run.prompt }); // an earlier run's product, returned at once
  run.phase = "done";
  run.live = false;
  run.file = text(done?.file, 600);
  run.trigger = text(done?.trigger);
  run.reused = done?.reused === true;
  run.seconds = number(done?.seconds, run.seconds);
  run.many = list(done?.runs).length ? lanesOf(run, done) : [];
  const losses = list(done?.losses);
  if (run.points.length < losses.length) takeLosses(run, done, losses);
  run.step = number(done?.step, run.points.length ? run.points[run.points.length - 1].x : run.step);
  run.total = number(done?.total_steps, Math.max(run.total, run.step));
  for (const save of list(done?.saves)) addSave(run, save);
  for (const pair of list(done?.validations)) if (Array.isArray(pair)) addValidation(run, pair[0], pair[1]);
  if (run.validations.length) run.best = number(done?.best, run.best);
  if (list(done?.samples).length) {
    run.samples = [];
    for (const sample of done.samples) addSample(run, sample);
  }
  if (list(done?.lines).length) run.lines = done.lines.slice(0, MOST_LINES).map((line) => text(line));
  if (list(done?.notes).length) run.notes = done.notes.slice(0, MOST_LINES).map((line) => text(line));
  addUp(run);
  return run;
}

/** Each run of a sweep as it ended: with a file, or with an error. */
function lanesOf(run, done) {
  const before = new Map(run.many.map((lane) => [lane.name, lane]));
  return done.runs.slice(0, MOST_RUNS).map((item, i) => {
    const lane = { ...newLane(item, i), ...kept(before.get(text(item?.name, 300))) };
    const file = text(item?.file, 600);
    Object.assign(lane, { phase: file ? "done" : "failed", file, error: text(item?.error, 4000), step: number(item?.step) });
    lane.total = Math.max(number(item?.total_steps), lane.step);
    const losses = list(item?.losses);
    if (lane.points.length < losses.length) takeLosses(lane, item, losses);
    for (const save of list(item?.saves)) addSave(lane, save);
    return lane;
  });
}

/** Losses are pairs [step, loss], or bare numbers spread evenly over the run. */
function takeLosses(run, done, losses) {
  const last = number(done.step, number(done.total_steps, losses.length));
  run.points = [];
  run.mean = null;
  losses.forEach((item, i) => {
    const [x, loss] = Array.isArray(item) ? item : [Math.max(1, Math.round(((i + 1) * last) / losses.length)), item];
    addPoint(run, number(x, i + 1), loss, list(done.lrs)[i]);
  });
}

/** The run ended without a product: "stopped" by the user, or "failed" with a message. */
export function end(run, phase, error = "") {
  if (phase === "stopped" && !BUSY.includes(run.phase)) return run;
  run.phase = phase;
  run.error = text(error, 4000);
  return run;
}

/** Seconds per step, and seconds left; null where not known yet. */
export function timing(run) {
  if (run.many.length) return run.together ?? { pace: null, left: null };
  const pace = run.pace ? run.pace.value : null;
  return { pace, left: pace === null ? null : pace * Math.max(0, run.total - run.step) };
}

/** 0 to 1: how far the present phase is. */
export function progress(run) {
  const { done, total } = run.phase === "encoding" ? run.cache : { done: run.step, total: run.total };
  if (run.phase === "done") return 1;
  if (run.phase === "preparing") return 0;
  return total > 0 ? Math.min(1, Math.max(0, done / total)) : 0;
}

/** 75 -> "1:15", 3700 -> "1:01:40", 0.4 -> "0:01" (never a zero for something that takes time). */
export function clock(seconds) {
  const whole = Math.max(0, Math.ceil(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

/** The newest runs as JSON for the browser's session storage, small enough to keep. */
export function pack(runs, limit = 6) {
  const newest = [...runs].sort((a, b) => b[1].updated - a[1].updated).slice(0, limit);
  return JSON.stringify(newest.map(([key, run]) => [key, { ...run, points: thin(run.points, 1000), many: run.many.map(packLane) }]));
}

const packLane = (lane) => ({ ...lane, points: thin(lane.points, 200) });

/** Read what `pack` wrote; anything else gives no runs. */
export function unpack(json) {
  try {
    return new Map(JSON.parse(json || "[]").map(([key, run]) => [String(key), { ...newRun(), ...run }]));
  } catch {
    return new Map();
  }
}
