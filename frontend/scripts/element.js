/** An element: made from a tag, attributes and children; text stays text, never HTML. */

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Set text only where it differs: a live region that is set again may be read again. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Say a text in a live region, and the same text again: screen readers tell changes only. */
export function say(region, text) {
  region.textContent = "";
  requestAnimationFrame(() => (region.textContent = text));
}
