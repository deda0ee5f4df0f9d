/** Spans: where a picture's time went, as a stacked bar with its text. */

import { STAGES } from "./answer.js";
import { element } from "./element.js";

const MEANINGS = {
  queue: "waiting in the server for the worker",
  decode: "from the file to pixels, the whole batch",
  forward: "the model itself, the whole batch",
  encode: "from scores to the answer, the whole batch",
  network: "the rest of what this browser measured: the way there and back, the upload included",
};

export const milliseconds = (span) => `${span < 9.95 ? span.toFixed(1) : Math.round(span)} ms`;

const parts = (answer) => STAGES.filter((stage) => stage in answer.spans).map((stage) => [stage, answer.spans[stage]]);

/** Fill `bar`, an element of role img, with one answer's spans. */
function fillBar(bar, answer) {
  bar.replaceChildren(
    ...parts(answer).map(([stage, span]) => {
      const piece = element("span", { class: `span ${stage}` });
      piece.style.flexGrow = String(span);
      return piece;
    }),
  );
  const figures = parts(answer).map(([stage, span]) => `${stage} ${milliseconds(span)}`);
  bar.setAttribute("aria-label", `${milliseconds(answer.total)}: ${figures.join(", ")}`);
}

/** Fill `list`, a dl, with the same figures and their colours. */
export function fillFigures(list, answer) {
  const rows = parts(answer).map(([stage, span]) =>
    element("div", { title: MEANINGS[stage] }, element("dt", {}, swatch(stage), stage), element("dd", {}, milliseconds(span))),
  );
  const total = element("dd", {}, milliseconds(answer.total));
  list.replaceChildren(...rows, element("div", {}, element("dt", {}, "total"), total));
}

/** Fill `list`, a ul, with the colours alone. */
export function fillKey(list) {
  list.replaceChildren(...STAGES.map((stage) => element("li", { title: MEANINGS[stage] }, swatch(stage), stage)));
}

/** Show nothing where no worker answered. */
export function showSpans(box, bar, answer) {
  box.hidden = !answer?.spans;
  if (answer?.spans) fillBar(bar, answer);
}

const swatch = (stage) => element("span", { class: `swatch ${stage}`, "aria-hidden": "true" });
