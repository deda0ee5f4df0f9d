/** A card: one picture among many, with a button under it that brings it into the large view. */

import { percent, sure } from "./answer.js";
import { batchText, hue } from "./batches.js";
import { element, write } from "./element.js";
import { showSpans } from "./spans.js";

const DOING = { waiting: "Waiting", held: "Waiting", scaling: "Preparing", asking: "Asking", busy: "Busy" };
/** A part whose text is already in the name of the card's button. */
const unsaid = (name, ...children) => element("span", { class: name, "aria-hidden": "true" }, ...children);

/** The line below the headline and the score. */
export function stateText(picture) {
  switch (picture.state) {
    case "held":
      return "until the server is ready";
    case "busy":
      return `next try in ${picture.seconds} s`;
    case "answered":
      return sure(picture) ? "" : "not sure";
    case "failed":
      return failure(picture.answer);
    default:
      return "";
  }
}

const failure = ({ status, message }) => (status ? `${status}: ${message}` : message);

/** The headline: a label, a guess, or a state. */
export function headline(picture) {
  if (picture.state === "failed") return "No answer";
  if (picture.state !== "answered") return DOING[picture.state];
  const best = picture.answer.predictions[0];
  return sure(picture) ? best.label : `perhaps ${best.label}`;
}

export class Card {
  #image = element("img", { alt: "", decoding: "async", hidden: true });
  #label = element("strong", { class: "label" });
  #score = element("span", { class: "score" });
  #text = unsaid("text");
  #meter = element("meter", { min: 0, max: 1, value: 0, hidden: true });
  #bar = element("span", { class: "bar", role: "img" });
  #spans = element("span", { class: "spans", hidden: true }, this.#bar);
  #batch = unsaid("batch");

  /** `actions` has select(picture), remove(picture) and retry(picture). */
  constructor(picture, actions) {
    this.picture = picture;
    // Its name has the card's text. The meter and the bar are outside: screen readers skip the content of a button.
    this.button = element("button", {
      type: "button",
      class: "card",
      click: () => actions.select(picture),
      keydown: (event) => event.key === "Delete" && actions.remove(picture),
    });
    const face = element(
      "div",
      { class: "face" },
      unsaid("frame", this.#image, element("span", { class: "no-preview" }, "no preview")),
      unsaid("word", this.#label, this.#score),
      this.#meter,
      this.#text,
      this.#batch,
      this.#spans,
      unsaid("file", picture.name),
    );
    const again = { type: "button", class: "again", hidden: true, "aria-label": `Retry ${picture.name}` };
    this.again = element("button", { ...again, click: () => actions.retry(picture) }, "Retry");
    this.node = element("li", {}, this.button, face, this.again);
    picture.addEventListener("change", () => this.show());
    this.show();
  }

  /** Mark it as the one in the large view. */
  setCurrent(is) {
    if (is) this.button.setAttribute("aria-current", "true");
    else this.button.removeAttribute("aria-current");
  }

  show() {
    const { picture } = this;
    const best = picture.state === "answered" ? picture.answer.predictions[0] : null;
    this.node.dataset.state = picture.state;
    showPreview(this.#image, picture);
    write(this.#label, headline(picture));
    write(this.#score, best ? percent(best.score) : "");
    write(this.#text, [stateText(picture), picture.note.split(" to fit ")[0]].filter(Boolean).join("; "));
    this.#meter.hidden = !best;
    if (best) Object.assign(this.#meter, { value: best.score, ariaLabel: best.label });
    this.again.hidden = !picture.retriable;
    showSpans(this.#spans, this.#bar, picture.answer);
    showBatch(this.#batch, picture.batch);
    this.node.dataset.batch = picture.batch?.number ?? "";
    const said = [this.#label, this.#score, this.#text, this.#batch].filter((node) => !node.hidden);
    this.button.ariaLabel = [...said.map((node) => node.textContent), picture.name].filter(Boolean).join(" ");
  }
}

/** Show the batch in its colour and in words. */
export function showBatch(node, batch) {
  node.hidden = !batch;
  if (!batch) return;
  write(node, batchText(batch));
  node.style.setProperty("--hue", hue(batch));
}

export function showPreview(image, picture) {
  image.hidden = !picture.preview;
  if (picture.preview && image.getAttribute("src") !== picture.preview) image.src = picture.preview;
}
