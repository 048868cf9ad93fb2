// Conversations: their messages, and answers as they are written.

import { ask, element, find, item, note, state, store, stored } from "./common.js";
import { drawDocuments, drawReading, showDocument } from "./documents.js";

export function conversation() {
  return state.conversations.find((each) => each.id === state.current);
}

function saveConversations() {
  store("conversations", state.conversations.slice(0, 200));
  store("current", state.current);
}

export function begin(documentId = null) {
  const made = { id: crypto.randomUUID?.() ?? String(Math.random()), document: documentId, messages: [] };
  state.conversations = [made, ...state.conversations.filter((each) => each.messages.length)];
  open(made.id);
}

export function open(id) {
  state.answering?.abort();
  state.current = id;
  showDocument(conversation()?.document ?? null);
  saveConversations();
  drawConversations();
  drawMessages();
  drawDocuments();
  drawReading();
  closeLibrary();
  find("question").focus();
}

function removeConversation(id) {
  state.conversations = state.conversations.filter((each) => each.id !== id);
  saveConversations();
  if (state.current !== id) drawConversations();
  else state.conversations.length ? open(state.conversations[0].id) : begin();
}

export function drawConversations() {
  find("conversations").replaceChildren(
    ...state.conversations.map((each) => {
      const name = each.messages[0]?.content.slice(0, 60) ?? "New conversation";
      const about = state.documents.find((one) => one.id === each.document)?.filename ?? "without a document";
      return item(name, about, each.id === state.current, () => open(each.id), () => removeConversation(each.id));
    }),
  );
}

function drawMessages() {
  const messages = conversation()?.messages ?? [];
  const hint = state.document ? "Ask about this document." : "Ask something, or drop a document to ask about it.";
  find("messages").replaceChildren(
    ...(messages.length ? messages.map(bubble) : [element("p", { class: "empty" }, hint)]),
  );
  find("messages").scrollTop = find("messages").scrollHeight;
}

function bubble(message) {
  const who = { user: "You", assistant: "Answer", error: "Error" }[message.role];
  return element("div", { class: `message ${message.role}`, "aria-label": who }, message.content);
}

// Answers

export async function send(question) {
  const talk = conversation();
  talk.messages = talk.messages.filter((each) => each.role !== "error");
  talk.messages.push({ role: "user", content: question });
  const answer = { role: "assistant", content: "" };
  drawMessages();
  drawConversations();
  const place = bubble(answer);
  find("messages").append(place);
  busy((state.answering = new AbortController()));
  const started = performance.now();
  let first = 0;
  let usage = null;
  try {
    for await (const event of events(body(talk), state.answering.signal)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const words = event.choices[0]?.delta.content;
      if (!words) continue;
      first ||= performance.now();
      answer.content += words;
      place.append(words);
      find("messages").scrollTop = find("messages").scrollHeight;
    }
    note(usage ? told(usage, started, first) : "");
  } catch (error) {
    if (error.name !== "AbortError") talk.messages.push({ role: "error", content: error.message });
  }
  if (answer.content) talk.messages.push(answer);
  busy((state.answering = null));
  saveConversations();
  if (talk === conversation()) drawMessages();
}

function body(talk) {
  const settings = stored("settings", {});
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  return {
    model: state.about.model,
    messages: [...system, ...talk.messages.filter((each) => each.role !== "error")],
    max_tokens: Number(settings.max_tokens ?? 256),
    temperature: Number(settings.temperature ?? 0),
    top_p: Number(settings.top_p ?? 1),
    stream: true,
    stream_options: { include_usage: true },
    ahn: { document: talk.document },
  };
}

async function* events(request, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (waiting + part.value).split("\n");
    waiting = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function told(usage, started, first) {
  const cached = usage.prompt_tokens_details.cached_tokens.toLocaleString("en");
  const rate = usage.completion_tokens / Math.max(0.001, (performance.now() - first) / 1000);
  const wait = ((first - started) / 1000).toFixed(1);
  return `${cached} of ${usage.prompt_tokens.toLocaleString("en")} tokens read before · first word after ${wait} s · ${rate.toFixed(0)} tokens/s`;
}

function busy(controller) {
  find("send").hidden = Boolean(controller);
  find("stop").hidden = !controller;
}

function closeLibrary() {
  find("library").classList.remove("open");
  find("open-library").setAttribute("aria-expanded", "false");
}
