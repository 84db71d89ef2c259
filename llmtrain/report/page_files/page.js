"use strict";
// Draws the curves of the inlined data as SVG over steps, tokens or time. One crosshair runs through all charts.
const { runs } = JSON.parse(document.getElementById("data").textContent);
const MARGIN = { top: 26, right: 14, bottom: 42, left: 52 };
const CHARTS = [
  {
    title: "Loss", unit: "nats per target", wide: true, log: true, format: (v) => v.toFixed(4),
    lines: [
      { key: "loss", label: "training", style: "faint" },
      { key: "smooth_loss", label: "smoothed", style: "" },
      { key: "valid_loss", label: "validation", style: "points" },
    ],
  },
  { title: "Learning rate", unit: "rate", zero: true, format: (v) => v.toExponential(3), lines: [{ key: "lr", label: "lr", style: "" }] },
  {
    title: "Gradient norm", unit: "L2 norm before clipping", log: true, format: significant,
    lines: [
      { key: "grad_norm", label: "each row", style: "faint" },
      { key: "smooth_grad_norm", label: "smoothed", style: "" },
    ],
  },
  {
    title: "Speed", unit: "tokens per second", wide: true, zero: true, format: (v) => Math.round(v).toLocaleString("en"),
    lines: [
      { key: "tokens_per_second", label: "each row", style: "faint" },
      { key: "smooth_tokens_per_second", label: "smoothed", style: "" },
    ],
  },
  {
    title: "Busiest expert", unit: "times an equal load", optional: true, format: significant,
    lines: [{ key: "moe/max_load", label: "mean of layers", style: "" }],
  },
  {
    title: "Choices that found no room", unit: "share of the choices", optional: true, zero: true, format: significant,
    lines: [{ key: "moe/drop_rate", label: "mean of layers", style: "" }],
  },
  {
    title: "Accuracy", unit: "share of the labels", optional: true, format: percent,
    lines: [{ key: "valid_accuracy", label: "validation", style: "" }],
  },
  {
    title: "Macro F1", unit: "mean of the labels", optional: true, format: percent,
    lines: [{ key: "valid_macro_f1", label: "validation", style: "" }],
  },
  {
    title: "F1 of entities", unit: "exact ones", optional: true, format: percent,
    lines: [{ key: "valid_entity_f1", label: "validation", style: "" }],
  },
  {
    title: "Answers", unit: "share", optional: true, format: percent,
    lines: [
      { key: "valid_exact_match", label: "exact", style: "faint" },
      { key: "valid_token_f1", label: "F1 of positions", style: "" },
    ],
  },
];

for (const key of new Set(runs.flatMap((run) => Object.keys(run.curves)).filter((name) => name.startsWith("task/")))) {
  const [, task, metric] = key.split("/");
  const title = `${task}: ${metric.replaceAll("_", " ")}`;
  CHARTS.push({ title, unit: "task", format: significant, lines: [{ key, label: "in training", style: "" }] });
}

// What a curve can be drawn over. `of` is where a run was at a step; `unit` is chosen by the largest value.
const AXES = {
  step: { label: "Step", of: (run, step) => step, unit: () => ({ name: "step", size: 1, whole: true }) },
  tokens: { label: "Tokens", of: (run, step) => between(run.places, "tokens", step), unit: () => ({ name: "tokens predicted", size: 1 }) },
  time: { label: "Time", of: (run, step) => between(run.places, "seconds", step), unit: timeUnit },
};
let axis = AXES.step;

function timeUnit(most) {
  const units = [["seconds", 1, 120], ["minutes", 60, 7200], ["hours", 3600, 172800], ["days", 86400, Infinity]];
  const [name, size] = units.find(([, , limit]) => most <= limit);
  return { name: `time in steps, ${name}`, size };
}

/** A column of a run's places at a step; straight between two of them. Before the first it begins at zero. */
function between(places, column, step) {
  const { steps, [column]: values } = places;
  let high = steps.findIndex((s) => s >= step);
  if (high < 0) high = steps.length - 1;
  const [s0, v0] = high > 0 ? [steps[high - 1], values[high - 1]] : [0, 0];
  const share = steps[high] > s0 ? (step - s0) / (steps[high] - s0) : 1;
  return v0 + share * (values[high] - v0);
}

