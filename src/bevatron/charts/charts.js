"use strict";
// Draws every figure of the page with ECharts, from the data beside it. All text goes in as text.
const figures = [...document.querySelectorAll("figure[data-chart]")].map((figure) => ({
  figure,
  kind: figure.dataset.kind,
  title: figure.querySelector("b").textContent,
  shown: JSON.parse(figure.dataset.chart),
  data: JSON.parse(figure.querySelector("script").textContent),
}));
const off = new Set();  // runs that are switched off

const tone = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue("--" + (name === "rest" ? "faint" : name)).trim();

function short(v) {
  if (typeof v !== "number") return v;  // a category
  const n = Math.abs(v);
  if (n >= 1e5) return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 }).format(v);
  return n && n < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(5));
}

// --- what is under the pointer

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}
function nearest(xs, x) {
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] > x) b = m; else a = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
}
function under(f, x) {
  const box = element("div", "", "tip");
  const visible = f.data.filter((c) => !off.has(c.run));
  if (!visible.length) return box;
  const first = visible[0].x[nearest(visible[0].x, x)];
  box.append(element("div", `${f.shown.axis} ${first.toLocaleString("en")}`));
  for (const c of visible) {
    const i = nearest(c.x, first), row = element("div", "");
    row.append(element("i", c.label + "  ", c.colour), element("b", String(c.y[i]) + f.shown.unit));
    if (c.mean) row.append("  smoothed " + short(c.mean[i]));
    if (c.x[i] !== first) row.append("  at " + c.x[i].toLocaleString("en"));
    box.append(row);
  }
  const pixel = (at) => f.chart.convertToPixel({ xAxisIndex: 0 }, at);
  for (const [run, at, text] of f.shown.marks) {
    if (!off.has(run) && Math.abs(pixel(at) - pixel(first)) < 7) box.append(element("div", text, "event"));
  }
  return box;
}

// --- what is drawn

const axes = () => ({
  nameTextStyle: { color: tone("soft"), align: "left" },
  axisLabel: { color: tone("faint"), formatter: short, hideOverlap: true },
  axisLine: { show: false }, axisTick: { show: false },
  splitLine: { lineStyle: { color: tone("grid") } },
});
const below = (name) => ({ name, nameLocation: "middle", nameGap: 26,
  nameTextStyle: { color: tone("soft"), align: "center" } });

