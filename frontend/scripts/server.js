/** The server: whether it starts, is ready, busy or away, asked with /ping while the page is visible. */

const EVERY = 4_000;
const LONGEST_PAUSE = 15_000;
const PATIENCE = 8_000;

export class Server extends EventTarget {
  #base = "checking";
  #reason = "";
  #failures = 0;
  #busy = 0;
  #timer = 0;
  #asking = false;
  /** By NAME/VERSION, why a model did not start. */
  failed = {};

  /** `full` returns whether all connections are in use: then a ping would wait behind the pictures and prove nothing. */
  constructor(full) {
    super();
    this.full = full;
    document.addEventListener("visibilitychange", () => this.#next(0));
    window.addEventListener("online", () => this.#next(0));
    this.#next(0);
  }

  /** One of checking, starting, ready, busy, down. */
  get state() {
    return this.#base === "ready" && this.#busy ? "busy" : this.#base;
  }

  /** Whether pictures may be sent now. */
  get open() {
    return this.#base === "ready";
  }

  /** One sentence for people. */
  get sentence() {
    return {
      checking: "Asking the server …",
      starting: `Not ready: ${this.#reason}`,
      ready: `Ready${this.#reason}`,
      busy: "Busy: pictures that were turned away are sent again",
      down: "Not reachable: pictures wait until it is back",
    }[this.state];
  }

  /** A picture was answered, with whatever status. */
  answered() {
    this.#failures = 0;
    if (this.#base !== "ready") this.#become("ready", "");
  }

  /** The server answered that it is not ready. */
  unready(reason, seconds) {
    this.#become("starting", reason);
    this.#next(seconds * 1000);
  }

  /** A request got no answer. */
  lost() {
    this.#failures += 1;
    this.#become("down", "");
    this.#next(Math.min(LONGEST_PAUSE, 500 * 2 ** this.#failures) * (0.75 + Math.random() / 2));
  }

  /** Be busy while `wait` lasts. */
  async busyWhile(wait) {
    this.#busy += 1;
    this.#changed();
    await wait;
    this.#busy -= 1;
    this.#changed();
  }

  #next(pause) {
    clearTimeout(this.#timer);
    if (document.visibilityState === "visible") this.#timer = setTimeout(() => this.#ping(), pause);
  }

  async #ping() {
    if (this.#asking) return;
    if (this.full() && this.#base === "ready") {
      this.#next(EVERY);
      return;
    }
    this.#asking = true;
    try {
      const response = await fetch("/ping", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
      const body = await response.json();
      this.#failures = 0;
      this.failed = body.failed ?? {};
      if (response.ok) this.#become("ready", workers(body.models) + missing(this.failed));
      else this.#become("starting", body.reason ?? body.message ?? `it answers ${response.status}`);
      this.#next(EVERY);
    } catch {
      this.lost();
    } finally {
      this.#asking = false;
    }
  }

  #become(base, reason) {
    const same = this.#base === base && (this.#reason === reason || (base === "ready" && !reason));
    if (same) return;
    this.#base = base;
    this.#reason = reason;
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

function workers(models = {}) {
  const all = Object.values(models).flatMap((versions) => Object.values(versions));
  const ready = all.reduce((sum, version) => sum + (version.ready ?? 0), 0);
  return ready ? `, ${ready} ${ready === 1 ? "worker" : "workers"}` : "";
}

function missing(failed) {
  const names = Object.keys(failed).map((name) => name.replace("/", " "));
  return names.length ? `; not served: ${names.join(", ")}` : "";
}
