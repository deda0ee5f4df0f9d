/** The catalog: the models that are served, the server's limits, and the chosen model, kept in the URL's hash. */

const HASH = "#model=";
export const path = (model) => `${model.name}/${model.version}`;

export class Catalog extends EventTarget {
  models = [];
  limits = null;
  /** Who may tell that an answer is wrong: "here", "token", or "" for nobody. */
  feedback = "";
  served = "";
  #chosen = null;
  #text = "";

  constructor() {
    super();
    window.addEventListener("hashchange", () => this.#follow());
  }

  /** The chosen model's entry, or null until the catalog has been read. */
  get chosen() {
    return this.#chosen;
  }

  /** Read the catalog again; return whether that worked. */
  async load() {
    try {
      const values = await json("/catalog.json");
      const text = JSON.stringify(values);
      if (text === this.#text) return true;
      const { models, limits, feedback } = values;
      Object.assign(this, { models: [...models], limits, feedback, served: served(values) });
      this.#text = text;
    } catch {
      // It is not there yet, or the answer is from a proxy in front of the gateway.
      return false;
    }
    this.#chosen = this.#asked();
    this.dispatchEvent(new Event("change"));
    return true;
  }

  /** Read the chosen model's card, or null where it cannot be read. */
  async card() {
    return this.#chosen ? json(this.#chosen.card).catch(() => null) : null;
  }

  choose(wanted) {
    const hash = HASH + wanted.split("/").map(encodeURIComponent).join("/");
    if (location.hash !== hash) history.replaceState(null, "", hash);
    this.#follow();
  }

  /** The model that the hash names, else the default. */
  #asked() {
    const wanted = asked();
    const first = this.models.find((model) => model.default) ?? this.models[0] ?? null;
    return this.models.find((model) => path(model) === wanted) ?? first;
  }

  #follow() {
    const found = this.#asked();
    if (found === this.#chosen) return;
    this.#chosen = found;
    this.dispatchEvent(new Event("change"));
  }
}

function asked() {
  if (!location.hash.startsWith(HASH)) return null;
  try {
    return decodeURIComponent(location.hash.slice(HASH.length));
  } catch {
    return null;
  }
}

function served(values) {
  const { kind, version } = values.gateway;
  return `${values.server} behind ${kind} ${version}`;
}

async function json(url) {
  const response = await fetch(url, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${url} answered ${response.status}`);
  return response.json();
}
