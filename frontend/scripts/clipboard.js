/** The clipboard: takes a text, or leaves it selected where the browser keeps its clipboard to itself. */

import { byId, say, write } from "./element.js";

/** What ends the word on each button. */
const timers = new WeakMap();

/** Copy `text`, which `node` shows; `said` is announced, and `button` tells for two seconds what became of it. */
export async function copy(text, { node, button, said }) {
  const selected = "Selected: press Ctrl+C";
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, or without permission.
    copied = false;
    write(node, text);
    getSelection().selectAllChildren(node);
  }
  say(byId("announcer"), copied ? said : selected);
  write(button, copied ? "Copied" : selected);
  clearTimeout(timers.get(button));
  timers.set(button, setTimeout(() => write(button, "Copy"), 2_000));
}
