// The live panel of one Train LoRA node: a plain element that shows a run. textContent only.

import { createChart } from "./chart.js";
import { createLanes } from "./lanes.js";
import { hue, short } from "./maths.js";
import { BUSY, clock, newRun, progress, timing } from "./runs.js";

export const PANEL_HEIGHT = 344;

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function button(className, text, tip, onClick) {
  const element = make("button", className, text);
  element.type = "button";
  element.title = tip;
  element.addEventListener("click", onClick);
  return element;
}

/**
 * `words` is a table of strings.js; `imageUrl(sample)` gives the address of an image on the server;
 * `onMore` shows or hides the node's advanced widgets (the style sheet hides the button in Nodes 2.0).
 */
export function createPanel(words, imageUrl, onMore = () => {}) {
  const root = make("div", "loragraft-panel");
  const more = button("loragraft-more", words.more, "", onMore);
  const head = make("div", "loragraft-head");
  const phase = make("span", "loragraft-phase");
  const count = make("span", "loragraft-count");
  head.append(make("i", "loragraft-dot"), phase, count);
  const bar = make("div", "loragraft-bar");
  const fill = make("div", "loragraft-fill");
  bar.append(fill);
  bar.setAttribute("role", "progressbar");

  const tiles = make("div", "loragraft-tiles");
  const values = {};
  for (const name of ["loss", "rate", "pace", "left"]) {
    const tile = make("div", "loragraft-tile");
    const label = make("span", "loragraft-label", words[name]);
    values[name] = make("span", "loragraft-value", "-");
    values[`${name}Label`] = label;
    tile.append(label, values[name]);
    tiles.append(tile);
  }

  const stage = make("div", "loragraft-stage");
  const plot = make("div", "loragraft-plot");
  const hint = make("div", "loragraft-hint", words.hint);
  const report = make("div", "loragraft-report");
  stage.append(plot, hint, report);

  const legend = make("div", "loragraft-legend");
  const keys = {};
  const names = make("div", "loragraft-names");
  for (const name of ["raw", "smooth", "lr", "validation", "saved"]) {
    keys[name] = make("span", `loragraft-key loragraft-key-${name}`);
    names.append(keys[name]);
  }
  let run = newRun();
  let log = false;
  let wasPlanned = false;
  const logButton = button("loragraft-toggle", words.log, words.log_tip, () => {
    log = !log;
    logButton.setAttribute("aria-pressed", String(log));
    chart.setLog(log);
  });
  const reportButton = button("loragraft-toggle", words.report, words.report_tip, () => {
    read(!reading());
  });
  legend.append(names, logButton, reportButton);

  const reading = () => root.classList.contains("loragraft-reading");
  function read(on) {
    root.classList.toggle("loragraft-reading", on);
    reportButton.setAttribute("aria-pressed", String(on));
  }

  const lanes = createLanes(words);
  const strip = make("div", "loragraft-strip");
  const product = make("div", "loragraft-product");
  const file = make("span", "loragraft-file");
  const trigger = button("loragraft-trigger", "", words.copy_tip, async () => {
    await navigator.clipboard?.writeText(run.trigger);
    trigger.textContent = words.copied;
    setTimeout(() => (trigger.textContent = run.trigger), 1200);
  });
  const fileLabel = make("span", "loragraft-label", words.file);
  product.append(fileLabel, file, make("span", "loragraft-label", words.trigger), trigger);
  const message = make("div", "loragraft-message", words.stopped_hint);
  root.append(more, head, bar, tiles, stage, legend, lanes.element, strip, product, message);

  const chart = createChart(plot, showPoint);
  plot.firstChild.setAttribute("aria-label", words.loss);

  /** Under the pointer the legend reads out one point, else it names the lines. */
  function showPoint(point) {
    if (run.many.length) {
      for (const name of ["raw", "smooth", "lr", "validation"]) keys[name].hidden = true;
      keys.saved.hidden = !point;
      keys.saved.classList.add("loragraft-key-step");
      keys.validation.textContent = validationText();
    keys.validation.hidden = Boolean(point) || run.validations.length === 0;
    keys.saved.textContent = point ? `${words.step} ${point.x}` : "";
      lanes.showAt(point ? point.x : null);
      return;
    }
    keys.raw.hidden = keys.smooth.hidden = false;
    keys.raw.textContent = point ? short(point.loss) : words.raw;
    keys.smooth.textContent = point ? short(point.smooth) : words.smooth;
    keys.lr.textContent = point ? short(point.lr) : words.lr;
    keys.saved.textContent = point ? `${words.step} ${point.x}` : words.saved;
    keys.saved.classList.toggle("loragraft-key-step", Boolean(point));
    keys.saved.hidden = !point && run.saves.length === 0;
    keys.lr.hidden = !run.points.some((p) => p.lr > 0);
  }

  /** The newest validation loss, and which save is the best. */
  function validationText() {
    const last = run.validations[run.validations.length - 1];
    if (!last) return "";
    return `${words.validation} ${short(last.loss)}${run.best ? ` · ${words.best} ${run.best}` : ""}`;
  }

  function showHead() {
    root.dataset.phase = run.phase;
    phase.textContent = run.phase === "done" && run.reused ? words.reused : words[run.phase];
    if (run.phase === "encoding") phase.textContent += ` ${words[`what_${run.cache.what}`] ?? run.cache.what}`;
    head.title = BUSY.includes(run.phase) ? words.busy_tip : "";
    const { done, total } = run.phase === "encoding" ? run.cache : { done: run.step, total: run.total };
    count.textContent = total && run.phase !== "preparing" ? `${run.phase === "encoding" ? "" : `${words.step} `}${done} / ${total}` : "";
    if (run.phase === "training" && run.epoch) count.textContent = `${words.epoch} ${run.epoch} · ${count.textContent}`;
    const percent = (100 * progress(run)).toFixed(1);
    fill.style.width = `${percent}%`;
    bar.setAttribute("aria-valuenow", percent);
  }

  /** The mean of a sweep's last losses; NaN before the first. */
  function meanLoss() {
    const learning = run.many.filter((lane) => lane.points.length && lane.phase !== "failed");
    return learning.reduce((sum, lane) => sum + lane.points[lane.points.length - 1].smooth, 0) / learning.length;
  }

  function showTiles() {
    const last = run.many.length ? { smooth: meanLoss(), lr: NaN } : run.points[run.points.length - 1];
    const { pace, left } = timing(run);
    const over = !BUSY.includes(run.phase) && run.seconds > 0;
    values.loss.textContent = last && Number.isFinite(last.smooth) ? short(last.smooth) : "-";
    values.rate.textContent = last && Number.isFinite(last.lr) ? short(last.lr) : "-";
    values.rateLabel.textContent = run.many.length ? words.runs : words.rate;
    if (run.many.length) values.rate.textContent = `${run.many.filter((lane) => lane.phase === "done").length} / ${run.many.length}`;
    values.pace.textContent = pace === null ? "-" : `${pace < 10 ? pace.toFixed(2) : pace.toFixed(1)} ${words.second}`;
    values.leftLabel.textContent = over ? words.took : words.left;
    values.left.textContent = over ? clock(run.seconds) : left === null || run.phase !== "training" ? "-" : clock(left);
  }

  const zeroNotes = ({ saves }, name) =>
    saves.filter((save) => save.zero > 0).map((save) => `${name}${words.step} ${save.step}: ${words.zero} ${save.zero} / ${save.total}`);
  const errorOf = (lane) => (lane.error ? [`${lane.label}: ${lane.error}`] : []);

  function showStage() {
    const empty = run.points.length === 0 && !run.many.some((lane) => lane.points.length);
    root.classList.toggle("loragraft-many", run.many.length > 0);
    root.classList.toggle("loragraft-empty", empty);
    hint.textContent = run.error || (run.phase === "stopped" ? words.stopped_hint : words.hint);
    hint.hidden = !(run.error || (empty && ["idle", "stopped"].includes(run.phase)));
    message.hidden = run.phase !== "stopped" || empty;
    logButton.hidden = empty;
    const longest = Math.max(1, ...(run.many.length ? run.many.map((lane) => lane.total) : [run.total]));
    lanes.show(run.many);
    chart.draw({ points: run.points, many: run.many.map((lane) => lane.points), saves: run.saves.map((save) => save.step), validations: run.validations, best: run.best, last: longest });
    showPoint(null);
    const notes = [...zeroNotes(run, ""), ...run.many.flatMap((lane) => [...zeroNotes(lane, `${lane.label}: `), ...errorOf(lane)]), ...run.notes];
    const lines = [...run.lines, ...notes];
    reportButton.hidden = lines.length === 0;
    const planned = empty && BUSY.includes(run.phase); // before the first step there is only the plan to show
    if (lines.length === 0) read(false);
    else if (planned !== wasPlanned) read(planned);
    wasPlanned = planned;
    if (report.childElementCount !== lines.length || report.lastChild?.textContent !== lines[lines.length - 1]) {
      report.replaceChildren(
        ...run.lines.map((line) => make("p", "loragraft-line", line)),
        ...notes.map((line) => make("p", "loragraft-line loragraft-note", line)),
      );
    }
  }

  function showStrip() {
    const wanted = run.samples.map((sample) => imageUrl(sample));
    const shown = [...strip.children].map((card) => card.getAttribute("href"));
    strip.hidden = wanted.length === 0;
    if (wanted.join("\n") === shown.join("\n")) return;
    strip.replaceChildren(...run.samples.map((sample, i) => sampleCard(sample, wanted[i])));
  }

  function sampleCard(sample, url) {
    const card = make("a", "loragraft-sample");
    card.href = url;
    card.target = "_blank";
    card.rel = "noopener";
    card.title = [sample.label, `${words.step} ${sample.step}`, sample.prompt].filter(Boolean).join("\n");
    if (sample.label) card.style.borderBottom = `2px solid ${hue(sample.run)}`;
    const image = make("img", "loragraft-image");
    image.src = url;
    image.alt = sample.prompt;
    image.draggable = false;
    image.addEventListener("load", () => (strip.scrollLeft = strip.scrollWidth)); // the newest stays in sight
    image.addEventListener("error", () => card.classList.add("loragraft-gone")); // deleted from ComfyUI's folder
    card.append(image, make("span", "loragraft-badge", String(sample.step)));
    return card;
  }

  function showProduct() {
    product.hidden = run.phase !== "done" || !run.file || (run.many.length > 0 && !run.trigger);
    file.hidden = fileLabel.hidden = run.many.length > 0; // each run's row names its file
    const name = run.file.split(/[\\/]/).pop();
    file.textContent = name;
    file.title = run.file;
    trigger.textContent = run.trigger;
    trigger.hidden = trigger.previousSibling.hidden = run.trigger === "";
  }

  function show(next, moreShown = false) {
    run = next;
    more.textContent = moreShown ? `\u25b4 ${words.less}` : `\u25be ${words.more}`;
    showHead();
    showTiles();
    showStage();
    showStrip();
    showProduct();
  }

  show(run);
  return { element: root, show, dispose: () => chart.dispose(), reading };
}