function lines(c, f) {
  const color = tone(c.colour), name = "run " + c.run, at = (ys) => c.x.map((x, i) => [x, ys[i]]);
  const one = { name, color, silent: true, animation: false, showSymbol: c.x.length === 1 };
  if (c.style === "bars") {
    return [{ ...one, type: "bar", silent: false, barCategoryGap: "24%", data: c.y.map((value, i) =>
      ({ value, name: c.names?.[i] ?? "", itemStyle: { color: c.marked?.includes(i) ? tone("bad") : color } })) }];
  }
  if (c.style === "points") {
    return [{ ...one, type: "scatter", silent: false, symbolSize: 9,
      data: c.x.map((x, i) => ({ value: [x, c.y[i]], name: c.names?.[i] ?? "" })) }];
  }
  if (c.style === "dots") {
    return [{ ...one, type: "line", showSymbol: c.x.length <= 200, symbol: "circle", symbolSize: 5,
      lineStyle: { type: "dotted", width: 1.3 }, data: at(c.y) }];
  }
  const raw = { ...one, type: "line", lineStyle: { width: c.mean ? 1 : 1.7, opacity: c.mean ? 0.28 : 1 }, data: at(c.y) };
  return c.mean ? [raw, { ...one, type: "line", lineStyle: { width: 1.7 }, data: at(c.mean) }] : [raw];
}
function marks(f) {
  const seen = f.shown.marks.filter(([run]) => !off.has(run));
  const data = seen.map(([run, xAxis, , bad, own]) => {
    const color = tone(bad ? "bad" : own ? "c" + (run % 6) : "faint");
    return { xAxis, lineStyle: { color, type: "dotted" }, itemStyle: { color } };
  });
  return { type: "line", name: "events", data: [], silent: true,
    markLine: { silent: true, animation: false, symbol: ["none", "pin"], symbolSize: 9, label: { show: false }, data } };
}
function curves(f) {
  const bars = f.data.some((c) => c.style === "bars"), points = f.data.every((c) => c.style === "points");
  const log = f.log ?? f.shown.log;
  const y = { ...axes(), name: f.shown.value, nameLocation: "end", type: log ? "log" : "value", scale: true };
  if (!log && f.shown.bottom !== undefined) y.min = f.shown.bottom;
  if (f.shown.top !== undefined) y.max = f.shown.top;
  const x = { ...axes(), ...below(f.shown.axis), splitLine: { show: false }, minInterval: 1, scale: true };
  const ends = points ? { boundaryGap: ["6%", "6%"] } : { min: "dataMin", max: "dataMax" };
  if (points) y.boundaryGap = ["6%", "6%"];
  return {
    grid: { left: 8, right: 16, top: 46, bottom: 26, containLabel: true },
    xAxis: bars ? { ...x, type: "category", data: f.data[0].x.map(String) } : { ...x, type: "value", ...ends },
    yAxis: y,
    series: [...f.data.flatMap((c) => lines(c, f)), marks(f)],
    legend: { show: false, selected: Object.fromEntries([...off].map((run) => ["run " + run, false])) },
    tooltip: bars || points
      ? { trigger: "item", formatter: (p) => element("div", p.data.name || short(p.value), "tip") }
      : { trigger: "axis", axisPointer: { type: "line", lineStyle: { color: tone("faint") }, snap: true },
          formatter: (p) => under(f, p[0].axisValue) },
  };
}
function heat(f) {
  const columns = 1 + Math.max(...f.data.map((d) => d[0])), numbers = columns <= 48;
  return {
    grid: { left: 8, right: 16, top: 30, bottom: 60, containLabel: true },
    xAxis: { ...axes(), ...below(f.shown.axis), nameGap: 8, type: "category", axisLabel: { show: false },
      data: [...Array(columns).keys()] },
    yAxis: { ...axes(), name: "layer", type: "category", inverse: true, data: f.shown.rows, splitLine: { show: false } },
    visualMap: { min: 0, max: 1, right: 10, bottom: 0, orient: "horizontal", itemHeight: 90, itemWidth: 10, dimension: 2,
      text: ["the highest of its layer", "0"], textStyle: { color: tone("faint") }, inRange: { color: [tone("card"), tone("c0")] } },
    series: [{ type: "heatmap", animation: false, itemStyle: { borderColor: tone("card"), borderWidth: 1 },
      label: { show: numbers, fontSize: 9, color: tone("ink"), formatter: (p) => /\d+$/.exec(p.data[4])?.[0] ?? "" },
      data: f.data }],
    tooltip: { formatter: (p) => element("div", `layer ${f.shown.rows[p.data[1]]}, ${p.data[4]}: ${p.data[3]}`, "tip") },
  };
}
function ranks(f) {
  const label = (d) => (p) => `${d.label}  ${d.ranks[p.dataIndex]}`, last = f.shown.stages.length - 1;
  const spot = (rank, i, d) => ({ value: rank, label: { show: i === 0 || i === last, position: i ? "right" : "left",
    distance: 10, color: tone("soft"), formatter: label(d) } });
  return {
    grid: { left: 220, right: 220, top: 34, bottom: 12 },
    xAxis: { ...axes(), type: "category", boundaryGap: false, position: "top", data: f.shown.stages,
      axisLabel: { color: tone("faint") } },
    yAxis: { type: "value", inverse: true, show: false, min: 0.5 },
    series: f.data.map((d) => ({ type: "line", animation: false, color: tone(d.colour), symbol: "circle", symbolSize: 10,
      lineStyle: { width: 1.7 }, name: d.label, data: d.ranks.map((rank, i) => spot(rank, i, d)) })),
    tooltip: { formatter: (p) => element("div",
      `${p.seriesName}: ${f.data[p.seriesIndex].ranks.map((r, i) => `${f.shown.stages[i]} ${r}`).join(", ")}`, "tip") },
  };
}

