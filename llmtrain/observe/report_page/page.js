"use strict";
// Draws the curves of the inlined data as SVG. One crosshair runs through all charts: it stands at a step.
const { runs } = JSON.parse(document.getElementById("data").textContent);
const MARGIN = { top: 10, right: 14, bottom: 26, left: 52 };
const CHARTS = [
  {
    title: "Loss", wide: true, log: true, format: (v) => v.toFixed(4),
    lines: [
      { key: "loss", label: "training", style: "faint" },
      { key: "smooth_loss", label: "smoothed", style: "" },
      { key: "valid_loss", label: "validation", style: "points" },
    ],
  },
  { title: "Learning rate", zero: true, format: (v) => v.toExponential(3), lines: [{ key: "lr", label: "lr", style: "" }] },
  {
    title: "Gradient norm", log: true, format: significant,
    lines: [
      { key: "grad_norm", label: "each row", style: "faint" },
      { key: "smooth_grad_norm", label: "smoothed", style: "" },
    ],
  },
  {
    title: "Tokens per second", wide: true, zero: true, format: (v) => Math.round(v).toLocaleString("en"),
    lines: [
      { key: "tokens_per_second", label: "each row", style: "faint" },
      { key: "smooth_tokens_per_second", label: "smoothed", style: "" },
    ],
  },
  {
    title: "Busiest expert, times an equal load", optional: true, format: significant,
    lines: [{ key: "moe/max_load", label: "mean of layers", style: "" }],
  },
  {
    title: "Choices that found no room", optional: true, zero: true, format: significant,
    lines: [{ key: "moe/drop_rate", label: "mean of layers", style: "" }],
  },
];

function significant(value) {
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
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

/** Index of the step nearest to `step` in a sorted list. */
function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
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
    return `${this.spec.title} over steps. ${parts.join("; ")}. Arrow keys move along the steps.`;
  }

  scales() {
    const usable = (v) => v !== null && (!this.log || v > 0);
    let [low, high, first, last] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const line of this.lines) {
      line.values.forEach((v) => { if (usable(v)) { low = Math.min(low, v); high = Math.max(high, v); } });
      first = Math.min(first, line.steps[0]);
      last = Math.max(last, line.steps.at(-1));
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
    this.x = (step) => MARGIN.left + ((step - first) / (last - first)) * (right - MARGIN.left);
    this.y = (v) => base - ((f(v) - bottom) / (top - bottom)) * (base - MARGIN.top);
    this.usable = usable;
  }

  draw() {
    this.width = Math.max(240, this.svg.clientWidth || this.figure.clientWidth - 32);
    this.height = this.spec.wide && this.spec.log ? Math.min(380, Math.max(260, this.width * 0.5)) : 230;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.style.height = `${this.height}px`;
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
    for (const step of ticks(first, last, Math.max(2, this.width / 110), true)) {
      const anchor = this.x(step) > this.width - 30 ? "end" : "middle";
      const x = anchor === "end" ? this.width - 4 : this.x(step);
      svg("text", { x, y: this.height - 6, "text-anchor": anchor }, this.svg, short(step));
    }
  }

  resumes() {
    let labelled = -Infinity;
    for (const step of runs[0].resumes.filter((s) => s >= this.range.first)) {
      const x = Math.round(this.x(step)) + 0.5;
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
    line.steps.forEach((step, i) => {
      const value = line.values[i];
      const visible = this.usable(value);
      if (visible) path += `${open ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
      open = visible;
    });
    const style = line.style === "points" ? "joint" : line.style;
    svg("path", { class: `curve ${style} ${line.color}`, d: path }, this.svg);
    if (line.style !== "points") return;
    const radius = line.steps.length > 80 ? 2 : 3.5;
    line.steps.forEach((step, i) => {
      if (!this.usable(line.values[i])) return;
      svg("circle", { class: `point ${line.color}`, cx: this.x(step), cy: this.y(line.values[i]), r: radius }, this.svg);
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
    const steps = this.lines[0].steps;
    const now = this.step === undefined ? steps.length - 1 : nearest(steps, this.step);
    this.goTo(steps[Math.min(steps.length - 1, Math.max(0, now + moves[event.key]))]);
  }

  goTo(wish) {
    const steps = this.lines[0].steps;
    const step = steps[nearest(steps, wish)];
    for (const chart of charts) chart.show(step, chart === this);
  }

  show(step, active) {
    this.clear();
    if (!this.range || step < this.range.first || step > this.range.last) return;
    this.step = step;
    const x = Math.round(this.x(step)) + 0.5;
    svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }, this.overlay);
    html("b", {}, this.tip, `Step ${step.toLocaleString("en")}`);
    for (const line of this.lines) {
      const i = nearest(line.steps, step);
      const near = line.style === "points" || Math.abs(this.x(line.steps[i]) - this.x(step)) < 24;
      if (!near) continue;
      const value = line.values[i];
      if (this.usable(value)) svg("circle", { class: `mark ${line.color}`, cx: this.x(line.steps[i]), cy: this.y(value), r: 3.5 }, this.overlay);
      const row = html("p", {}, this.tip);
      const label = html("span", {}, row);
      html("span", { class: `swatch ${line.style === "points" ? "dot" : line.style} ${line.color}` }, label);
      const where = line.style === "points" && line.steps[i] !== step ? ` at ${line.steps[i].toLocaleString("en")}` : "";
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
    this.step = undefined;
  }
}

const parent = document.getElementById("charts");
const drawn = (spec) => !spec.optional || runs.some((run) => spec.lines.some((line) => run.curves[line.key][0].length));
for (const spec of CHARTS.filter(drawn)) charts.push(new Chart(spec, parent));
const redraw = () => charts.forEach((chart) => chart.draw());
new ResizeObserver(redraw).observe(parent);
redraw();
