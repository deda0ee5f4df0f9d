/** The summary: how many pictures are done, how fast, in how many batches; announced only now and then. */

import { percent, sure } from "./answer.js";
import { byId, say, write } from "./element.js";
import { IN_FLIGHT } from "./queue.js";

const SAY_EVERY = 5_000;

export class Summary {
  #said = 0;

  constructor(queue, batches) {
    Object.assign(this, { queue, batches });
    write(
      byId("honest"),
      `A browser keeps at most ${IN_FLIGHT} connections to one server, so a batch holds at most ` +
        `${IN_FLIGHT} pictures from this page; pictures of other clients may share it.`,
    );
  }

  show(pictures) {
    const { done, failed } = count(pictures);
    Object.assign(byId("progress"), { max: Math.max(1, pictures.length), value: done });
    write(byId("done"), `${done} of ${pictures.length}`);
    write(byId("rate"), this.queue.rate ? this.queue.rate.toFixed(1) : "–");
    write(byId("failed"), String(failed));
    byId("failed").parentElement.classList.toggle("some", failed > 0);
    write(byId("batches"), String(this.batches.count));
  }

  /** Announce it, after a picture is done. */
  say(pictures) {
    const { done, failed } = count(pictures);
    const all = done === pictures.length;
    if (!all && performance.now() - this.#said < SAY_EVERY) return;
    this.#said = performance.now();
    say(byId("announcer"), pictures.length === 1 ? one(pictures[0]) : many(pictures.length, done, failed));
  }
}

const count = (pictures) => ({
  done: pictures.filter((picture) => picture.done).length,
  failed: pictures.filter((picture) => picture.state === "failed").length,
});

const many = (all, done, failed) => `${done} of ${all} pictures done, ${failed} failed`;

function one(picture) {
  const { name, state, answer } = picture;
  if (state === "failed") return `${name}: no answer, ${answer.message}`;
  const best = answer.predictions[0];
  return `${name}: ${sure(picture) ? "" : "not sure, perhaps "}${best.label}, ${percent(best.score)}`;
}
