// What stays in this browser: settings, and conversations, one entry each so that tabs do not overwrite
// each other. What is read back is checked: an older page, or another one on this port, may have written it.

const PREFIX = "bevatron.";
const KEPT = 100;

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

/** When the browser's space is full the oldest conversations go. */
function write(name, value) {
  const text = JSON.stringify(value);
  for (let tries = 0; tries < KEPT; tries += 1) {
    try {
      localStorage.setItem(PREFIX + name, text);
      return;
    } catch {
      const oldest = conversations().filter(({ id }) => `c.${id}` !== name).at(-1);
      if (!oldest) return;
      forget(oldest.id);
    }
  }
}

const SETTINGS = { system: "", tools: "", stop: "", model: "", mode: "" };
export const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty"];
for (const name of NUMBERS) SETTINGS[name] = "";

/** Texts as typed; empty is the server's default. */
export function settings() {
  const kept = read("settings") ?? {};
  return Object.fromEntries(Object.entries(SETTINGS).map(([k, v]) => [k, typeof kept[k] === "string" ? kept[k] : v]));
}

export const keepSettings = (values) => write("settings", values);

const text = (value) => (typeof value === "string" ? value : "");
const list = (value) => (Array.isArray(value) ? value : []);

function checkedAnswer(a) {
  const calls = list(a?.calls).map((c) => ({ id: text(c?.id), name: text(c?.name), arguments: text(c?.arguments) }));
  const stats = typeof a?.stats === "object" && a.stats ? a.stats : {};
  return { content: text(a?.content), reasoning: text(a?.reasoning), calls, stats, finish: text(a?.finish), error: null };
}

function checkedMessage(m) {
  if (m?.role === "user") return { role: "user", content: text(m.content) };
  if (m?.role === "tool") return { role: "tool", content: text(m.content), call: text(m.call), name: text(m.name) };
  if (m?.role !== "assistant" || !list(m.answers).length) return null;
  const answers = m.answers.map(checkedAnswer);
  return { role: "assistant", answers, shown: Math.min(Math.max(m.shown | 0, 0), answers.length - 1) };
}

export function fresh() {
  const [a, b] = crypto.getRandomValues(new Uint32Array(2));
  return { id: a.toString(36) + b.toString(36), changed: 0, messages: [] };
}

export function load(id) {
  const kept = read(`c.${id}`);
  if (!kept) return null;
  const messages = list(kept.messages).map(checkedMessage).filter(Boolean);
  return { id, changed: Number(kept.changed) || 0, messages };
}

export function save(conversation) {
  if (!conversation.messages.length) return forget(conversation.id);
  const { changed, messages } = conversation;
  write(`c.${conversation.id}`, { changed, title: title(messages), messages });
  write("last", conversation.id);
  for (const { id } of conversations().slice(KEPT)) forget(id);
}

export const forget = (id) => localStorage.removeItem(`${PREFIX}c.${id}`);
export const last = () => load(text(read("last")));
export const leave = () => localStorage.removeItem(`${PREFIX}last`);

/** [{id, title, changed}], the newest first. */
export function conversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i += 1) {
    const name = localStorage.key(i);
    if (!name.startsWith(`${PREFIX}c.`)) continue;
    const kept = read(name.slice(PREFIX.length));
    found.push({ id: name.slice(PREFIX.length + 2), title: text(kept?.title), changed: Number(kept?.changed) || 0 });
  }
  return found.sort((a, b) => b.changed - a.changed);
}

function title(messages) {
  const first = messages.find((m) => m.role === "user")?.content ?? "";
  return first.trim().replace(/\s+/g, " ").slice(0, 80) || "Conversation";
}
