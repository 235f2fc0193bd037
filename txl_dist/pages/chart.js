"use strict";
// Charts of curves over tokens, steps or time: uPlot draws them; the legend, the cursor and the keyboard are ours.

// ------------------------------------------------------------------------------------------------------- elements

// Make an element: el("button", {class: "x", onclick: f}, child, ...). Texts are texts, never HTML.
function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

// A button that is on or off; `toggle` changes what it stands for and returns whether it is on now.
function toggleButton(attributes, isOn, toggle, ...children) {
  const button = el("button", { type: "button", "aria-pressed": String(isOn), ...attributes }, ...children);
  button.addEventListener("click", () => button.setAttribute("aria-pressed", String(toggle())));
  return button;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

const SPLITS = ["train", "valid", "test"]; // each has its colour in all charts

// One of eight colours that differ for every eye.
const seriesColor = (number) => color(`series-${number % 8}`);

// The colour of a curve: of a family, one of a range by its place; of one that stands beside a family, that of texts.
function curveColor({ key, place }, number, panel) {
  const hue = 212 + 138 * place;
  if (place != null) return isDark() ? `hsl(${hue} 80% 72%)` : `hsl(${hue} 62% 46%)`;
  if (panel.curves.some((curve) => curve.place != null)) return color("text");
  const split = SPLITS.indexOf(key.split("/")[0]);
  return seriesColor(split < 0 || number > 2 ? number : split);
}

// -------------------------------------------------------------------------------------------------------- numbers

const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];

