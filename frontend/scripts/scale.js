/** Scaling: a picture over the server's limits becomes a JPEG that fits, unless decoding it would harm the tab. */

/** Decoding takes four bytes a pixel. */
const MOST_DECODED_PIXELS = 200e6;
/** Far more than any classifier uses; larger canvases only cost memory. */
const TARGET_PIXELS = 12e6;
const LONGEST_SIDE = 16_384;
const QUALITY = 0.92;

let last = Promise.resolve();

/**
 * Return {body, note}: the file itself where it fits, else a scaled JPEG and a note on the change.
 * `size` is {width, height}, or null where the browser cannot show the file.
 * Throws an Error with a sentence when it neither fits nor can be scaled, and the reason of an aborted `signal`.
 */
export async function fit(file, size, limits, signal) {
  signal.throwIfAborted();
  const pixels = size ? size.width * size.height : 0;
  if (file.size <= limits.bytes && pixels <= limits.pixels) return { body: file, note: "" };
  if (!size) return unchanged(file, limits, "this browser cannot read it as a picture");
  if (pixels > MOST_DECODED_PIXELS) {
    const most = `${megapixels(pixels)} are more than a browser should decode (${megapixels(MOST_DECODED_PIXELS)})`;
    return unchanged(file, limits, most);
  }
  // One after the other: each holds a whole decoded picture.
  const scaled = last.then(() => shrink(file, size, limits, signal));
  last = scaled.catch(() => {});
  try {
    return await scaled;
  } catch {
    signal.throwIfAborted();
    return unchanged(file, limits, "this browser cannot decode it");
  }
}

const megapixels = (count) => `${Number((count / 1e6).toFixed(1))} megapixels`;
const megabytes = (count) => `${Number((count / 1e6).toFixed(1))} MB`;
const limitText = (limits) => `the server's limit of ${megabytes(limits.bytes)} / ${megapixels(limits.pixels)}`;

function unchanged(file, limits, why) {
  if (file.size > limits.bytes) {
    throw new Error(
      `the file has ${megabytes(file.size)}, over ${limitText(limits)}, and was not scaled: ${why}; send a smaller one`,
    );
  }
  return { body: file, note: `sent as it is: ${why}` };
}

async function shrink(file, { width, height }, limits, signal) {
  const most = Math.min(limits.pixels, TARGET_PIXELS);
  let factor = Math.min(1, Math.sqrt(most / (width * height)), LONGEST_SIDE / Math.max(width, height));
  for (let attempt = 0; attempt < 6; attempt += 1) {
    const target = { width: Math.max(1, Math.floor(width * factor)), height: Math.max(1, Math.floor(height * factor)) };
    signal.throwIfAborted();
    const body = await jpeg(file, target);
    signal.throwIfAborted();
    if (body.size <= limits.bytes) {
      const from = `${width} x ${height} to ${target.width} x ${target.height}`;
      const what = factor < 1 ? `scaled from ${from}` : `saved again as JPEG, ${megabytes(body.size)}`;
      return { body, note: `${what} to fit ${limitText(limits)}` };
    }
    factor *= Math.min(0.9, Math.sqrt(limits.bytes / body.size) * 0.95);
  }
  throw new Error("no size fits");
}

async function jpeg(file, { width, height }) {
  const options = { resizeWidth: width, resizeHeight: height, resizeQuality: "high", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(file, options);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  // Transparent pictures get a white ground, as on the server.
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
  // Frees the memory at once.
  canvas.width = canvas.height = 0;
  if (!blob) throw new Error("no JPEG was made");
  return blob;
}
