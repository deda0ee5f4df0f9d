/** The page: joins catalog, server, queue and the parts that show them. */

import { notSureUnder, percent } from "./answer.js";
import { Batches } from "./batches.js";
import { Card } from "./card.js";
import { Catalog, path } from "./catalog.js";
import { Detail } from "./detail.js";
import { byId, element, write } from "./element.js";
import { Feedback } from "./feedback.js";
import { Intake } from "./intake.js";
import { showModel } from "./model.js";
import { Picture } from "./picture.js";
import { Queue } from "./queue.js";
import { Server } from "./server.js";
import { Snippets } from "./snippets.js";
import { fillKey } from "./spans.js";
import { Summary } from "./summary.js";

/** Milliseconds until the next try to read the catalog. */
const ASK_AGAIN = 3_000;
/** So many models have a filter. */
const MANY = 8;

const catalog = new Catalog();
const queue = new Queue(catalog);
const server = new Server(() => queue.full);
const batches = new Batches();
const summary = new Summary(queue, batches);
const snippets = new Snippets();
/** Cards by picture, in the order in which the pictures came. */
const cards = new Map();
const feedback = new Feedback(catalog);
const detail = new Detail({ remove, retry, shown: (picture) => feedback.show(picture) });

function add(files, source) {
  const pictures = files.map((file) => new Picture(file, source, catalog.chosen, prompt()));
  for (const picture of pictures) {
    cards.set(picture, new Card(picture, { select: choose, remove, retry }));
    byId("grid").append(cards.get(picture).node);
  }
  select(pictures[0]);
  queue.add(...pictures);
  if (cards.size === pictures.length) reveal(byId("results"));
}

/** What the next captions begin with; "" where the model writes none. */
function prompt() {
  return byId("prompting").hidden ? "" : byId("prompt").value.trim();
}

function retry(picture) {
  queue.retry(picture);
  focusOn(picture);
  show();
}

/** Put the focus on a picture: on its card, or on the large view where it is the only one. */
function focusOn(picture) {
  (cards.size > 1 ? cards.get(picture).button : byId("remove")).focus();
}

/** Remove a picture; the focus goes to its neighbour, never to nowhere. */
function remove(picture) {
  const order = [...cards.keys()];
  const at = order.indexOf(picture);
  const focused = cards.get(picture).node.contains(document.activeElement);
  cards.get(picture).node.remove();
  cards.delete(picture);
  picture.remove();
  const next = order[at + 1] ?? order[at - 1];
  if (picture === detail.picture) select(next ?? null);
  else show();
  if (!next) byId("pick").focus();
  else if (focused) focusOn(next);
}

function clear() {
  for (const [picture, card] of cards) {
    picture.remove();
    card.node.remove();
  }
  cards.clear();
  batches.clear();
  select(null);
  byId("pick").focus();
}

function select(picture) {
  cards.get(detail.picture)?.setCurrent(false);
  detail.picture = picture;
  cards.get(picture)?.setCurrent(true);
  show();
}

/** Select on purpose: where the large view is above the cards, go to it. */
function choose(picture) {
  select(picture);
  if (byId("detail").getBoundingClientRect().bottom < 80) reveal(byId("detail"));
}

function reveal(node) {
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({ behavior: smooth ? "smooth" : "auto", block: "nearest" });
}

function show() {
  const pictures = [...cards.keys()];
  byId("results").hidden = !pictures.length;
  document.body.classList.toggle("one", pictures.length === 1);
  byId("many").hidden = byId("summary").hidden = pictures.length < 2;
  summary.show(pictures);
  showCode();
}

function showCode() {
  snippets.show(catalog.chosen, detail.picture, catalog.chosen?.samples[0]?.url.split("/").at(-1));
}

/** Highlight the cards of the same batch as the card under the pointer or the focus. */
function highlight(event) {
  const batch = event?.target.closest?.("li")?.dataset.batch;
  for (const { node } of cards.values()) node.classList.toggle("mate", Boolean(batch) && node.dataset.batch === batch);
}

function showCatalog() {
  const model = catalog.chosen;
  byId("choice").hidden = catalog.models.length < 2;
  byId("filter").hidden = catalog.models.length < MANY;
  showChoices();
  showCode();
  if (!model) return;
  byId("prompting").hidden = model.task !== "caption";
  const labels = model.labels ? `${model.name} tells ${model.labels} labels apart.` : "";
  write(byId("known"), model.task === "caption" ? `${model.name} writes captions.` : labels);
  intake.showSamples(model.samples);
  showCard();
}

/** Offer the models that have every word of the filter, and the chosen one. */
function showChoices() {
  const words = byId("filter").value.toLowerCase().split(/\s+/);
  const has = (model) => words.every((word) => path(model).toLowerCase().includes(word));
  byId("models").replaceChildren(
    ...catalog.models.filter((one) => one === catalog.chosen || has(one)).map((one) => {
      const title = server.failed[path(one)];
      const values = { value: path(one), selected: one === catalog.chosen, disabled: Boolean(title), title };
      return element("option", values, `${one.name} ${one.version}${title ? " (not served)" : ""}`);
    }),
  );
}

async function showCard() {
  const model = catalog.chosen;
  const card = model && (await catalog.card());
  if (!model) return;
  model.spec = card?.spec;
  // What was answered before is judged by the model's own score now.
  for (const picture of cards.keys()) picture.become(picture.state);
  if (model !== catalog.chosen) return;
  showModel(model, card, catalog.served);
  showThreshold();
}

function showThreshold() {
  const spec = catalog.chosen?.spec;
  const why = Number.isFinite(spec?.not_sure_under) ? ", as validation pictures showed" : "";
  const under = percent(notSureUnder(spec));
  const guess = `Under ${under} the best label is only a guess${why}, and is called "not sure".`;
  write(byId("threshold"), spec?.task === "caption" ? "" : guess);
}

let open = false;
let failed = "{}";
function showServer() {
  document.querySelector(".top").dataset.state = server.state;
  write(byId("state"), server.sentence);
  if (failed !== (failed = JSON.stringify(server.failed))) showChoices();
  // The workers' own choices are known once they are ready.
  if (server.open && !open) load().then(showCard);
  open = server.open;
}

async function load() {
  if (!(await catalog.load())) setTimeout(load, ASK_AGAIN);
}

const intake = new Intake(add);
fillKey(byId("key"));
showThreshold();
queue.follow(server);
queue.addEventListener("done", ({ detail: picture }) => {
  picture.become(picture.state, { batch: batches.join(picture.answer) });
  show();
  summary.say([...cards.keys()]);
});
catalog.addEventListener("change", showCatalog);
server.addEventListener("change", showServer);
byId("models").addEventListener("change", ({ target }) => catalog.choose(target.value));
byId("filter").addEventListener("input", showChoices);
byId("clear").addEventListener("click", clear);
for (const name of ["pointerover", "focusin"]) byId("grid").addEventListener(name, highlight);
for (const name of ["pointerleave", "focusout"]) byId("grid").addEventListener(name, () => highlight());
document.querySelector(".skip").addEventListener("click", (event) => {
  // The hash names the model; the link would replace it.
  event.preventDefault();
  byId("intake").focus();
});
load();
