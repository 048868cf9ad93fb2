// Documents: sending them, watching them being read, and what is kept of them.

import { ask, bytes, duration, element, find, item, note, state, store } from "./common.js";
import { begin, drawConversations, open } from "./conversations.js";

export async function loadDocuments() {
  state.documents = (await (await ask("/v1/files")).json()).data;
  for (const each of state.documents) {
    const points = (state.points[each.id] ??= []);
    if (points.at(-1)?.[0] !== each.ahn.read_tokens && each.ahn.read_tokens)
      points.push([each.ahn.read_tokens, each.ahn.cache_bytes, each.ahn.full_cache_bytes]);
  }
  if (!state.documents.some((each) => each.id === state.document)) showDocument(null);
  drawDocuments();
  drawConversations();
  drawReading();
  if (state.documents.some((each) => each.status === "uploaded")) setTimeout(watchDocuments, 400);
}

const watchDocuments = () => loadDocuments().catch((error) => note(error.message));

export async function upload(file) {
  note(`Sending ${file.name} …`);
  const form = new FormData();
  form.append("purpose", "user_data");
  form.append("file", file);
  try {
    const made = await (await ask("/v1/files", { method: "POST", body: form })).json();
    note("");
    showDocument(made.id);
    begin(made.id);
    await loadDocuments();
  } catch (error) {
    note(error.message);
  }
}

export function showDocument(id) {
  state.document = id;
  state.shownText = null;
  store("document", id);
}

function choose(id) {
  showDocument(id);
  const own = state.conversations.find((each) => each.document === id);
  own ? open(own.id) : begin(id);
}

async function removeDocument(id, name) {
  if (!confirm(`Forget ${name}?`)) return;
  await ask(`/v1/files/${id}`, { method: "DELETE" }).catch((error) => note(error.message));
  await watchDocuments();
}

function stateOf(each) {
  const { tokens, read_tokens: read, tokens_per_second: rate, seconds_left: left } = each.ahn;
  if (each.status === "error") return each.status_details;
  if (each.status === "processed") return `${tokens.toLocaleString("en")} tokens, read once`;
  if (!read) return `${tokens.toLocaleString("en")} tokens, waiting`;
  return `${Math.floor((100 * read) / tokens)} % · ${Math.round(rate)} tokens/s · ${duration(left)} left`;
}

export function drawDocuments() {
  find("documents").replaceChildren(
    ...state.documents.map((each) =>
      item(each.filename, stateOf(each), each.id === state.document, () => choose(each.id), () =>
        removeDocument(each.id, each.filename),
      ),
    ),
  );
}

export function drawReading() {
  const each = state.documents.find((one) => one.id === state.document);
  find("reading").hidden = !each;
  find("send").disabled = Boolean(each) && each.status !== "processed";
  find("question").placeholder = each?.status === "uploaded" ? "Ask once it is read" : "Ask a question";
  if (!each) return;
  find("reading-title").textContent = each.filename;
  find("reading-state").textContent = stateOf(each);
  find("reading-progress").value = each.ahn.read_tokens / each.ahn.tokens;
  find("reading-progress").hidden = each.status === "processed";
  find("size-kept").textContent = bytes(each.ahn.cache_bytes);
  find("size-full").textContent = bytes(each.ahn.full_cache_bytes);
  drawChart(each);
  find("kept").hidden = each.status !== "processed" || !state.about?.anchors;
  if (find("kept").open) drawKept();
}

function drawChart(each) {
  const last = [each.ahn.read_tokens, each.ahn.cache_bytes, each.ahn.full_cache_bytes];
  const seen = state.points[each.id]?.length > 1 ? state.points[each.id] : [growth(last, 0.02), last];
  const points = [[0, 0, 0], ...seen];
  const most = Math.max(...points.map((point) => Math.max(point[1], point[2])), 1);
  const line = (part, name) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    const place = (point) => `${(320 * point[0]) / (last[0] || 1)},${81 - (78 * point[part]) / most}`;
    made.setAttribute("points", part ? points.map(place).join(" ") : "0,83 320,83");
    made.setAttribute("class", name);
    return made;
  };
  find("chart").replaceChildren(line(0, "axis"), line(2, "full"), line(1, "kept"));
  find("chart").setAttribute(
    "aria-label",
    `After ${last[0]} tokens ${bytes(last[1])} are held; full attention would hold ${bytes(last[2])}.`,
  );
}

// Where the cache stopped growing, for a document that was read before this page was open.
function growth([tokens, held, full], least) {
  const share = Math.max(least, Math.min(1, full ? held / full : 1));
  return [tokens * share, held, full * share];
}

export async function drawKept() {
  const id = state.document;
  if (state.shownText === id) return;
  state.shownText = id;
  try {
    const [text, spans] = await Promise.all([
      ask(`/v1/files/${id}/content`).then((response) => response.text()),
      ask(`/v1/files/${id}/anchors`).then((response) => response.json()),
    ]);
    const characters = Array.from(text); // the server counts characters, not units of UTF-16
    const parts = [];
    let end = 0;
    for (const [start, stop] of spans.data) {
      parts.push(characters.slice(end, start).join(""), element("mark", {}, characters.slice(start, stop).join("")));
      end = stop;
    }
    find("kept-text").replaceChildren(...parts, characters.slice(end).join(""));
    find("kept-count").textContent = `(${spans.data.length} passages)`;
    const first = find("kept-text").querySelector("mark");
    if (first) find("kept-text").scrollTop = first.offsetTop - find("kept-text").offsetTop - 60;
  } catch (error) {
    note(error.message);
  }
}
