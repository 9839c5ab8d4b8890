// The panel's style sheet. Colours follow ComfyUI's theme variables, so that light and dark both read well.

const SHEET = String.raw`
.loragraft-panel {
  --lg-text: var(--component-node-foreground, var(--input-text, #ddd));
  --lg-muted: var(--component-node-foreground-secondary, var(--descrip-text, #999));
  --lg-line: color-mix(in srgb, var(--lg-muted) 28%, transparent);
  --lg-face: color-mix(in srgb, var(--lg-muted) 10%, transparent);
  --lg-accent: #3b8ee0;
  --lg-rate: #c9852b;
  --lg-good: #3fa66a;
  --lg-bad: #d9534f;
  --lg-phase: var(--lg-muted);
  box-sizing: border-box;
  display: flex;
  flex-direction: column;
  gap: 6px;
  width: 100%;
  min-height: 320px; /* and the classic renderer adds the row of .loragraft-more: PANEL_HEIGHT */;
  padding: 8px 10px;
  overflow: hidden;
  contain: content;
  border-radius: 8px;
  background: var(--lg-face);
  color: var(--lg-text);
  font: 12px/1.35 Inter, "Noto Sans", "Noto Sans CJK SC", system-ui, sans-serif;
  font-variant-numeric: tabular-nums;
}
.loragraft-panel[data-phase="preparing"],
.loragraft-panel[data-phase="encoding"] { --lg-phase: var(--lg-rate); }
.loragraft-panel[data-phase="training"] { --lg-phase: var(--lg-accent); }
.loragraft-panel[data-phase="done"] { --lg-phase: var(--lg-good); }
.loragraft-panel[data-phase="stopped"] { --lg-phase: var(--lg-rate); }
.loragraft-panel[data-phase="failed"] { --lg-phase: var(--lg-bad); }
.loragraft-panel [hidden] { display: none !important; }
.loragraft-panel * { box-sizing: border-box; margin: 0; }

.loragraft-more {
  flex: none; height: 20px; padding: 0; border: 0; border-radius: 4px; background: transparent; color: var(--lg-muted); font: inherit;
  font-size: 11px; cursor: pointer;
}
.loragraft-more:hover { background: var(--lg-line); color: var(--lg-text); }
.lg-node-widget .loragraft-more { display: none; }
.loragraft-head { display: flex; align-items: center; gap: 7px; min-width: 0; }
.loragraft-dot { flex: none; width: 8px; height: 8px; border-radius: 50%; background: var(--lg-phase); }
.loragraft-phase { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 600; }
.loragraft-count { flex: none; color: var(--lg-muted); }
.loragraft-bar { flex: none; height: 4px; border-radius: 2px; background: var(--lg-line); overflow: hidden; }
.loragraft-fill { height: 100%; width: 0; border-radius: 2px; background: var(--lg-phase); transition: width 0.25s linear; }

.loragraft-tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px; }
.loragraft-tile { display: flex; flex-direction: column; min-width: 0; }
.loragraft-label { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--lg-muted); font-size: 10px; }
.loragraft-value { overflow: hidden; white-space: nowrap; font-size: 15px; font-weight: 600; line-height: 1.25; }

.loragraft-stage { position: relative; flex: 1 1 0; min-height: 96px; }
.loragraft-plot, .loragraft-hint, .loragraft-report { position: absolute; inset: 0; }
.loragraft-plot { cursor: crosshair; }
.loragraft-empty .loragraft-plot { visibility: hidden; }
.loragraft-hint {
  display: flex; align-items: center; justify-content: center; padding: 10px 16px; overflow: auto;
  border: 1px dashed var(--lg-line); border-radius: 6px; color: var(--lg-muted); text-align: center; white-space: pre-wrap; overflow-wrap: anywhere;
}
.loragraft-panel[data-phase="failed"] .loragraft-hint {
  display: block; border: 1px solid var(--lg-bad); background: color-mix(in srgb, var(--lg-bad) 8%, transparent); color: var(--lg-text); text-align: left;
}
.loragraft-panel[data-phase="failed"] .loragraft-plot { visibility: hidden; }
.loragraft-report { display: none; overflow: auto; padding: 6px 8px; border-radius: 6px; background: var(--lg-face); user-select: text; }
.loragraft-reading .loragraft-report { display: block; }
.loragraft-reading .loragraft-plot, .loragraft-reading .loragraft-hint { visibility: hidden; }
.loragraft-line { font-size: 11px; line-height: 1.5; overflow-wrap: anywhere; white-space: pre-wrap; }
.loragraft-note::before { content: "\2022\00a0"; color: var(--lg-rate); }

.loragraft-ahead {
  --lg-text: var(--component-node-foreground, var(--input-text, #ddd));
  --lg-muted: var(--component-node-foreground-secondary, var(--descrip-text, #999));
  --lg-line: color-mix(in srgb, var(--lg-muted) 28%, transparent);
  --lg-accent: #3b8ee0;
  --lg-rate: #c9852b;
  position: relative; box-sizing: border-box; width: 100%; min-height: 110px; padding: 4px 8px; overflow: hidden; contain: content;
  border-radius: 6px; background: color-mix(in srgb, var(--lg-muted) 10%, transparent);
}
.loragraft-presets { box-sizing: border-box; display: flex; flex-wrap: wrap; align-content: flex-start; gap: 4px; width: 100%; min-height: 66px; font: 11px/1.3 system-ui, sans-serif; contain: content; }
.loragraft-presets select, .loragraft-presets button {
  flex: 1 1 34%; min-width: 0; height: 22px; padding: 0 4px; border: 1px solid color-mix(in srgb, var(--descrip-text, #999) 40%, transparent); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: inherit;
}
.loragraft-presets button { flex: none; cursor: pointer; }
.loragraft-presets-note { flex: 1 0 100%; overflow: hidden; height: 14px; color: var(--descrip-text, #999); text-overflow: ellipsis; white-space: nowrap; }
.loragraft-ahead .bar { fill: var(--lg-accent); }
.loragraft-ahead-note { position: absolute; inset: 4px 8px; overflow: auto; color: var(--lg-text); font: 11px/1.35 system-ui, sans-serif; white-space: pre-wrap; pointer-events: none; }
.loragraft-chart { display: block; width: 100%; height: 100%; }
.loragraft-chart .grid { stroke: var(--lg-line); stroke-width: 1; shape-rendering: crispEdges; }
.loragraft-chart .tick { fill: var(--lg-muted); font-size: 9.5px; }
.loragraft-chart .rate-tick { fill: var(--lg-rate); }
.loragraft-chart path { fill: none; stroke-linejoin: round; }
.loragraft-chart .raw { stroke: var(--lg-accent); stroke-width: 1; opacity: 0.38; }
.loragraft-chart .smooth { stroke: var(--lg-accent); stroke-width: 2; }
.loragraft-chart .run { stroke-width: 1.6; }
.loragraft-chart .rate { stroke: var(--lg-rate); stroke-width: 1.2; stroke-dasharray: 4 3; opacity: 0.9; }
.loragraft-chart path.validation { stroke: var(--lg-good); stroke-width: 1.4; }
.loragraft-chart circle.validation { fill: var(--lg-good); }
.loragraft-chart circle.best { fill: none; stroke: var(--lg-good); stroke-width: 1.6; }
.loragraft-chart .save { stroke: var(--lg-good); stroke-width: 1; stroke-dasharray: 2 3; }
.loragraft-chart .cursor line { stroke: var(--lg-muted); stroke-width: 1; }
.loragraft-chart .cursor circle { fill: var(--lg-accent); stroke: var(--lg-text); stroke-width: 1; }

.loragraft-legend { display: flex; align-items: center; gap: 6px; min-height: 18px; color: var(--lg-muted); font-size: 10.5px; white-space: nowrap; }
.loragraft-empty .loragraft-key { visibility: hidden; }
.loragraft-key::before { content: ""; display: inline-block; width: 12px; margin-right: 4px; vertical-align: middle; border-top: 2px solid var(--lg-accent); }
.loragraft-key-raw::before { border-top-width: 1px; opacity: 0.6; }
.loragraft-key-lr::before { border-top: 1px dashed var(--lg-rate); }
.loragraft-key-validation::before { border-top: 2px solid var(--lg-good); }
.loragraft-key-saved::before { border-top: 1px dotted var(--lg-good); }
.loragraft-key-step::before { display: none; }
.loragraft-names { flex: 1; display: flex; gap: 10px; min-width: 0; overflow: hidden; }
.loragraft-toggle, .loragraft-trigger {
  padding: 1px 7px; border: 1px solid var(--lg-line); border-radius: 4px; background: transparent; color: var(--lg-muted); font: inherit; line-height: 1.4; cursor: pointer;
}
.loragraft-toggle:hover, .loragraft-trigger:hover { color: var(--lg-text); border-color: var(--lg-muted); }
.loragraft-toggle[aria-pressed="true"] { background: var(--lg-line); color: var(--lg-text); }
.loragraft-toggle:focus-visible, .loragraft-trigger:focus-visible { outline: 2px solid var(--lg-accent); outline-offset: 1px; }

.loragraft-many .loragraft-strip { height: 48px; }
.loragraft-lanes { flex: 0 1 auto; min-height: 34px; max-height: max(80px, 34%); overflow: hidden auto; scrollbar-width: thin; font-size: 11px; line-height: 15px; }
.loragraft-lane { display: grid; grid-template-columns: 10px minmax(0, 1fr) auto auto; align-items: start; gap: 0 7px; padding: 1px 0; overflow-wrap: anywhere; }
.loragraft-swatch { height: 3px; margin-top: 6px; border-radius: 2px; }
.loragraft-lane-loss { font-weight: 600; }
.loragraft-lane-state { color: var(--lg-muted); user-select: text; word-break: break-all; }
.loragraft-lane[data-phase="done"] .loragraft-lane-state, .loragraft-lane[data-phase="failed"] .loragraft-lane-state { grid-column: 2 / -1; } /* a line of its own */
.loragraft-lane[data-phase="failed"] .loragraft-lane-state { color: var(--lg-bad); word-break: normal; }
.loragraft-strip { flex: none; display: flex; gap: 6px; height: 66px; overflow-x: auto; scrollbar-width: thin; }
.loragraft-sample { position: relative; flex: none; height: 100%; border-radius: 5px; overflow: hidden; background: var(--lg-face); }
.loragraft-image { display: block; height: 100%; width: auto; min-width: 40px; }
.loragraft-gone { width: 40px; background: var(--lg-line); }
.loragraft-gone .loragraft-image { display: none; }
.loragraft-badge { position: absolute; left: 3px; bottom: 3px; padding: 0 4px; border-radius: 3px; background: rgb(0 0 0 / 62%); color: #fff; font-size: 9.5px; line-height: 14px; }
.loragraft-product { flex: none; display: flex; align-items: center; gap: 7px; min-width: 0; white-space: nowrap; }
.loragraft-message { flex: none; padding: 2px 8px; border-radius: 4px; background: color-mix(in srgb, var(--lg-rate) 18%, transparent); }
.loragraft-file { flex: 0 1 auto; min-width: 0; margin-right: 8px; overflow: hidden; text-overflow: ellipsis; font-weight: 600; user-select: text; }
.loragraft-trigger { flex: 0 1 auto; min-width: 0; overflow: hidden; text-overflow: ellipsis; color: var(--lg-text); }
`;

/** Put the style sheet into the page, once. */
export function addStyle() {
  if (document.getElementById("loragraft-style")) return;
  const style = document.createElement("style");
  style.id = "loragraft-style";
  style.textContent = SHEET;
  document.head.append(style);
}
