// The runs of a sweep as a list: the legend of the chart's lines, and what became of each run. textContent only.

import { hue, nearest, short } from "./maths.js";

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

/** Rows of colour, label, loss and state; a finished run's state is its file, a failed one's its message. */
export function createLanes(words) {
  const root = make("div", "loragraft-lanes");
  let many = [];

  function row(number) {
    const line = make("div", "loragraft-lane");
    const swatch = make("i", "loragraft-swatch");
    swatch.style.background = hue(number);
    line.append(swatch, make("span", "loragraft-lane-label"), make("span", "loragraft-lane-loss"), make("span", "loragraft-lane-state"));
    return line;
  }

  function state(lane) {
    if (lane.phase === "done") return lane.file;
    if (lane.phase === "failed") return `${words.failed}: ${lane.error}`;
    return lane.total ? `${lane.step} / ${lane.total}` : "";
  }

  /** Show the runs, with their losses at step `x` or, where that is null, their last ones. */
  function show(next, x = null) {
    many = next;
    root.hidden = many.length === 0;
    while (root.children.length > many.length) root.lastChild.remove();
    many.forEach((lane, n) => {
      const line = root.children[n] ?? root.appendChild(row(n));
      const [, label, loss, end] = line.children;
      const point = lane.points[x === null ? lane.points.length - 1 : nearest(lane.points, x)];
      label.textContent = lane.label;
      loss.textContent = point ? short(point.smooth) : "-";
      end.textContent = state(lane);
      line.dataset.phase = lane.phase;
      line.title = lane.name;
    });
  }

  return { element: root, show: (next) => show(next), showAt: (x) => show(many, x) };
}
