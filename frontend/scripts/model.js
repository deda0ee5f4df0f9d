/** The model: its card as a table for people, and a warning where it was trained on no photographs. */

import { copy } from "./clipboard.js";
import { byId, element, write } from "./element.js";

const SHORT = 12;
const unknown = (value) => (value === undefined || value === null || value === "unknown" ? "unknown" : String(value));
const megabytes = (bytes) => (bytes ? `${(bytes / 1e6).toFixed(bytes < 1e6 ? 3 : 1)} MB` : "unknown");

/** Show the card of a model; `card` is null where it could not be read. */
export function showModel(model, card, served) {
  const spec = card?.spec ?? {};
  const rows = [
    ["name", model.name],
    ["version", model.version],
    ["architecture", unknown(spec.model?.architecture)],
    ["engine", chosen(spec.engine, card?.serving?.device)],
    ["precision", chosen(spec.precision, card?.serving?.precision)],
    ["threads", card?.serving?.threads && chosen(null, card.serving.threads)],
    ["threads, lone picture", card?.serving?.lone_threads && chosen(null, card.serving.lone_threads)],
    ["decoding", decoding(spec.geometry?.decoding, card?.serving?.decoding)],
    ["accuracy", accuracy(spec.accuracy, spec.caption ? "equal to the reference caption" : "top-1")],
    ["agreement", agreement(spec.agreement)],
    ["labels", spec.labels?.length ? labels(spec.labels) : spec.caption ? null : unknown(model.labels)],
    ["captions", spec.caption && captions(spec.caption)],
    ["data", unknown(spec.provenance?.data)],
    ["weights", unknown(spec.provenance?.weights)],
    ["recipe", spec.provenance?.recipe],
    ["lineage", lineage(spec.provenance?.lineage)],
    ["licence", unknown(spec.provenance?.licence)],
    ["size", megabytes(card?.bytes)],
    ["fingerprint", card?.fingerprint ? fingerprint(card.fingerprint) : "unknown"],
    ["batches", `up to ${model.batch_size}, waiting at most ${model.max_batch_delay_ms} ms for more`],
    ["served by", served],
  ];
  const shown = rows.filter(([, value]) => value);
  byId("card").replaceChildren(
    ...shown.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value))),
  );
  byId("generated").hidden = !spec.provenance?.generated;
  const data = unknown(spec.provenance?.data);
  write(
    byId("generated"),
    `This model was trained on generated pictures (${data}), not on photographs: ` +
      "what it says of photographs means nothing.",
  );
}

/** The worker's value with its reason; before a worker has loaded, the archive's value. */
function chosen(asked, choice) {
  if (!choice) return unknown(asked);
  const value = [asked, choice.value].filter((part, index, all) => part && all.indexOf(part) === index).join(" on ");
  return choice.reason ? `${value}: ${choice.reason}` : value;
}

/** The decoding of pictures, where it differs from the training. */
function decoding(asked, choice) {
  if (!asked || asked === "full") return null;
  return chosen(choice ? null : asked, choice);
}

function accuracy(measured, what) {
  if (!measured) return "not measured";
  return `${(measured.top1 * 100).toFixed(1)} % ${what} on ${measured.pictures} pictures (${measured.data})`;
}

/** A fast variant compared with the fp32 reference; nothing for the reference itself. */
function agreement(found) {
  if (!found) return null;
  return (
    `${(found.top1 * 100).toFixed(1)} % the same first label as the fp32 reference on ${found.pictures} pictures ` +
    `(${found.data}); ` +
    `probabilities moved by at most ${found.moved_99.toFixed(3)} on 99 of 100, ${found.moved.toFixed(3)} on one`
  );
}

/** What a run of Beeline was trained from, each by the first digits of its digest. */
function lineage(digests) {
  const known = Object.entries(digests ?? {}).filter(([, digest]) => digest);
  return known.map(([name, digest]) => `${name} ${digest.slice(0, SHORT)}`).join(", ");
}

function captions({ beams, max_tokens, prompt }) {
  const search = beams > 1 ? `beam search with ${beams}` : "greedy";
  return `${search}, at most ${max_tokens} tokens${prompt ? `, after "${prompt}"` : ""}`;
}

function labels(all) {
  const first = all.slice(0, 4).join(", ");
  return `${all.length}: ${first}${all.length > 4 ? ", …" : ""}`;
}

/** The first letters; the whole text under the pointer and for copying. */
function fingerprint(whole) {
  const node = element("code", { title: whole }, whole.slice(0, SHORT));
  const named = { type: "button", class: "small", "aria-label": "Copy the whole fingerprint" };
  const button = element("button", named, "Copy");
  button.addEventListener("click", () => copy(whole, { node, button, said: "Fingerprint copied" }));
  return element("span", { class: "fingerprint" }, node, button);
}
