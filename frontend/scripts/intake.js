/** The intake: the ways in which pictures come in, each ending in `add(files, source)`. */

import { Camera } from "./camera.js";
import { byId, element, say } from "./element.js";

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");

export class Intake {
  #pasted = 0;

  constructor(add) {
    this.add = (files, source) => {
      say(byId("notice"), "");
      add(files, source);
    };
    this.#pick();
    this.#drop();
    window.addEventListener("paste", (event) => this.#paste(event));
    const camera = new Camera((file) => this.add([file], "camera"), () => byId("files").click());
    // A phone's own camera does this better than a page can.
    const phone = matchMedia("(hover: none) and (pointer: coarse)");
    byId("shoot").addEventListener("click", () => (phone.matches ? byId("capture").click() : camera.open()));
  }

  /** Offer a model's samples. */
  showSamples(samples) {
    byId("samples").hidden = !samples.length;
    byId("sample-list").replaceChildren(...samples.map((sample) => element("li", {}, this.#sample(sample))));
  }

  #pick() {
    byId("pick").addEventListener("click", () => byId("files").click());
    for (const [id, source] of [["files", "file"], ["capture", "camera"]]) {
      byId(id).addEventListener("change", ({ target }) => {
        const files = [...target.files];
        // The same file may be chosen again.
        target.value = "";
        if (files.length) this.add(files, source);
      });
    }
  }

  #drop() {
    const over = (is) => (byId("drop").hidden = !is);
    for (const name of ["dragenter", "dragover"]) {
      window.addEventListener(name, (event) => {
        event.preventDefault();
        over(carriesFiles(event));
      });
    }
    // Without a related target the pointer has left the window.
    window.addEventListener("dragleave", (event) => event.relatedTarget ?? over(false));
    window.addEventListener("drop", (event) => {
      event.preventDefault();
      over(false);
      const files = [...(event.dataTransfer?.files ?? [])];
      if (files.length) this.add(files, "file");
      else say(byId("notice"), "What was dropped holds no file; save the picture first and drop the file.");
    });
  }

  #paste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) {
      say(byId("notice"), "The clipboard holds no picture; copy the picture itself, not its address.");
      return;
    }
    event.preventDefault();
    // Browsers give every copied picture the same name.
    const named = files.map((file) => (file.name === "image.png" ? this.#rename(file) : file));
    this.add(named, "paste");
  }

  #rename(file) {
    this.#pasted += 1;
    return new File([file], `pasted-${this.#pasted}.png`, { type: file.type });
  }

  #sample({ url, label, source }) {
    const name = url.split("/").at(-1);
    const take = async () => {
      try {
        const response = await fetch(url);
        if (!response.ok) throw new Error(`the server answered ${response.status}`);
        const blob = await response.blob();
        this.add([new File([blob], name, { type: blob.type })], "sample");
      } catch (error) {
        say(byId("notice"), `The sample ${name} could not be fetched (${error.message}); try it again.`);
      }
    };
    const alt = label ? `Sample: ${label}` : `Sample: ${name}`;
    const image = element("img", { src: url, alt, width: 76, height: 84, loading: "lazy" });
    const title = source ? `${name}, ${source}` : name;
    return element("button", { type: "button", class: "sample", title, click: take }, image);
  }
}
