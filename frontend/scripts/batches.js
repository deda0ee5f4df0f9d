/** Batches: which pictures shared one forward pass, recognised by their common size and times. */

export class Batches {
  #open = new Map();
  #count = 0;

  get count() {
    return this.#count;
  }

  /** Return the batch of one answer, as {number, size, ours}, or null where no worker answered. */
  join(answer) {
    if (!answer.key) return null;
    let batch = this.#open.get(answer.key);
    // Two batches may have taken the same time to the hundredth of a millisecond; none holds more than its size.
    if (!batch || batch.ours === batch.size) {
      batch = { number: ++this.#count, size: answer.size, ours: 0 };
      this.#open.set(answer.key, batch);
    }
    batch.ours += 1;
    return batch;
  }

  clear() {
    this.#open.clear();
    this.#count = 0;
  }
}

export const batchText = ({ number, size }) => `batch ${number}: ${size} ${size === 1 ? "picture" : "pictures"}`;

/** A hue for a batch; neighbours in number are far apart on the wheel. */
export const hue = ({ number }) => String(Math.round((number * 137.5) % 360));
