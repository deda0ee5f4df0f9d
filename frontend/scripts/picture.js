/** A picture: its file, its origin, its size, and its state. */

/** A preview of more pixels costs the tab too much memory; the scaled picture, if any, is shown instead. */
const MOST_SHOWN_PIXELS = 50e6;
let count = 0;

export class Picture extends EventTarget {
  /** waiting, held (the server is away), scaling, asking, busy, answered or failed. */
  state = "waiting";
  number = ++count;
  attempts = 0;
  /** Seconds until the next attempt, while busy. */
  seconds = 0;
  /** The change that was made before sending. */
  note = "";
  /** The URL of the preview, or "". */
  preview = "";
  answer = null;
  batch = null;
  cancel = new AbortController();
  #urls = [];

  /** `prompt` is what a caption begins with, or "". */
  constructor(file, source, model, prompt) {
    super();
    this.prompt = prompt;
    this.file = file;
    this.name = file.name;
    this.source = source;
    this.model = model;
    this.url = this.#url(file);
    this.measured = this.#measure();
  }

  get removed() {
    return this.cancel.signal.aborted;
  }

  get done() {
    return this.state === "answered" || this.state === "failed";
  }

  /** Whether a retry may help: not where the server or this page has refused the file itself. */
  get retriable() {
    const status = this.answer?.status ?? 0;
    const judged = !this.attempts || (status >= 400 && status < 500 && status !== 408 && status !== 429);
    return this.state === "failed" && !judged;
  }

  /** Change the state and notify the views. */
  become(state, facts = {}) {
    if (this.removed) return;
    Object.assign(this, facts, { state });
    this.dispatchEvent(new Event("change"));
  }

  /** Show another blob in place of the file. */
  show(blob) {
    this.become(this.state, { preview: this.#url(blob) });
  }

  /** Return a URL of a blob that is revoked with the picture, or "" where that has been removed. */
  #url(blob) {
    if (this.removed) return "";
    this.#urls.push(URL.createObjectURL(blob));
    return this.#urls.at(-1);
  }

  remove() {
    this.cancel.abort();
    this.#urls.forEach((url) => URL.revokeObjectURL(url));
  }

  /** Return {width, height} as shown, upright, or null. A browser reads the header for it and decodes no pixel. */
  async #measure() {
    const image = new Image();
    const loaded = new Promise((resolve) => {
      image.onload = () => resolve(true);
      image.onerror = () => resolve(false);
    });
    image.src = this.url;
    if (!(await loaded) || !image.naturalWidth) return null;
    const size = { width: image.naturalWidth, height: image.naturalHeight };
    if (size.width * size.height <= MOST_SHOWN_PIXELS) this.preview = this.url;
    this.become(this.state);
    return size;
  }
}
