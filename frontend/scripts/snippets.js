/** Snippets: code that classifies the current picture in a shell, Python and JavaScript, complete and ready to run. */

import { copy } from "./clipboard.js";
import { byId, write } from "./element.js";

const TABS = ["curl", "python", "javascript"];

const WRITERS = { curl, python, javascript };

function curl(url, file) {
  // curl reads brackets and braces in a file's name as a pattern unless told not to.
  const plain = /[[\]{}]/.test(file) ? " --globoff" : "";
  return `curl -sS${plain} ${shell(url)} \\
  -T ${shell(file)}`;
}

function python(url, file) {
  return `import requests

with open(${JSON.stringify(file)}, "rb") as picture:
    answer = requests.post(${JSON.stringify(url)}, data=picture, timeout=60)
print(answer.text)`;
}

function javascript(url, file) {
  return `// Node 18 or later; save it as classify.mjs and run: node classify.mjs
import { readFile } from "node:fs/promises";

const body = await readFile(${JSON.stringify(file)});
const answer = await fetch(${JSON.stringify(url)}, { method: "POST", body });
console.log(await answer.text());`;
}

/** Quote for a shell; a name that begins with a dash would be read as an option. */
function shell(text) {
  const safe = text.startsWith("-") ? `./${text}` : text;
  return /^[\w./:-]+$/.test(safe) ? safe : `'${safe.replaceAll("'", `'\\''`)}'`;
}

export class Snippets {
  #tab = "curl";
  #url = "";
  #file = "picture.jpg";

  constructor() {
    const tabs = TABS.map((name) => byId(`tab-${name}`));
    tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => this.#open(TABS[index]));
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        const next = (to + TABS.length) % TABS.length;
        this.#open(TABS[next]);
        tabs[next].focus();
      });
    });
    const [node, button] = [byId("snippet"), byId("copy")];
    button.addEventListener("click", () => copy(node.textContent, { node, button, said: "Copied" }));
  }

  /** Show the code for a model's path and a picture, or for any picture. */
  show(model, picture, sample) {
    this.#url = model ? new URL(model.predictions, location.origin).href : `${location.origin}/predictions/`;
    this.#file = picture?.name ?? sample ?? "picture.jpg";
    this.#open(this.#tab);
    const scaled = picture?.scaled && picture.scaled !== picture.file;
    const more = scaled ? " The file itself is over the server's limit: scale it first." : "";
    write(byId("code-note"), `Run it in the folder that holds ${this.#file}.${more}`);
  }

  #open(name) {
    this.#tab = name;
    for (const other of TABS) {
      byId(`tab-${other}`).setAttribute("aria-selected", String(other === name));
      byId(`tab-${other}`).tabIndex = other === name ? 0 : -1;
    }
    byId("panel").setAttribute("aria-labelledby", `tab-${name}`);
    write(byId("snippet"), WRITERS[name](this.#url, this.#file));
  }
}
