/** An answer: labels with scores, a caption, or the server's sentence, the batch it was in, and where the time went. */

export const DETAILED = "application/vnd.beeline+json";
/** A best score under this is shown as a guess, unless the model's card names the score. */
const NOT_SURE_UNDER = 0.6;
const SERVER_STAGES = ["queue", "decode", "forward", "encode"];
export const STAGES = [...SERVER_STAGES, "network"];

export const percent = (score) => `${Number((score * 100).toFixed(1))} %`;

/** Read a response with its body's text, `total` milliseconds after the picture was sent. */
export function read(response, text, total) {
  const body = parse(text);
  const predictions = response.ok ? scores(body) : null;
  return {
    status: response.status,
    predictions,
    message: predictions ? "" : sentence(response, body, text),
    warning: body?.warning ?? "",
    retryAfter: Number(response.headers.get("Retry-After")) || 1,
    ...measured(response.headers, total),
  };
}

/** The score of a model's spec under which its best label is a guess; 60 % where it names none, 0 for a caption. */
export const notSureUnder = (spec) => spec?.not_sure_under ?? (spec?.task === "caption" ? 0 : NOT_SURE_UNDER);

/** Whether the best score of a picture's answer leaves no doubt. */
export const sure = ({ answer, model }) => answer.predictions[0].score >= notSureUnder(model?.spec);

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function scores(body) {
  if (typeof body?.caption === "string") return [{ label: body.caption, score: Number(body.score) }];
  const listed = body?.predictions ?? Object.entries(body ?? {}).map(([label, score]) => ({ label, score }));
  const fits = Array.isArray(listed) && listed.length && listed.every((one) => Number.isFinite(one?.score));
  if (!fits) return null;
  // Keys that are numbers come in ascending order, whatever order the server sent.
  return listed.map(({ label, score }) => ({ label: String(label), score })).sort((one, other) => other.score - one.score);
}

function sentence(response, body, text) {
  if (body?.message) return String(body.message);
  if (!text && response.ok) return "the server's answer is empty";
  if (response.ok) return `the answer is in a form that this page does not know: ${text.slice(0, 120)}`;
  return `the server answered ${response.status} without a sentence`;
}

function measured(headers, total) {
  const spans = {};
  for (const [, name, duration] of (headers.get("Server-Timing") ?? "").matchAll(/([\w-]+);dur=([\d.]+)/g)) {
    if (SERVER_STAGES.includes(name)) spans[name] = Number(duration);
  }
  const size = Number(headers.get("X-Batch-Size")) || 0;
  const known = Object.values(spans).reduce((sum, span) => sum + span, 0);
  // All answers of a batch have the same three times, to a hundredth of a millisecond.
  const key = size ? [size, spans.decode, spans.forward, spans.encode].join(" ") : "";
  return { total, size, key, spans: size ? { ...spans, network: Math.max(0, total - known) } : null };
}
