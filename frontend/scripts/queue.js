/** The queue: sends a few pictures at a time, waits while the server is busy or away, and then goes on. */

import { DETAILED, read } from "./answer.js";
import { fit } from "./scale.js";

/** Browsers open no more connections to one origin on HTTP/1.1; further requests would wait inside the browser. */
export const IN_FLIGHT = 6;
const MOST_ATTEMPTS = 5;

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Return the bytes, or a form of them and the text that a caption begins with. */
function withPrompt(bytes, prompt) {
  if (!prompt) return bytes;
  const form = new FormData();
  form.append("prompt", prompt);
  form.append("data", new Blob([bytes]));
  return form;
}

export class Queue extends EventTarget {
  #waiting = [];
  #active = new Set();
  #run = { from: 0, to: 0, done: 0 };

  constructor(catalog) {
    super();
    this.catalog = catalog;
  }

  get full() {
    return this.#active.size >= IN_FLIGHT;
  }

  /** Answers per second of the latest run, a run being the time from idle to idle. */
  get rate() {
    const { from, to, done } = this.#run;
    return to > from ? (done * 1000) / (to - from) : 0;
  }

  /** Begin to serve a server. */
  follow(server) {
    this.server = server;
    server.addEventListener("change", () => this.#pump());
    this.catalog.addEventListener("change", () => this.#pump());
  }

  add(...pictures) {
    this.#waiting.push(...pictures);
    this.#waiting.sort((one, other) => one.number - other.number);
    this.#pump();
  }

  /** Send a failed picture again. */
  retry(picture) {
    picture.become("waiting", { attempts: 0, answer: null, batch: null, model: this.catalog.chosen });
    this.add(picture);
  }

  #pump() {
    this.#waiting = this.#waiting.filter((picture) => !picture.removed);
    const open = this.catalog.limits !== null && this.server.open;
    while (open && this.#waiting.length && !this.full) {
      if (!this.#active.size) this.#run = { from: performance.now(), to: 0, done: 0 };
      this.#start(this.#waiting.shift());
    }
    for (const picture of this.#waiting) {
      const state = open ? "waiting" : "held";
      if (picture.state !== state) picture.become(state);
    }
  }

  async #start(picture) {
    this.#active.add(picture);
    let again = false;
    try {
      again = await this.#send(picture);
    } catch (error) {
      // Not the server's mistake: the picture shows it, and the console has its place.
      picture.become("failed", { answer: { status: 0, message: `this page made a mistake: ${error.message}` } });
      reportError(error);
    }
    this.#active.delete(picture);
    if (picture.done && !picture.removed) {
      this.#run.to = performance.now();
      this.#run.done += 1;
      this.dispatchEvent(new CustomEvent("done", { detail: picture }));
    }
    this.add(...(again ? [picture] : []));
  }

  /** Send a picture until it has an answer; returns whether it must wait for the server instead. */
  async #send(picture) {
    let body;
    try {
      body = await this.#bytes(picture);
    } catch (error) {
      picture.become("failed", { answer: { status: 0, message: error.message } });
      return false;
    }
    while (!picture.removed) {
      picture.become("asking", { attempts: picture.attempts + 1 });
      const answer = await this.#post(picture, body);
      if (picture.removed) break;
      if (answer && answer.status !== 429 && answer.status !== 503) {
        this.server.answered();
        picture.become(answer.predictions ? "answered" : "failed", { answer });
        break;
      }
      if (answer?.status === 503) this.server.unready(answer.message, answer.retryAfter);
      if (!answer) this.server.lost();
      if (picture.attempts >= MOST_ATTEMPTS) {
        picture.become("failed", { answer: answer ?? { status: 0, message: "the server could not be reached" } });
        break;
      }
      if (answer?.status !== 429) return true;
      // It keeps its place meanwhile, so that no other picture goes to a full server.
      await this.server.busyWhile(this.#countdown(picture, answer.retryAfter));
    }
    return false;
  }

  /** Return the bytes to send; an unreadable file must not look like a missing server. */
  async #bytes(picture) {
    picture.model ??= this.catalog.chosen;
    const size = await picture.measured;
    if (!picture.scaled) {
      picture.become("scaling");
      const { body, note } = await fit(picture.file, size, this.catalog.limits, picture.cancel.signal);
      picture.scaled = body;
      picture.note = note;
      if (body !== picture.file) picture.show(body);
    }
    return picture.scaled.arrayBuffer().then((bytes) => withPrompt(bytes, picture.prompt)).catch(() => {
      throw new Error(`${picture.name} could not be read from this device; choose it again, and files, not folders`);
    });
  }

  /** Return the answer, or null where none came. */
  async #post(picture, body) {
    const headers = { Accept: DETAILED };
    // A form has a type of its own.
    if (!picture.prompt) headers["Content-Type"] = "application/octet-stream";
    const { signal } = picture.cancel;
    const sent = performance.now();
    let response, text;
    try {
      response = await fetch(picture.model.predictions, { method: "POST", headers, body, signal });
      text = await response.text();
    } catch {
      return null;
    }
    return read(response, text, performance.now() - sent);
  }

  async #countdown(picture, seconds) {
    const until = performance.now() + (seconds + Math.random()) * 1000;
    for (let left = until; !picture.removed && (left = until - performance.now()) > 0; ) {
      const shown = Math.ceil(left / 1000);
      if (picture.state !== "busy" || picture.seconds !== shown) picture.become("busy", { seconds: shown });
      await sleep(Math.min(left, 200));
    }
  }
}