// A number in few characters: 1.23M, 0.0123, 2.5e-4.
function short(value, digits = 4) {
  if (value == null || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(digits - 3).replace(/\.?0+e/, "e");
  const [unit, prefix] = size < 10000 ? [1, ""] : PREFIXES.find(([limit]) => size >= limit);
  return `${Number((value / unit).toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 9 })}${prefix}`;
}

const whole = (value) => (value == null ? "–" : value.toLocaleString("en-US"));

// ------------------------------------------------------------------------------------------------------ smoothing

// The mean of each value and those up to `width` before and behind it; tracking/dashboard/thinning.py does the same.
function movingMean(values, width) {
  const sums = [0];
  const counts = [0];
  values.forEach((value, place) => {
    sums.push(sums[place] + (value ?? 0));
    counts.push(counts[place] + (value == null ? 0 : 1));
  });
  return values.map((value, place) => {
    if (value == null) return null;
    const start = place - Math.min(width, place);
    const stop = Math.min(2 * place - start + 1, values.length);
    return (sums[stop] - sums[start]) / (counts[stop] - counts[start]);
  });
}

// Whether a curve goes up and down: a learning rate or a count does not, and is not to be smoothed.
function isNoisy(values) {
  const known = values.filter((value) => value != null);
  const steps = known.slice(1).map((value, place) => Math.sign(value - known[place])).filter((sign) => sign !== 0);
  const turns = steps.slice(1).filter((sign, place) => sign !== steps[place]).length;
  return turns > 0.1 * known.length;
}

// A curve as it is drawn strongly; null where it has too few points to be smoothed, or no noise.
function smoothed(curve, share) {
  if (share === 0 || !isNoisy(curve.values)) return null;
  const long = curve.means ?? curve;
  const width = Math.round(share * long.values.length);
  if (width === 0) return curve.means ? long : null;
  return { rows: long.rows, values: movingMean(movingMean(long.values, width), width) };
}

// ---------------------------------------------------------------------------------------------------------- chart

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const FEW_POINTS = 40; // of a curve whose points are drawn, too, where there are few curves
const FEW_CURVES = 4;

// One panel. `page` is the state that all charts share (dashboard.js): axis, zoom, smoothing, what is hidden.
class Chart {
  constructor(page, panel) {
    this.page = page;
    this.panel = panel;
    this.hidden = new Set();
    this.legend = el("div", { class: "legend", role: "group", "aria-label": `Lines of ${panel.title}` });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart" });
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.element = el("article", { class: "card" },
      el("header", {}, el("h3", {}, panel.title), el("span", { class: "unit" }, this.caption())),
      this.legend, this.plot);
    this.at = null;
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  caption() {
    const arrow = { lower: "↓ lower is better", higher: "↑ higher is better" }[this.panel.better];
    return [this.panel.unit, arrow].filter(Boolean).join(" · ");
  }

  update(panel) {
    this.panel = panel;
    this.draw();
  }

  // ------------------------------------------------------------------------------------------------------- data

  // The points of a curve on the chosen axis; those of a run that does not know its time are left out.
  points(curve, { rows, values }) {
    const xs = this.page.xs(curve.run, rows);
    const known = xs.map((x, place) => place).filter((place) => xs[place] != null);
    return [known.map((place) => xs[place]), known.map((place) => values[place])];
  }

  style(curve, number) {
    if (!this.page.several) return { stroke: curveColor(curve, number, this.panel), dash: [] };
    const metrics = [...new Set(this.panel.curves.map(({ key }) => key))];
    return { stroke: seriesColor(curve.run), dash: DASHES[metrics.indexOf(curve.key) % DASHES.length] };
  }

  isHidden(curve) {
    return this.page.several ? this.page.hiddenRuns.has(this.page.runName(curve.run)) : this.hidden.has(curve.key);
  }

  // The lines to draw: of each visible curve the raw one, faint where there is a smoothed one.
  lines() {
    const lines = [];
    this.shown = [];
    this.panel.curves.forEach((curve, number) => {
      if (this.isHidden(curve)) return;
      const { stroke, dash } = this.style(curve, number);
      const raw = this.points(curve, curve);
      const smooth = smoothed(curve, this.page.smoothing);
      this.shown.push({ curve, xs: raw[0], ys: raw[1] });
      const few = curve.values.length <= (this.panel.curves.length <= FEW_CURVES ? FEW_POINTS : 1);
      lines.push({ data: raw, dotted: true, series: { stroke, dash, width: smooth ? 1 : 2, alpha: smooth ? 0.32 : 1,
        points: { show: few, size: 5, fill: stroke } } });
      if (smooth) lines.push({ data: this.points(curve, smooth),
        series: { stroke, dash, width: 2, points: { show: false } } });
    });
    return lines;
  }

  // A logarithmic scale cannot show what is negative; zeros are left out.
  isLog() {
    return this.page.log && this.shown.every(({ ys }) => ys.every((y) => y == null || y >= 0))
      && this.shown.some(({ ys }) => ys.some((y) => y > 0));
  }

  // ------------------------------------------------------------------------------------------------------- draw

  draw() {
    this.uplot?.destroy();
    const lines = this.lines();
    const isLog = this.isLog();
    const tables = lines.map(({ data: [xs, ys] }) => [xs, isLog ? ys.map((y) => (y > 0 ? y : null)) : ys]);
    const data = tables.length ? uPlot.join(tables) : [[]];
    this.dotted = lines.map(({ dotted }) => dotted);
    this.uplot = new uPlot(this.options(lines, isLog), data, this.plot);
    this.plot.setAttribute("aria-label", `${this.panel.title} over ${this.page.axisLabel()}. Left and right move the `
      + "cursor, plus and minus zoom, Escape shows all.");
    this.drawLegend();
  }

  options(lines, isLog) {
    const grid = { stroke: color("line"), width: 1 };
    const axis = { stroke: color("faint"), font: "11px system-ui, sans-serif", grid, ticks: { show: false } };
    return {
      width: Math.max(this.plot.clientWidth, 120),
      height: Math.max(this.plot.clientHeight, 120),
      legend: { show: false },
      padding: [10, 12, 0, 0],
      scales: {
        x: { time: false, range: () => this.page.range() },
        y: isLog ? { distr: 3, range: (u, low, high) => uPlot.rangeLog(low, high, 10, false) } : {},
      },
      axes: [
        { ...axis, size: 28, values: (u, values) => values.map((value) => short(value)) },
        { ...axis, size: 52, values: (u, values) => values.map((value) => (value == null ? "" : short(value))) },
      ],
      series: [{}, ...lines.map(({ series }) => series)],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        points: { show: (u, number) => this.dotted[number - 1] && cursorDot(u.series[number].stroke()) },
        bind: { dblclick: () => () => this.page.zoomTo(null) },
      },
      hooks: {
        drawClear: [(u) => drawMarks(u, this.page)],
        ready: [(u) => this.followMouse(u)],
        setSelect: [(u) => this.onSelect(u)],
      },
    };
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (this.uplot && width && (width !== this.uplot.width || height !== this.uplot.height)) {
      this.uplot.setSize({ width, height });
    }
  }

  applyZoom() {
    const [min, max] = this.page.range();
    this.uplot.setScale("x", { min, max });
  }

  // ----------------------------------------------------------------------------------------------------- cursor

  followMouse(u) {
    u.over.addEventListener("mousemove", (event) => this.page.moveCursor(u.posToVal(event.offsetX, "x")));
    u.over.addEventListener("mouseleave", () => this.page.moveCursor(null));
  }

  onSelect(u) {
    const { left, width } = u.select;
    if (width > 4) this.page.zoomTo([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  }

  // Show the cursor at a place on the axis, and the values there; at null the last values.
  showAt(x) {
    this.at = x;
    const left = x == null ? -10 : this.uplot.valToPos(x, "x");
    this.uplot.setCursor({ left, top: x == null ? -10 : 1 }, false);
    this.showValues();
  }

  onKey(event) {
    const [min, max] = this.page.range();
    const at = this.page.at ?? max;
    const actions = {
      ArrowLeft: () => this.page.moveCursor(this.neighbour(at, -1)),
      ArrowRight: () => this.page.moveCursor(this.neighbour(at, 1)),
      Home: () => this.page.moveCursor(min),
      End: () => this.page.moveCursor(max),
      "+": () => this.page.zoomTo(around(at, min, max, 0.25)),
      "-": () => this.page.zoomTo(around(at, min, max, 1)),
    };
    const action = actions[event.key === "=" ? "+" : event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.page.speaker = this;
    action();
  }

  // The next point of any visible curve in a direction.
  neighbour(at, direction) {
    const ahead = this.uplot.data[0].filter((x) => (x - at) * direction > 1e-9 * Math.abs(at));
    if (!ahead.length) return at;
    return direction > 0 ? ahead[0] : ahead[ahead.length - 1];
  }

  // ----------------------------------------------------------------------------------------------------- legend

  drawLegend() {
    this.values = new Map();
    const entries = this.page.several ? this.runEntries() : this.curveEntries();
    const focused = [...this.legend.children].indexOf(document.activeElement);
    this.legend.replaceChildren(...entries);
    if (focused >= 0) this.legend.children[focused]?.focus();
    this.showValues();
  }

  curveEntries() {
    return this.panel.curves.map((curve, number) => {
      const toggle = () => {
        const isShown = !flip(this.hidden, curve.key);
        this.draw();
        return isShown;
      };
      return this.entry(curve.label, [curve], this.style(curve, number).stroke, toggle, curve.meaning);
    });
  }

  // In an overlay each entry is a run, with its values of all metrics of the panel, and hides it in all charts.
  runEntries() {
    const runs = [...new Set(this.panel.curves.map(({ run }) => run))];
    const entries = runs.map((run) => {
      const curves = this.panel.curves.filter((curve) => curve.run === run);
      return this.entry(this.page.runName(run), curves, seriesColor(run), () => this.page.toggleRun(run));
    });
    return [...entries, ...this.dashKey()];
  }

  dashKey() {
    const labels = new Map(this.panel.curves.map(({ key, label }) => [key, label]));
    if (labels.size < 2) return [];
    const samples = [...labels.values()].map((label, number) => el("span", {}, dashSample(number), ` ${label} `));
    return [el("span", { class: "dashes" }, ...samples)];
  }

  entry(label, curves, stroke, toggle, meaning) {
    const value = el("b");
    this.values.set(value, curves);
    const attributes = { title: meaning, style: `--swatch: ${stroke}`, "data-label": label };
    return toggleButton(attributes, !this.isHidden(curves[0]), toggle, el("i"), el("span", {}, label), value);
  }

  showValues() {
    for (const [element, curves] of this.values) {
      element.textContent = curves.map((curve) => short(this.valueOf(curve))).join(" / ");
    }
  }

  // The value of a curve at the cursor, or its last one.
  valueOf(curve) {
    const shown = this.shown.find((candidate) => candidate.curve === curve);
    if (!shown || !shown.xs.length) return null;
    return shown.ys[this.at == null ? shown.ys.length - 1 : nearest(shown.xs, this.at)];
  }

  valuesText() {
    const values = this.shown.map(({ curve }) => `${this.page.curveName(curve)} ${short(this.valueOf(curve))}`);
    return `${this.page.positionText()}: ${values.slice(0, 12).join(", ")}`;
  }
}

function cursorDot(stroke) {
  return el("div", { class: "dot", style: `background: ${stroke}` });
}

function dashSample(number) {
  const svg = `<svg width="22" height="6" aria-hidden="true"><line x1="0" y1="3" x2="22" y2="3" stroke="currentColor" `
    + `stroke-width="2" stroke-dasharray="${DASHES[number % DASHES.length].join(" ")}"/></svg>`;
  const holder = el("span");
  holder.innerHTML = svg;
  return holder;
}

// Add to a set what is not in it, and take out what is; return whether it is in it now.
function flip(set, item) {
  if (!set.delete(item)) set.add(item);
  return set.has(item);
}

// The range of an axis around a place, `half` times as wide on each side as it is now.
function around(at, min, max, half) {
  return [at - half * (max - min), at + half * (max - min)];
}

// The index of the number nearest to x in an ascending list.
function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

// ---------------------------------------------------------------------------------------------------------- marks

const MARKS = {
  start: { label: "starts", one: "start", color: "faint", dash: [2, 4], top: 0 },
  bad_step: { label: "bad steps", one: "bad step", color: "bad", dash: [4, 3], top: 0 },
  checkpoint: { label: "checkpoints", one: "checkpoint", color: "faint", dash: [], top: null },
};
const TICK = 8; // pixels of a mark that stands at the axis only

// Draw starts and bad steps as lines over the whole height, checkpoints as ticks on the axis.
function drawMarks(u, page) {
  const ratio = uPlot.pxRatio;
  const { left, top, width, height } = u.bbox;
  const context = u.ctx;
  context.save();
  for (const mark of page.marks()) {
    const x = u.valToPos(mark.x, "x", true);
    if (x < left + 1 || x > left + width + 1) continue;
    const style = MARKS[mark.kind];
    context.strokeStyle = context.fillStyle = color(style.color);
    context.lineWidth = ratio * (style.top == null ? 2 : 1.25);
    context.setLineDash(style.dash.map((length) => length * ratio));
    context.beginPath();
    context.moveTo(x, style.top == null ? top + height - TICK * ratio : top);
    context.lineTo(x, top + height);
    context.stroke();
    if (mark.kind === "bad_step") drawTriangle(context, x, top, 5 * ratio);
  }
  context.restore();
}

function drawTriangle(context, x, y, size) {
  context.beginPath();
  context.moveTo(x - size, y - size);
  context.lineTo(x + size, y - size);
  context.lineTo(x, y + size * 0.7);
  context.fill();
}
