"use strict";
// Values under the pointer, one cursor for all charts, runs switched on and off by their names.
const NS = document.createElementNS.bind(document, document.body.querySelector("svg")?.namespaceURI);
const charts = [...document.querySelectorAll(".chart[data-frame]")].map((figure) => {
  const [left, right, top, bottom, x0, x1] = JSON.parse(figure.dataset.frame);
  const svg = figure.querySelector("svg");
  const cursor = NS("line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  cursor.style.display = "none";
  svg.append(cursor);
  const curves = JSON.parse(figure.querySelector("script").textContent);
  const events = JSON.parse(figure.dataset.events);
  return { figure, svg, cursor, curves, events, left, right, x0, x1 };
});
const tip = document.createElement("div");
tip.className = "tip";
const off = new Set();

function nearest(xs, x) {
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] > x) b = m; else a = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
}
function shown(v) {
  const n = Math.abs(v);
  if (n >= 1e5) return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 }).format(v);
  return n && n < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(5));
}
function at(step, axis) {
  for (const c of charts) {
    const inside = step !== null && c.figure.dataset.axis === axis && step >= c.x0 && step <= c.x1;
    c.cursor.style.display = inside ? "" : "none";
    if (!inside) continue;
    const x = c.left + (step - c.x0) / (c.x1 - c.x0) * (c.right - c.left);
    c.cursor.setAttribute("x1", x);
    c.cursor.setAttribute("x2", x);
  }
}
for (const c of charts) {
  c.svg.addEventListener("pointermove", (event) => {
    const box = c.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * c.svg.viewBox.baseVal.width;
    const step = c.x0 + (x - c.left) / (c.right - c.left) * (c.x1 - c.x0);
    if (step < c.x0 || step > c.x1) { at(null); tip.remove(); return; }
    tip.replaceChildren();
    let first = null;
    for (const curve of c.curves.filter((k) => !off.has(String(k.run)))) {
      const i = nearest(curve.x, step);
      first ??= curve.x[i];
      const row = document.createElement("div"), name = document.createElement("i");
      name.className = curve.colour;
      name.textContent = curve.label + "  ";
      const value = document.createElement("b");
      value.textContent = shown(curve.y[i]);
      row.append(name, value);
      if (curve.mean) row.append("  smoothed " + shown(curve.mean[i]));
      if (curve.x[i] !== first) row.append("  at " + curve.x[i].toLocaleString("en"));
      tip.append(row);
    }
    if (first === null) return;
    const near = 6 / (c.right - c.left) * (c.x1 - c.x0);
    for (const [run, at, text] of c.events) {
      if (off.has(String(run)) || Math.abs(at - step) > near) continue;
      const row = document.createElement("div");
      row.className = "event";
      row.textContent = text;
      tip.append(row);
    }
    const head = document.createElement("div");
    head.textContent = c.figure.dataset.axis + " " + first.toLocaleString("en");
    tip.prepend(head);
    at(first, c.figure.dataset.axis);
    c.figure.append(tip);
    const room = c.figure.getBoundingClientRect();
    const right = event.clientX - room.left > room.width / 2;
    tip.style.left = right ? "" : event.clientX - room.left + 16 + "px";
    tip.style.right = right ? room.right - event.clientX + 16 + "px" : "";
    tip.style.top = Math.max(30, event.clientY - room.top - 20) + "px";
  });
  c.svg.addEventListener("pointerleave", () => { at(null); tip.remove(); });
}
for (const key of document.querySelectorAll(".key[data-run]")) {
  if (new Set([...document.querySelectorAll(".key")].map((k) => k.dataset.run)).size < 2) break;
  key.style.cursor = "pointer";
  key.addEventListener("click", () => {
    const run = key.dataset.run;
    if (!off.delete(run)) off.add(run);
    for (const part of document.querySelectorAll(`[data-run="${CSS.escape(run)}"]`)) {
      part.classList.toggle("off", off.has(run));
    }
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
