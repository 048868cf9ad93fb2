// The page of `ahn serve`: what the user does. It asks no other server, and keeps its state in the browser.

import { ask, find, note, state, store, stored } from "./common.js";
import { begin, conversation, open, send } from "./conversations.js";
import { drawKept, loadDocuments, upload } from "./documents.js";

function listen() {
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = find("question").value.trim();
    if (!question || state.answering || !state.about || find("send").disabled) return;
    find("question").value = "";
    find("question").rows = 1;
    send(question);
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("ask").requestSubmit();
  });
  find("question").addEventListener("input", ({ target }) => {
    target.rows = Math.min(6, target.value.split("\n").length);
  });
  find("stop").addEventListener("click", () => state.answering?.abort());
  find("new").addEventListener("click", () => begin(state.document));
  find("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) upload(target.files[0]);
    target.value = "";
  });
  find("kept").addEventListener("toggle", () => find("kept").open && drawKept());
  find("open-library").addEventListener("click", ({ target }) => {
    target.setAttribute("aria-expanded", String(find("library").classList.toggle("open")));
  });
  listenForDrops();
  listenForSettings();
}

function listenForDrops() {
  const over = (is) => find("drop").classList.toggle("over", is);
  document.addEventListener("dragover", (event) => (event.preventDefault(), over(true)));
  document.addEventListener("dragleave", (event) => event.relatedTarget || over(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });
}

function listenForSettings() {
  const fields = find("settings").querySelectorAll("[name]");
  const settings = stored("settings", {});
  for (const field of fields) {
    if (field.name === "key") field.value = sessionStorage.getItem("ahn.key") ?? "";
    else if (settings[field.name] !== undefined) field.value = settings[field.name];
  }
  find("open-settings").addEventListener("click", () => find("settings").showModal());
  find("settings").addEventListener("close", () => {
    const values = Object.fromEntries([...fields].map((field) => [field.name, field.value]));
    const isOtherKey = values.key !== (sessionStorage.getItem("ahn.key") ?? "");
    sessionStorage.setItem("ahn.key", values.key);
    delete values.key;
    store("settings", values);
    if (isOtherKey || !state.about) start(); // else the focus would leave the button that it returns to
  });
  find("settings").addEventListener("click", (event) => event.target === find("settings") && find("settings").close());
}

async function start() {
  try {
    state.about = await (await ask("/v1/ahn")).json();
    const { model, window, anchors } = state.about;
    find("model").textContent = `${model} · window of ${window.toLocaleString("en")} tokens · ${anchors} anchors`;
    note("");
    await loadDocuments();
    conversation() ? open(state.current) : begin();
  } catch (error) {
    find("model").textContent = "not connected";
    note(error.message);
  }
}

listen();
start();
