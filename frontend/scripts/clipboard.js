/** The clipboard: takes a text; where the browser forbids that, the text is selected instead. */

import { byId, say, write } from "./element.js";

/** The timer that restores each button's text. */
const timers = new WeakMap();

/** Copy `text`, which `node` shows; announce `said`, and show the result on `button` for two seconds. */
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
