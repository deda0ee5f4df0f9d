/** The camera: a dialog with a preview and a shutter; its tracks end with the dialog. */

import { byId, write } from "./element.js";

const TROUBLES = {
  NotAllowedError: "The browser may not use the camera; allow it beside the page's address, or choose a file.",
  NotFoundError: "No camera was found; connect one, or choose a file.",
  NotReadableError: "The camera is in use by another program; close that, or choose a file.",
};
const GONE = "The camera was disconnected; connect it, close this and open it again, or choose a file.";
const INSECURE = "Browsers lend the camera only to https pages and to this machine itself; choose a file instead.";

const other = (why) => `The camera gave no picture (${why}); choose a file.`;
const end = (stream) => stream.getTracks().forEach((track) => track.stop());

export class Camera {
  #dialog = byId("camera");
  #video = byId("viewfinder");
  /** A new object for each opening of the dialog, null while it is closed. */
  #opening = null;
  #stream = null;
  #taken = 0;

  /** It calls `add` with a File for each picture, and `fallback` when the user prefers to choose a file. */
  constructor(add, fallback) {
    this.add = add;
    byId("shutter").addEventListener("click", () => this.#shoot());
    byId("camera-close").addEventListener("click", () => this.#dialog.close());
    byId("camera-file").addEventListener("click", () => {
      this.#dialog.close();
      fallback();
    });
    this.#dialog.addEventListener("close", () => this.#stop());
    this.#video.addEventListener("loadeddata", () => (byId("shutter").disabled = !this.#stream));
  }

  async open() {
    this.#trouble("");
    this.#dialog.showModal();
    if (!navigator.mediaDevices) {
      this.#trouble(INSECURE);
      return;
    }
    const opening = (this.#opening = Symbol());
    try {
      const video = { facingMode: "environment", width: { ideal: 1920 } };
      const stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
      // The dialog may have been closed, and even opened again, while the browser asked for permission.
      if (opening === this.#opening) this.#show(stream);
      else end(stream);
    } catch (error) {
      if (opening === this.#opening) this.#trouble(TROUBLES[error.name] ?? other(error.message || error.name));
    }
  }

  #show(stream) {
    this.#video.srcObject = this.#stream = stream;
    stream.getVideoTracks()[0].addEventListener("ended", () => this.#trouble(GONE));
  }

  async #shoot() {
    byId("shutter").disabled = true;
    const { videoWidth: width, videoHeight: height } = this.#video;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(this.#video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    if (!blob) {
      this.#trouble(other("the browser made no JPEG"));
      return;
    }
    this.#taken += 1;
    this.#dialog.close();
    this.add(new File([blob], `camera-${this.#taken}.jpg`, { type: "image/jpeg" }));
  }

  #stop() {
    if (this.#stream) end(this.#stream);
    this.#opening = this.#stream = this.#video.srcObject = null;
    byId("shutter").disabled = true;
  }

  #trouble(sentence) {
    write(byId("camera-trouble"), sentence);
    byId("camera-trouble").hidden = !sentence;
    this.#video.hidden = byId("shutter").hidden = Boolean(sentence);
    byId("camera-file").hidden = !sentence;
    if (!sentence) return;
    this.#stop();
    // The focus may have been on the shutter.
    byId("camera-file").focus();
  }
}
