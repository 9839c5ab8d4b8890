// What a choice shows on a node are widgets of their own, called "choice.name". ComfyUI gives these the tooltip
// of the node's definition, which is English, and looks for a translation only where a widget has no tooltip.

function withoutTooltip(widget) {
  if (widget?.name?.includes(".")) Object.defineProperty(widget, "tooltip", { configurable: true, get: () => undefined, set: () => {} });
  return widget;
}

/** Let the tooltips of a node's nested widgets be looked for as those of all others are, now and after each choice. */
export function translateNested(node) {
  node.widgets?.forEach(withoutTooltip);
  const { addCustomWidget } = node;
  node.addCustomWidget = function (...args) {
    return withoutTooltip(addCustomWidget.apply(this, args));
  };
}
