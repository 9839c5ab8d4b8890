// The live panel of one Train LoRA node: a plain element that shows a run. textContent only.

import { createChart, short } from "./chart.js";
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
  for (const name of ["raw", "smooth", "lr", "saved"]) {
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

  const strip = make("div", "loragraft-strip");
  const product = make("div", "loragraft-product");
  const file = make("span", "loragraft-file");
  const trigger = button("loragraft-trigger", "", words.copy_tip, async () => {
    await navigator.clipboard?.writeText(run.trigger);
    trigger.textContent = words.copied;
    setTimeout(() => (trigger.textContent = run.trigger), 1200);
  });
  product.append(make("span", "loragraft-label", words.file), file, make("span", "loragraft-label", words.trigger), trigger);
  const message = make("div", "loragraft-message", words.stopped_hint);
  root.append(more, head, bar, tiles, stage, legend, strip, product, message);

  const chart = createChart(plot, showPoint);
  plot.firstChild.setAttribute("aria-label", words.loss);

  /** Under the pointer the legend reads out one point, else it names the lines. */
  function showPoint(point) {
    keys.raw.textContent = point ? short(point.loss) : words.raw;
    keys.smooth.textContent = point ? short(point.smooth) : words.smooth;
    keys.lr.textContent = point ? short(point.lr) : words.lr;
    keys.saved.textContent = point ? `${words.step} ${point.x}` : words.saved;
    keys.saved.classList.toggle("loragraft-key-step", Boolean(point));
    keys.saved.hidden = !point && run.saves.length === 0;
    keys.lr.hidden = !run.points.some((p) => p.lr > 0);
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

  function showTiles() {
    const last = run.points[run.points.length - 1];
    const { pace, left } = timing(run);
    const over = !BUSY.includes(run.phase) && run.seconds > 0;
    values.loss.textContent = last ? short(last.smooth) : "-";
    values.rate.textContent = last && Number.isFinite(last.lr) ? short(last.lr) : "-";
    values.pace.textContent = pace === null ? "-" : `${pace < 10 ? pace.toFixed(2) : pace.toFixed(1)} ${words.second}`;
    values.leftLabel.textContent = over ? words.took : words.left;
    values.left.textContent = over ? clock(run.seconds) : left === null || run.phase !== "training" ? "-" : clock(left);
  }

  function showStage() {
    const empty = run.points.length === 0;
    root.classList.toggle("loragraft-empty", empty);
    hint.textContent = run.error || (run.phase === "stopped" ? words.stopped_hint : words.hint);
    hint.hidden = !(run.error || (empty && ["idle", "stopped"].includes(run.phase)));
    message.hidden = run.phase !== "stopped" || empty;
    logButton.hidden = empty;
    chart.draw({ points: run.points, saves: run.saves.map((save) => save.step), last: Math.max(run.total, 1) });
    showPoint(null);
    const zeros = run.saves.filter((save) => save.zero > 0);
    const notes = [...zeros.map((save) => `${words.step} ${save.step}: ${words.zero} ${save.zero} / ${save.total}`), ...run.notes];
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
    card.title = `${words.step} ${sample.step}\n${sample.prompt}`;
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
    product.hidden = run.phase !== "done" || !run.file;
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