function significant(value) {
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

function percent(value) {
  return `${(100 * value).toFixed(2)}%`;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e3 && size < 1e4 && Number.isInteger(value)) return value.toLocaleString("en");
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}K`;
  if (size > 0 && size < 1e-2) return value.toExponential(value.toExponential().startsWith("1e") ? 0 : 1).replace(".0e", "e");
  return String(+value.toPrecision(4));
}

function svg(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

function html(name, attributes, parent, text) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

/** About `count` round numbers between two values. */
function ticks(low, high, count, whole) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  let gap = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough);
  if (whole) gap = Math.max(1, Math.round(gap));
  const result = [];
  for (let i = Math.ceil(low / gap - 1e-9); i * gap <= high + gap * 1e-9; i++) result.push(i * gap);
  return result;
}

/** Round multiples of the powers of ten in the range, as many as are readable; even steps where it is narrow. */
function logTicks(low, high) {
  const inside = (multiples) => {
    const result = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      result.push(...multiples.map((m) => m * 10 ** e).filter((v) => v >= low && v <= high));
    }
    return result;
  };
  const candidates = [[1, 1.5, 2, 3, 4, 5, 7], [1, 2, 5], [1]].map(inside);
  const fitting = candidates.find((values) => values.length <= 8) ?? candidates.at(-1);
  return fitting.length < 3 ? ticks(low, high, 4) : fitting;
}

/** Index of the number nearest to `wish` in a sorted list. */
function nearest(sorted, wish) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wish) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wish - sorted[low - 1] < sorted[low] - wish ? low - 1 : low;
}

const charts = [];

class Chart {
  constructor(spec, parent) {
    this.spec = spec;
    this.log = false;
    this.lines = runs.flatMap((run, index) =>
      spec.lines.map((line) => ({ ...line, run, color: `s${runs.length > 1 || line.style !== "points" ? index % 6 : 1}`,
        steps: run.curves[line.key][0], values: run.curves[line.key][1] })).filter((line) => line.steps.length));
    this.figure = html("figure", { class: spec.wide ? "wide" : "" }, parent);
    this.caption();
    this.svg = svg("svg", { tabindex: "0", role: "img", "aria-label": this.describe() }, this.figure);
    this.tip = html("div", { class: "tip", hidden: "" }, this.figure);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => charts.forEach((chart) => chart.clear()));
    this.svg.addEventListener("blur", () => charts.forEach((chart) => chart.clear()));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  caption() {
    const caption = html("figcaption", {}, this.figure);
    html("strong", {}, caption, this.spec.title);
    const list = html("ul", { class: "legend" }, caption);
    const shown = runs.length > 1 ? this.lines.filter((line) => line.style === "") : this.lines;
    for (const line of shown.length > 1 ? shown : []) {
      const item = html("li", {}, list);
      html("span", { class: `swatch ${line.style === "points" ? "dot" : line.style} ${line.color}` }, item);
      item.append(runs.length > 1 ? line.run.name : line.label);
    }
    if (runs.length > 1 && this.lines.some((line) => line.style === "points")) html("li", {}, list, "○ validation");
    if (!this.spec.log) return;
    const button = html("button", { type: "button", "aria-pressed": "false" }, caption, "Log scale");
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
  }

  describe() {
    const parts = this.lines.filter((line) => line.style !== "faint").map((line) => {
      const known = line.values.filter((v) => v !== null);
      if (!known.length) return "";
      return `${line.run.name} ${line.label}: from ${this.spec.format(known[0])} to ${this.spec.format(known.at(-1))}`;
    });
    return `${this.spec.title} (${this.spec.unit}) over ${axis.label.toLowerCase()}. ${parts.join("; ")}. Arrow keys move along the curve.`;
  }

  scales() {
    const usable = (v) => v !== null && (!this.log || v > 0);
    let [low, high, first, last] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const line of this.lines) {
      line.xs = line.steps.map((step) => axis.of(line.run, step));
      line.values.forEach((v) => { if (usable(v)) { low = Math.min(low, v); high = Math.max(high, v); } });
      first = Math.min(first, line.xs[0]);
      last = Math.max(last, line.xs.at(-1));
    }
    if (low > high) [low, high] = this.log ? [1, 10] : [0, 1];
    if (this.spec.zero && !this.log) low = Math.min(0, low);
    if (low === high) [low, high] = this.log ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
    const f = this.log ? Math.log : (v) => v;
    const pad = (f(high) - f(low)) * 0.05;
    const [bottom, top] = [f(low) - (this.spec.zero ? 0 : pad), f(high) + pad];
    const back = this.log ? Math.exp : (v) => v;
    const right = this.width - MARGIN.right;
    const base = this.height - MARGIN.bottom;
    if (first === last) [first, last] = [first - 1, last + 1];
    this.range = { low: back(bottom), high: back(top), first, last };
    this.unit = axis.unit(last);
    this.x = (at) => MARGIN.left + ((at - first) / (last - first)) * (right - MARGIN.left);
    this.y = (v) => base - ((f(v) - bottom) / (top - bottom)) * (base - MARGIN.top);
    this.usable = usable;
  }

  draw() {
    this.width = Math.max(240, this.svg.clientWidth || this.figure.clientWidth - 32);
    this.height = this.spec.wide && this.spec.log ? Math.min(380, Math.max(260, this.width * 0.5)) : 246;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.style.height = `${this.height}px`;
    this.svg.setAttribute("aria-label", this.describe());
    this.clear();
    if (!this.lines.length) {
      svg("text", { x: this.width / 2, y: this.height / 2, "text-anchor": "middle" }, this.svg, "No rows recorded yet");
      return;
    }
    this.scales();
    this.axes();
    if (runs.length === 1) this.resumes();
    for (const line of this.lines) this.curve(line);
    this.overlay = svg("g", {}, this.svg);
  }

  axes() {
    const { low, high, first, last } = this.range;
    for (const value of this.log ? logTicks(low, high) : ticks(low, high, this.height / 48)) {
      const y = Math.round(this.y(value)) + 0.5;
      svg("line", { class: "rule", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y }, this.svg);
      svg("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, this.svg, short(value));
    }
    const { name, size, whole } = this.unit;
    for (const value of ticks(first / size, last / size, Math.max(2, this.width / 110), whole)) {
      const at = this.x(value * size);
      const anchor = at > this.width - 30 ? "end" : "middle";
      const x = anchor === "end" ? this.width - 4 : at;
      svg("text", { x, y: this.height - 22, "text-anchor": anchor }, this.svg, short(value));
    }
    const middle = (MARGIN.left + this.width - MARGIN.right) / 2;
    svg("text", { class: "axis", x: middle, y: this.height - 5, "text-anchor": "middle" }, this.svg, name);
    svg("text", { class: "axis", x: 2, y: 12 }, this.svg, this.spec.unit);
  }

  resumes() {
    let labelled = -Infinity;
    for (const step of runs[0].resumes) {
      const at = axis.of(runs[0], step);
      if (at < this.range.first || at > this.range.last) continue;
      const x = Math.round(this.x(at)) + 0.5;
      const line = svg("line", { class: "resume", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }, this.svg);
      svg("title", {}, line, `resumed from step ${step}`);
      const fits = x - labelled > 70 && this.width - x > 70;
      if (!this.spec.wide || !this.spec.log || !fits) continue;
      svg("text", { x: x + 6, y: MARGIN.top + 10 }, this.svg, "resumed");
      labelled = x;
    }
  }

  curve(line) {
    let path = "";
    let open = false;
    line.xs.forEach((at, i) => {
      const value = line.values[i];
      const visible = this.usable(value);
      if (visible) path += `${open ? "L" : "M"}${this.x(at).toFixed(1)} ${this.y(value).toFixed(1)}`;
      open = visible;
    });
    const style = line.style === "points" ? "joint" : line.style;
    svg("path", { class: `curve ${style} ${line.color}`, d: path }, this.svg);
    if (line.style !== "points") return;
    const radius = line.steps.length > 80 ? 2 : 3.5;
    line.xs.forEach((at, i) => {
      if (!this.usable(line.values[i])) return;
      svg("circle", { class: `point ${line.color}`, cx: this.x(at), cy: this.y(line.values[i]), r: radius }, this.svg);
    });
  }

  point(event) {
    if (!this.range) return;
    const { first, last } = this.range;
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const share = (x - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    this.goTo(first + Math.min(1, Math.max(0, share)) * (last - first));
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.range) return;
    event.preventDefault();
    const { xs } = this.lines[0];
    const now = this.at === undefined ? xs.length - 1 : nearest(xs, this.at);
    this.goTo(xs[Math.min(xs.length - 1, Math.max(0, now + moves[event.key]))]);
  }

  goTo(wish) {
    const { xs } = this.lines[0];
    const at = xs[nearest(xs, wish)];
    for (const chart of charts) chart.show(at, chart === this);
  }

  show(at, active) {
    this.clear();
    if (!this.range || at < this.range.first || at > this.range.last) return;
    this.at = at;
    const x = Math.round(this.x(at)) + 0.5;
    svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }, this.overlay);
    const value = (at / this.unit.size).toLocaleString("en", { maximumFractionDigits: this.unit.size > 1 ? 2 : 0 });
    html("b", {}, this.tip, axis === AXES.step ? `Step ${value}` : `${value} ${this.unit.name.split(", ").at(-1)}`);
    for (const line of this.lines) {
      const i = nearest(line.xs, at);
      const near = line.style === "points" || Math.abs(this.x(line.xs[i]) - this.x(at)) < 24;
      if (!near) continue;
      const value = line.values[i];
      if (this.usable(value)) svg("circle", { class: `mark ${line.color}`, cx: this.x(line.xs[i]), cy: this.y(value), r: 3.5 }, this.overlay);
      const row = html("p", {}, this.tip);
      const label = html("span", {}, row);
      html("span", { class: `swatch ${line.style === "points" ? "dot" : line.style} ${line.color}` }, label);
      const elsewhere = axis !== AXES.step || (line.style === "points" && line.xs[i] !== at);
      const where = elsewhere ? ` at step ${line.steps[i].toLocaleString("en")}` : "";
      label.append((runs.length > 1 ? (line.style === "" ? line.run.name : `${line.run.name}, ${line.label}`) : line.label) + where);
      html("b", {}, row, value === null ? "not finite" : this.spec.format(value));
    }
    this.tip.hidden = !active;
    if (!active) return;
    const frame = this.figure.getBoundingClientRect();
    const plot = this.svg.getBoundingClientRect();
    const left = plot.left - frame.left + x;
    const width = this.tip.offsetWidth;
    this.tip.style.left = `${left + 14 + width < this.figure.clientWidth ? left + 14 : Math.max(4, left - 14 - width)}px`;
    this.tip.style.top = `${plot.top - frame.top + MARGIN.top + 8}px`;
  }

  clear() {
    this.overlay?.replaceChildren();
    this.tip.replaceChildren();
    this.tip.hidden = true;
    this.at = undefined;
  }
}

const parent = document.getElementById("charts");
const drawn = (spec) => !spec.optional || runs.some((run) => spec.lines.some((line) => run.curves[line.key][0].length));
for (const spec of CHARTS.filter(drawn)) charts.push(new Chart(spec, parent));
/** Buttons that choose what all charts are drawn over; those that a run has no figures for are left out. */
function chooseAxis() {
  const known = Object.entries(AXES).filter(([name]) => name === "step" || runs.every((run) => run.places[name === "time" ? "seconds" : name].at(-1) > 0));
  if (known.length < 2) return;
  const group = document.getElementById("axes");
  group.hidden = false;
  html("span", {}, group, "Horizontal axis");
  for (const [, choice] of known) {
    const button = html("button", { type: "button", "aria-pressed": String(choice === axis) }, group, choice.label);
    button.addEventListener("click", () => {
      axis = choice;
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
      redraw();
    });
  }
}

const redraw = () => charts.forEach((chart) => chart.draw());
chooseAxis();
new ResizeObserver(redraw).observe(parent);
redraw();
