// What all parts of the page share: its state, requests to the server, and small pieces of it.

export const find = (id) => document.getElementById(id);
export const store = (key, value) => localStorage.setItem(`ahn.${key}`, JSON.stringify(value));
export const stored = (key, otherwise) => JSON.parse(localStorage.getItem(`ahn.${key}`) ?? "null") ?? otherwise;

export const state = {
  about: null,
  documents: [],
  conversations: stored("conversations", []),
  current: stored("current", null), // id of the conversation
  document: stored("document", null), // id of the document that is shown
  points: {}, // of each document: [tokens, bytes held, bytes of full attention] while it was read
  shownText: null,
  answering: null, // what stops the answer that is being written
};

export async function ask(path, options = {}) {
  const key = sessionStorage.getItem("ahn.key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
}

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) [count, unit] = [count / 1000, unit + 1];
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  return seconds < 3600 ? `${Math.ceil(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export function note(text) {
  find("note").textContent = text;
}

export function item(name, about, isCurrent, onChoose, onRemove) {
  const label = element("button", { class: "name", type: "button", "aria-current": isCurrent, onclick: onChoose });
  label.append(element("span", {}, name), element("small", {}, about));
  const remove = element("button", { class: "remove", type: "button", "aria-label": `Remove ${name}`, onclick: onRemove }, "×");
  return element("li", { class: isCurrent ? "current" : "" }, label, remove);
}