// --- what can be done with it

const ICON = {
  log: "path://M2 20h20M2 14h20M2 10h20M2 7h20M2 5h20",
  csv: "path://M3 4h18v16H3zM3 9h18M3 14h18M9 4v16M15 4v16",
};
function rows(f) {
  if (f.kind === "heat") return [["layer", "name", "value"], ...f.data.map((d) => [f.shown.rows[d[1]], d[4], d[3]])];
  if (f.kind === "ranks") return [["candidate", ...f.shown.stages], ...f.data.map((d) => [d.label, ...d.ranks])];
  const head = ["series", f.shown.axis, f.shown.value || "value", "smoothed", "name"];
  return [head, ...f.data.flatMap((c) =>
    c.x.map((x, i) => [c.label, x, c.y[i], c.mean ? c.mean[i] : "", c.names?.[i] ?? ""]))];
}
function cell(value) {
  // What begins like a formula is text: a spreadsheet would compute it.
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
const csv = (f) => rows(f).map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
function save(f) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv(f)], { type: "text/csv" }));
  link.download = f.title + ".csv";
  link.click();
  URL.revokeObjectURL(link.href);
}
function toolbox(f) {
  const feature = {};
  if (f.kind === "curves") {
    feature.dataZoom = { title: { zoom: "Zoom: drag", back: "Back" }, filterMode: "none" };
    feature.restore = { title: "Whole" };
    const log = f.log ?? f.shown.log;
    if (log || f.data.every((c) => c.y.every((v) => v > 0))) {
      feature.myLog = { title: log ? "Linear axis" : "Logarithmic axis", icon: ICON.log,
        onclick: () => { f.log = !log; draw(f); } };
    }
  }
  feature.myCsv = { title: "Save as CSV", icon: ICON.csv, onclick: () => save(f) };
  feature.saveAsImage = { title: "Save as PNG", name: f.title, pixelRatio: 2, backgroundColor: tone("card") };
  return { feature, right: 8, top: 0, itemSize: 12, iconStyle: { borderColor: tone("faint") },
    emphasis: { iconStyle: { borderColor: tone("c0"), textFill: tone("soft"), textPosition: "left" } } };
}
function draw(f) {
  f.chart ??= echarts.init(f.figure.querySelector(".plot"));
  const option = { curves, heat, ranks }[f.kind](f);
  option.tooltip = { ...option.tooltip, confine: true, transitionDuration: 0, padding: 0, borderWidth: 0,
    backgroundColor: tone("card"), textStyle: { color: tone("ink") } };
  const font = { fontFamily: getComputedStyle(document.body).fontFamily, fontSize: 11 };
  f.chart.setOption({ ...option, toolbox: toolbox(f), textStyle: font, animation: false }, true);
  if (f.kind === "curves") {
    f.chart.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
  }
}
const all = () => figures.forEach(draw);
all();
for (const f of figures) {
  // One pointer for all charts over the same axis.
  if (f.kind === "curves") f.chart.group = f.shown.axis;
  f.chart.getDom().addEventListener("dblclick", () => f.chart.dispatchAction({ type: "restore" }));
}
for (const axis of new Set(figures.map((f) => f.shown.axis))) if (axis) echarts.connect(axis);
addEventListener("resize", () => figures.forEach((f) => f.chart.resize()));
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", all);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));

const keys = [...document.querySelectorAll("button.key")];
for (const key of keys) {
  key.setAttribute("aria-pressed", "true");
  key.addEventListener("click", () => {
    const run = +key.dataset.run;
    if (!off.delete(run)) off.add(run);
    for (const k of keys) k.setAttribute("aria-pressed", String(!off.has(+k.dataset.run)));
    all();
  });
}
