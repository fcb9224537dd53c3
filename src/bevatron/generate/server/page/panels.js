// What opens beside the conversation: settings, earlier conversations, the API key; and the theme.

import { $, announce, el, icon, iconButton } from "./dom.js";
import { key } from "./api.js";
import * as store from "./store.js";

const wide = matchMedia("(min-width: 1000px)");

/** Settings stand beside the conversation where there is room, otherwise over it. */
function toggle(dialog, modal) {
  if (dialog.open) return dialog.close();
  if (modal) dialog.showModal();
  else dialog.show();
  dialog.dataset.modal = modal ? "yes" : "no";
}

function closable(dialog) {
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
  // A press beside a modal dialog lands on the dialog itself.
  dialog.addEventListener("pointerdown", (event) => {
    const box = dialog.getBoundingClientRect();
    const outside = event.clientX < box.left || event.clientX > box.right || event.clientY < box.top || event.clientY > box.bottom;
    if (event.target === dialog && outside) dialog.close();
  });
}

/** `changed` is called after every change with the settings. */
export function settingsPanel(values, changed, conversationAsJson, copied) {
  const dialog = $("settings");
  const form = $("settings-form");
  const show = () => {
    for (const [name, value] of Object.entries(values)) if (form.elements[name]) form.elements[name].value = value;
    check();
  };
  const check = () => {
    const problem = toolsProblem(values.tools);
    form.elements.tools.setCustomValidity(problem);
    $("tools-problem").textContent = problem;
  };
  closable(dialog);
  $("open-settings").addEventListener("click", () => toggle(dialog, !wide.matches));
  dialog.addEventListener("close", () => {
    document.body.classList.remove("beside");
    $("open-settings").setAttribute("aria-expanded", "false");
  });
  new MutationObserver(() => {
    document.body.classList.toggle("beside", dialog.open && dialog.dataset.modal === "no");
    $("open-settings").setAttribute("aria-expanded", String(dialog.open));
  }).observe(dialog, { attributes: true });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    // A number field gives "" for what is no number; then it must not look like the default.
    if (target.name in values) values[target.name] = target.validity.badInput ? "NaN" : target.value;
    check();
    store.keepSettings(values);
    changed();
  });
  $("defaults").addEventListener("click", () => {
    for (const name of [...store.NUMBERS, "stop"]) values[name] = "";
    form.querySelectorAll("input[type=number]").forEach((input) => (input.value = ""));
    show();
    store.keepSettings(values);
    changed();
  });
  $("copy-json").addEventListener("click", async () => {
    await copied(conversationAsJson());
    announce("Copied");
  });
  show();
  return {
    show,
    open: (name) => {
      if (!dialog.open) toggle(dialog, !wide.matches);
      form.elements[name]?.focus();
    },
    /** Whether all that is written there can be sent; otherwise shows what cannot. */
    valid: () => {
      if (form.checkValidity()) return true;
      const field = form.querySelector("input:invalid, textarea:invalid");
      $("tools-field").open ||= field.name === "tools";
      if (!dialog.open) toggle(dialog, !wide.matches);
      field.reportValidity();
      return false;
    },
  };
}

function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) && tools.every((t) => t && typeof t === "object") ? "" : "This must be a list of objects: [{…}]";
  } catch (error) {
    return `This is no JSON: ${error.message}`;
  }
}

const STEPS = [[60, "minute"], [60, "hour"], [24, "day"], [7, "week"], [4.35, "month"], [12, "year"]];
function ago(time) {
  let amount = (Date.now() - time) / 1000;
  let unit = "second";
  for (const [size, larger] of STEPS) {
    if (amount < size) break;
    amount /= size;
    unit = larger;
  }
  if (unit === "second") return "now";
  return new Intl.RelativeTimeFormat("en", { numeric: "auto" }).format(-Math.floor(amount), unit);
}

/** `act`: {open(id), forgotten(id)}; `current()` is the id of the conversation on the page. */
export function historyPanel(current, act) {
  const dialog = $("history");
  closable(dialog);
  const draw = () => {
    const entries = store.conversations().map(({ id, title, changed }) => {
      const open = el("button", { type: "button", class: "entry", "aria-current": id === current() && "true",
        click: () => { dialog.close(); act.open(id); } }, el("span", {}, title), el("small", {}, ago(changed)));
      const remove = iconButton("bin", `Delete “${title}”`, () => {
        store.forget(id);
        act.forgotten(id);
        draw();
        (dialog.querySelector(".entry") ?? dialog.querySelector("[data-close]")).focus();
      });
      return el("li", {}, open, remove);
    });
    $("conversations").replaceChildren(...entries);
    if (!entries.length) $("conversations").append(el("li", { class: "note" }, "None yet."));
  };
  $("open-history").addEventListener("click", () => {
    draw();
    toggle(dialog, true);
  });
}

/** Asks for the key; resolves to whether one was given. */
export function askKey(message) {
  const dialog = $("key");
  $("key-text").textContent = message;
  $("key-input").value = key.get();
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  $("key-input").select();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true }));
}

export function keyPanel() {
  closable($("key"));
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key-input").value.trim());
    $("key").close("given");
  });
}

const THEMES = { auto: "automatic", light: "light", dark: "dark" };
export function themeSwitch() {
  const names = Object.keys(THEMES);
  const root = document.documentElement;
  const show = () => {
    const now = root.dataset.theme ?? "auto";
    $("theme").replaceChildren(icon(now));
    $("theme").title = `Theme: ${THEMES[now]}`;
    $("theme").setAttribute("aria-label", $("theme").title);
  };
  $("theme").addEventListener("click", () => {
    const next = names[(names.indexOf(root.dataset.theme ?? "auto") + 1) % names.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    localStorage.setItem("bevatron.theme", next);
    show();
    announce($("theme").title);
  });
  show();
}
