// Elements are only ever made here and in inline.js, and text only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (functions become listeners of the event) and children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

export const $ = (id) => document.getElementById(id);

/** One of the symbols at the end of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, click, attributes = {}) {
  return el("button", { type: "button", class: "icon", title: label, "aria-label": label, click, ...attributes },
    icon(name));
}

/** The clipboard's interface is missing on plain http from another machine: select and copy then. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "unseen", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser does not let this page copy");
}

/** A button that copies what `read` gives and says that it did. */
export function copyButton(read, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    let done = "Copied";
    try {
      await copy(read());
    } catch {
      done = "Not copied";
    }
    button.replaceChildren(icon(done === "Copied" ? "check" : "alert"));
    button.title = done;
    announce(done);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = label;
    }, 1500);
  });
  return button;
}

/** Say something to a screen reader. */
export function announce(text) {
  $("live").textContent = text;
}

export const count = (n) => n.toLocaleString("en-US");
export const tokens = (n) => `${count(n)} ${n === 1 ? "token" : "tokens"}`;
