/** The detail: the current picture at full size, with all its labels and its time. */

import { percent } from "./answer.js";
import { headline, showBatch, showPreview, stateText } from "./card.js";
import { byId, element, write } from "./element.js";
import { fillFigures, showSpans } from "./spans.js";

export class Detail {
  #picture = null;
  #shown = () => this.#show();

  /** `actions` has remove(picture), retry(picture), and shown(picture), which completes the view. */
  constructor(actions) {
    this.actions = actions;
    byId("remove").addEventListener("click", () => actions.remove(this.#picture));
    byId("retry").addEventListener("click", () => actions.retry(this.#picture));
  }

  get picture() {
    return this.#picture;
  }

  set picture(picture) {
    this.#picture?.removeEventListener("change", this.#shown);
    this.#picture = picture;
    byId("detail-preview").removeAttribute("src");
    picture?.addEventListener("change", this.#shown);
    this.#show();
  }

  #show() {
    const picture = this.#picture;
    if (!picture) return;
    const { answer, state } = picture;
    byId("detail").dataset.state = state;
    showPreview(byId("detail-preview"), picture);
    byId("detail-preview").alt = `Preview of ${picture.name}`;
    write(byId("detail-name"), picture.name);
    const best = state === "answered" ? answer.predictions[0] : null;
    write(byId("detail-label"), headline(picture));
    write(byId("detail-verdict"), [best && percent(best.score), stateText(picture)].filter(Boolean).join(", "));
    byId("detail-scores").replaceChildren(...(best ? answer.predictions.map(score) : []));
    showSpans(byId("detail-spans"), byId("detail-bar"), answer);
    if (answer?.spans) fillFigures(byId("detail-legend"), answer);
    showBatch(byId("detail-batch"), picture.batch);
    const note = [picture.note, answer?.warning, best && `answered by ${picture.model.name} ${picture.model.version}`];
    write(byId("detail-note"), note.filter(Boolean).join("; "));
    byId("detail-note").hidden = !byId("detail-note").textContent;
    byId("retry").hidden = !picture.retriable;
    // Pictures from the camera, the clipboard and samples are in no folder yet, and the code needs a file.
    Object.assign(byId("save"), { hidden: picture.source === "file", download: picture.name, href: picture.url });
    this.actions.shown(picture);
  }
}

function score({ label, score: value }) {
  const meter = element("meter", { min: 0, max: 1, value, "aria-label": label });
  const name = element("span", { class: "name" }, label);
  return element("li", {}, name, meter, element("span", { class: "score" }, percent(value)));
}
