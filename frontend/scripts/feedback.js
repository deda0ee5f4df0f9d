/** "Wrong? Tell us": an answered picture and its right label go to a server that keeps such pictures. */

import { byId, element, write } from "./element.js";

const HERE = ["localhost", "127.0.0.1", "[::1]"];

export class Feedback {
  #picture = null;
  #catalog;

  constructor(catalog) {
    this.#catalog = catalog;
    byId("feedback").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(this.#picture);
    });
  }

  /** Offer it for the picture of the large view. */
  show(picture) {
    const who = this.#catalog.feedback;
    const open = who === "token" || (who === "here" && HERE.includes(location.hostname));
    byId("feedback").hidden = !open || picture.state !== "answered";
    byId("token-field").hidden = who !== "token";
    byId("token").required = who === "token";
    write(byId("told"), picture.told ?? "");
    if (picture === this.#picture) return;
    this.#picture = picture;
    byId("right").value = "";
    byId("labels").replaceChildren(
      ...(picture.model?.spec?.labels ?? []).map((value) => element("option", { value })),
    );
  }

  async #send(picture) {
    const headers = { "Content-Type": "application/octet-stream", "X-Label": encodeURIComponent(byId("right").value) };
    if (byId("token").value) headers.Authorization = `Bearer ${byId("token").value}`;
    let told;
    try {
      const options = { method: "POST", headers, body: picture.scaled };
      const response = await fetch(`/feedback/${picture.model.name}`, options);
      const body = await response.json();
      told = response.ok ? `Kept as ${body.label}. Thank you.` : `Not kept: ${body.message}.`;
    } catch {
      told = "Not kept: the server could not be reached.";
    }
    picture.become(picture.state, { told });
  }
}
