"use strict";
// The dashboard of runs: what tracking/dashboard/ has put into the page, or serves.

const AXES = { tokens: "training tokens", step: "optimizer steps", seconds: "time of training" };
const AXIS_NAMES = { tokens: "Tokens", step: "Steps", seconds: "Time" };
const UNITS = [[3600, "hours"], [60, "minutes"], [1, "seconds"]];
const SMOOTHING = [["none", 0], ["light", 0.005], ["moderate", 0.02], ["strong", 0.06]];
const TILES = [
  "valid/loss", "valid/bits_per_byte", "valid/bits_per_dimension", "valid/perplexity", "memory/gain", "train/tokens_per_second",
];
const REFRESH = 3000; // milliseconds between questions for new data

class Page {
  constructor(data) {
    this.data = data;
    this.axis = "tokens";
    this.log = false;
    this.smoothing = 0.02;
    this.zoom = null;
    this.at = null; // where the cursor is on the axis
    this.speaker = null; // the chart whose values are said, after a key
    this.hiddenRuns = new Set();
    this.shownMarks = new Set(this.several ? ["bad_step"] : ["start", "bad_step", "checkpoint"]);
    this.charts = new Map();
    this.maps = new Map();
    this.live = el("div", { class: "unseen", "aria-live": "polite" });
    this.where = el("output", { class: "where" });
    this.build();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawCharts());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.zoomTo(null));
  }

  get several() {
    return this.data.runs.length > 1;
  }

  runName(run) {
    return this.data.runs[run].name;
  }

  curveName(curve) {
    return this.several ? `${this.runName(curve.run)} ${curve.label}` : curve.label;
  }

  // ------------------------------------------------------------------------------------------------------- axis

  // How many seconds the unit of the time axis has, and its name: what fits the longest run.
  unit() {
    const longest = Math.max(0, ...this.data.runs.map(({ last }) => last?.seconds ?? 0));
    return UNITS.find(([seconds]) => longest >= 2 * seconds) ?? UNITS[2];
  }

  scale(value) {
    return value == null || this.axis !== "seconds" ? value : value / this.unit()[0];
  }

  axisLabel() {
    return this.axis === "seconds" ? `${this.unit()[1]} of training` : AXES[this.axis];
  }

  xs(run, rows) {
    const { rows: known, axes } = this.data.runs[run];
    this.places ??= new Map();
    if (!this.places.has(run)) this.places.set(run, new Map(known.map((row, place) => [row, place])));
    const places = this.places.get(run);
    return rows.map((row) => this.scale(axes[this.axis][places.get(row)]));
  }

  range() {
    return this.zoom ?? this.wholeRange();
  }

  wholeRange() {
    const ends = this.data.runs.map(({ last }) => this.scale(last?.[this.axis]) ?? 0);
    return [0, Math.max(...ends) || 1];
  }

  hasTime() {
    return this.data.runs.some(({ axes }) => axes.seconds.some((seconds) => seconds != null));
  }

  marks() {
    return this.data.runs.flatMap((run, number) => this.hiddenRuns.has(run.name) ? [] : run.marks
      .filter(({ kind }) => this.shownMarks.has(kind))
      .map((mark) => ({ ...mark, run: number, x: this.scale(mark[this.axis]) }))
      .filter(({ x }) => x != null));
  }

  // ------------------------------------------------------------------------------------------- what charts share

  drawCharts() {
    for (const chart of this.charts.values()) chart.draw();
    this.showWhere();
  }

  // Show a range of the axis in all charts; null: all of it.
  zoomTo(range) {
    const [first, last] = this.wholeRange();
    const [from, to] = range ? [Math.max(first, range[0]), Math.min(last, range[1])] : [first, last];
    this.zoom = to > from && to - from < last - first ? [from, to] : null;
    this.reset.disabled = this.zoom == null;
    for (const chart of this.charts.values()) chart.applyZoom();
    this.moveCursor(this.at);
  }

  moveCursor(x) {
    this.at = x;
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.showCursors());
  }

  showCursors() {
    for (const chart of this.charts.values()) chart.showAt(this.at);
    this.showWhere();
    if (this.speaker) this.announce(this.speaker.valuesText());
    this.speaker = null;
  }

  showWhere() {
    this.where.textContent = this.at == null ? "" : this.positionText();
  }

  // Where the cursor is: on the chosen axis and, for a single run, on the others; with a mark that is near.
  positionText() {
    if (this.at == null) return "last values";
    const [min, max] = this.range();
    const near = this.marks().filter(({ x }) => Math.abs(x - this.at) < 0.006 * (max - min));
    const named = near.map(({ kind, text }) => `${MARKS[kind]?.one ?? kind}: ${text}`);
    return [...this.placesAt(this.at), ...named.slice(0, 2)].join(" · ");
  }

  placesAt(x) {
    if (this.several) return [`${short(x)} ${this.axisLabel()}`];
    const { axes } = this.data.runs[0];
    const scaled = axes[this.axis].map((value) => this.scale(value) ?? -1);
    if (!scaled.length) return [`${short(x)} ${this.axisLabel()}`];
    const place = nearest(scaled, x);
    return [`step ${whole(axes.step[place])}`, `${short(axes.tokens[place])} tokens`, duration(axes.seconds[place])]
      .filter(Boolean);
  }

  announce(text) {
    clearTimeout(this.announcing);
    this.announcing = setTimeout(() => { this.live.textContent = text; }, 150);
  }

  toggleRun(run) {
    const isShown = !flip(this.hiddenRuns, this.runName(run));
    this.drawCharts();
    return isShown;
  }

  // ------------------------------------------------------------------------------------------------------ build

  build() {
    this.places = null;
    this.main = document.getElementById("page");
    this.head = el("div");
    this.sections = el("div");
    this.tail = el("div");
    this.main.replaceChildren(this.head, this.toolbar(), this.sections, this.tail, this.live, footer());
    this.fill();
  }

  fill() {
    replaceKeeping(this.head, header(this));
    this.fillSections();
    replaceKeeping(this.tail, [samplesSection(this), startsSection(this), eventsSection(this)]);
    this.fillMarks();
    this.drawCharts();
    this.reset.disabled = this.zoom == null;
  }

  // New data of the same charts are drawn in place, so that focus and the place on the screen stay.
  fillSections() {
    const signature = JSON.stringify(this.data.sections.map(({ title, panels }) =>
      [title, panels.map((panel) => [panel.title, panel.curves.length > 0, panel.grids.length > 0])]));
    if (signature !== this.signature) {
      this.charts.clear();
      this.maps.clear();
      this.sections.replaceChildren(...this.data.sections.map((section) => this.section(section)));
      this.nav.replaceChildren(...this.links());
    }
    this.signature = signature;
    for (const panel of this.data.sections.flatMap(({ panels }) => panels)) {
      const chart = this.charts.get(panel.title);
      if (chart) chart.panel = panel;
      this.maps.get(panel.title)?.update(panel);
    }
  }

  section({ title, panels }) {
    const charts = panels.map((panel) => this.chart(panel)).filter(Boolean);
    const maps = panels.map((panel) => this.map(panel)).filter(Boolean);
    widths(charts.length, title === "Loss").forEach((width, number) => charts[number].classList.add(width));
    return el("section", { id: title.toLowerCase(), "aria-label": title },
      el("h2", {}, title), el("div", { class: "cards" }, ...charts, ...maps));
  }

  chart(panel) {
    if (!panel.curves.length) return null;
    this.charts.set(panel.title, new Chart(this, panel));
    return this.charts.get(panel.title).element;
  }

  map(panel) {
    if (!panel.grids.length) return null;
    this.maps.set(panel.title, new HeatMap(this, panel));
    return this.maps.get(panel.title).element;
  }

  links() {
    const titles = this.data.sections.map(({ title }) => title);
    if (this.data.runs.some(({ samples }) => samples.length)) titles.push("Samples");
    if (this.data.runs.some(({ starts }) => starts.length)) titles.push("Starts");
    return [...new Set(titles)].map((title) => el("a", { href: `#${title.toLowerCase()}` }, title));
  }

  // ---------------------------------------------------------------------------------------------------- toolbar

  toolbar() {
    this.nav = el("nav", { "aria-label": "Sections" });
    this.reset = el("button", { type: "button", class: "plain", onclick: () => this.zoomTo(null) }, "Reset zoom");
    this.markButtons = el("div", { class: "marks", role: "group", "aria-label": "Marks" });
    const log = toggleButton({ class: "plain" }, this.log, () => {
      this.log = !this.log;
      this.drawCharts();
      return this.log;
    }, "Log scale");
    return el("div", { class: "toolbar", role: "group", "aria-label": "Charts" },
      this.nav, el("div", { class: "controls" }, this.axisChoice(), this.smoothingChoice(), log, this.reset),
      this.markButtons, this.where);
  }

  axisChoice() {
    const choices = Object.entries(AXIS_NAMES).map(([axis, name]) => {
      const input = el("input", { type: "radio", name: "axis", value: axis, checked: axis === this.axis,
        disabled: axis === "seconds" && !this.hasTime() });
      input.addEventListener("change", () => this.chooseAxis(axis));
      return el("label", {}, input, el("span", {}, name));
    });
    return el("fieldset", { class: "axis" }, el("legend", { class: "unseen" }, "Axis of all charts"), ...choices);
  }

  // The cursor and a zoom are places on an axis, so they end with it.
  chooseAxis(axis) {
    this.axis = axis;
    this.at = null;
    this.zoom = null;
    this.reset.disabled = true;
    this.drawCharts();
  }

  smoothingChoice() {
    const options = SMOOTHING.map(([name, share]) =>
      el("option", { value: share, selected: share === this.smoothing }, name));
    const select = el("select", { "aria-label": "Smoothing" }, ...options);
    select.addEventListener("change", () => {
      this.smoothing = Number(select.value);
      this.drawCharts();
    });
    return el("label", { class: "smoothing" }, "Smoothing", select);
  }

  fillMarks() {
    const counts = new Map();
    for (const { kind } of this.data.runs.flatMap(({ marks }) => marks)) counts.set(kind, (counts.get(kind) ?? 0) + 1);
    const kinds = Object.keys(MARKS).filter((kind) => counts.has(kind));
    const buttons = kinds.map((kind) => {
      const toggle = () => {
        const isShown = flip(this.shownMarks, kind);
        this.drawCharts();
        return isShown;
      };
      const { label, one } = MARKS[kind];
      const count = counts.get(kind);
      return toggleButton({ class: `mark ${kind}` }, this.shownMarks.has(kind), toggle,
        el("i"), `${count} ${count === 1 ? one : label}`);
    });
    const focused = [...this.markButtons.children].indexOf(document.activeElement);
    this.markButtons.replaceChildren(...buttons);
    if (focused >= 0) this.markButtons.children[focused]?.focus();
  }

  // ---------------------------------------------------------------------------------------------------- refresh

  async refresh() {
    try {
      const answer = await fetch(`data?${encodeURIComponent(this.data.version)}`);
      if (answer.status === 200) {
        this.data = await answer.json();
        this.places = null;
        this.fill();
      } else if (answer.status !== 204) {
        throw new Error(await answer.text());
      }
      this.main.classList.remove("stale");
    } catch (error) {
      this.main.classList.add("stale");
      this.live.textContent = `No new data: ${error.message}`;
    }
    setTimeout(() => this.refresh(), REFRESH);
  }
}

// How wide each card of a section is, so that every row is full: three in a row and two in the last ones; the loss,
// which comes first, is as wide as two.
function widths(count, isLoss) {
  if (count === 1) return ["whole"];
  if (isLoss && count > 1) return ["two-thirds", "third", ...(count > 2 ? widths(count - 2, false) : [])];
  if (count === 2 || count === 4) return Array(count).fill("half");
  return ["third", "third", "third", ...(count > 3 ? widths(count - 3, false) : [])];
}

// Fill an element anew; what was open in it stays open.
function replaceKeeping(element, children) {
  const open = new Set([...element.querySelectorAll("details[open]")].map(({ dataset }) => dataset.key));
  const focused = document.activeElement?.closest("details")?.dataset.key;
  element.replaceChildren(...children.filter(Boolean));
  for (const details of element.querySelectorAll("details")) {
    if (open.has(details.dataset.key)) details.open = true;
    if (focused === details.dataset.key) details.querySelector("summary").focus();
  }
}

// --------------------------------------------------------------------------------------------------------- header

function header(page) {
  const { data } = page;
  const head = el("header", { class: "top" }, el("h1", {}, data.title), el("p", { class: "subtitle" }, ...subtitle(page)));
  if (!page.several) return [head, tiles(page)];
  return [head, runsTable(page), differencesTable(page)];
}

function subtitle(page) {
  if (!page.data.sections.length) return ["Nothing is recorded yet."];
  if (page.several) return [page.data.runs.map(({ path }) => path).join("  ")];
  const run = page.data.runs[0];
  const last = run.starts[run.starts.length - 1];
  const facts = [progress(run), duration(run.last?.seconds), last?.split, last?.host];
  return [statePill(run), facts.filter(Boolean).join(" · ")];
}

function statePill(run) {
  const state = stateOf(run);
  return state ? el("span", { class: `pill ${state.replace(" ", "-")}` }, state) : null;
}

// How a run stands; one that has ended before its last step was stopped.
function stateOf({ last, max_steps: steps, state }) {
  return state === "ended" && last && steps && last.step < steps ? "stopped" : state;
}

function progress({ last, max_steps: steps }) {
  if (!last) return "";
  const of = steps ? ` of ${whole(steps)}` : "";
  return `step ${whole(last.step)}${of} · ${short(last.tokens)} tokens`;
}

function duration(seconds) {
  if (seconds == null) return "";
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.round(seconds)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// The numbers of a run that count, with what they were at best.
function tiles(page) {
  const found = TILES.map((key) => findCurve(page, key, 0)).filter(Boolean);
  if (!found.length) return null;
  return el("dl", { class: "tiles" }, ...found.map(({ panel, curve }) => el("div", {},
    el("dt", {}, tileTitle(panel, curve)),
    el("dd", {}, short(lastOf(curve.values))),
    el("dd", { class: "best" }, compared(panel, curve)))));
}

const tileTitle = (panel, curve) => `${panel.title}${/valid/.test(curve.key) ? ", validation" : ""}`;

function findCurve(page, key, run) {
  for (const panel of page.data.sections.flatMap(({ panels }) => panels)) {
    const curve = panel.curves.find((candidate) => candidate.key === key && candidate.run === run);
    if (curve) return { panel, curve };
  }
  return null;
}

const lastOf = (values) => values.findLast((value) => value != null);

// What the last value of a curve is to be compared with: its best or, where it is a speed, the median.
function compared(panel, { key, values }) {
  const known = values.filter((value) => value != null).sort((one, other) => one - other);
  if (key === "train/tokens_per_second") return `median ${short(known[known.length >> 1])}`;
  return `best ${short(known[panel.better === "higher" ? known.length - 1 : 0])}`;
}

function runsTable(page) {
  const keys = TILES.filter((key) => page.data.runs.some((_, run) => findCurve(page, key, run)));
  const titles = keys.map((key) => {
    const run = page.data.runs.findIndex((_, number) => findCurve(page, key, number));
    const { panel, curve } = findCurve(page, key, run);
    return tileTitle(panel, curve);
  });
  const rows = page.data.runs.map((run, number) => [runButton(page, number), statePill(run) ?? "", progress(run), duration(run.last?.seconds),
    ...keys.map((key) => {
      const found = findCurve(page, key, number);
      return found ? short(lastOf(found.curve.values)) : "–";
    })]);
  return scrolled(table(["run", "state", "progress", "time", ...titles], rows, "runs"), "Runs");
}

function runButton(page, run) {
  const name = page.runName(run);
  const attributes = { class: "run", style: `--swatch: var(--series-${run % 8})`, title: page.data.runs[run].path };
  return toggleButton(attributes, !page.hiddenRuns.has(name), () => page.toggleRun(run), el("i"), el("span", {}, name));
}

function differencesTable(page) {
  const rows = page.data.differences.map(({ key, values }) => [el("code", {}, key), ...values.map((value) => value ?? "–")]);
  if (!rows.length) return null;
  const names = page.data.runs.map(({ name }) => name);
  return el("details", { class: "panel", "data-key": "differences", open: true },
    el("summary", {}, `What differs in the configs: ${rows.length} ${rows.length === 1 ? "key" : "keys"}`),
    scrolled(table(["key", ...names], rows, "differences"), "Differences of the configs"));
}

// --------------------------------------------------------------------------------------------------------- tables

function table(titles, rows, className) {
  return el("table", { class: className },
    el("thead", {}, el("tr", {}, ...titles.map((title) => el("th", { scope: "col" }, title)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell))))));
}

// A table that may be wider than the screen: it scrolls within itself, by keyboard, too.
function scrolled(content, label) {
  return el("div", { class: "scrolled", tabindex: "0", role: "region", "aria-label": label }, content);
}

const moment = (time) => (time == null ? "" : new Date(time * 1000).toLocaleString());

// -------------------------------------------------------------------------------------------------------- samples

function samplesSection(page) {
  const runs = page.data.runs.filter(({ samples }) => samples.length);
  if (!runs.length) return null;
  const groups = runs.flatMap((run) => [page.several ? el("h3", {}, run.name) : null, ...sampleGroups(run)]);
  return el("section", { id: "samples", "aria-label": "Samples" }, el("h2", {}, "Samples"), ...groups);
}

function sampleGroups({ name, samples }) {
  const [newest, ...earlier] = samples;
  if (!earlier.length) return [sampleGroup(newest)];
  const more = el("details", { class: "panel", "data-key": `samples of ${name}` },
    el("summary", {}, `Earlier samples: ${earlier.length}`), ...earlier.map(sampleGroup));
  return [sampleGroup(newest), more];
}

function sampleGroup({ step, tokens, samples }) {
  return el("article", { class: "card samples" },
    el("header", {}, el("h3", {}, `step ${whole(step)}`), el("span", { class: "unit" }, `${short(tokens)} tokens`)),
    ...samples.map(({ prompt, text }) => el("p", { class: "sample" }, el("strong", {}, prompt), text)));
}

// --------------------------------------------------------------------------------------------------------- starts

function startsSection(page) {
  const runs = page.data.runs.filter(({ starts }) => starts.length);
  if (!runs.length) return null;
  const groups = runs.flatMap((run) => [page.several ? el("h3", {}, run.name) : null,
    ...run.starts.map((start, number) => startDetails(run, start, number))]);
  return el("section", { id: "starts", "aria-label": "Starts" }, el("h2", {}, "Starts"), ...groups);
}

function startDetails(run, start, number) {
  const title = `${number + 1}. ${start.origin}`;
  const facts = [start.split, start.host, moment(start.time), start.end ?? "no end is recorded"].filter(Boolean);
  const config = run.starts.slice(0, number + 1).findLast((earlier) => earlier.config)?.config ?? {};
  return el("details", { class: "panel", "data-key": `start ${number} of ${run.name}` },
    el("summary", {}, el("b", {}, title), " ", el("span", { class: "facts" }, facts.join(" · "))),
    changesTable(start), versions(start), configLists(config));
}

function changesTable({ changes }) {
  if (!changes.length) return null;
  const rows = changes.map(({ key, values }) => [el("code", {}, key), ...values.map((value) => value ?? "–")]);
  return [el("h4", {}, "What differs from the start before"),
    scrolled(table(["key", "before", "now"], rows, "differences"), "Changes of the config")];
}

function versions({ versions: known }) {
  const texts = Object.entries(known).map(([name, version]) => `${name} ${version}`);
  return texts.length ? el("p", { class: "note" }, texts.join(" · ")) : null;
}

// The values of a config, a list for each of its sections.
function configLists(config) {
  const sections = new Map();
  for (const [key, value] of Object.entries(config)) {
    const [section, ...rest] = key.split(".");
    if (!sections.has(section)) sections.set(section, []);
    sections.get(section).push([rest.join(".") || section, value]);
  }
  return el("div", { class: "config" }, ...[...sections].map(([section, values]) => el("div", {},
    el("h4", {}, section),
    el("dl", {}, ...values.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])))));
}

// --------------------------------------------------------------------------------------------------------- events

const MAX_EVENTS = 300;

function eventsSection(page) {
  const events = page.data.runs.flatMap((run) => run.marks.map((mark) => ({ ...mark, run: run.name })));
  if (!events.length) return null;
  const newest = events.sort((one, other) => (other.time ?? 0) - (one.time ?? 0)).slice(0, MAX_EVENTS);
  const rows = newest.map(({ run, kind, text, step, tokens, time }) => [...(page.several ? [run] : []),
    whole(step), short(tokens), moment(time), kind.replace("_", " "), text]);
  const titles = [...(page.several ? ["run"] : []), "step", "tokens", "when", "what", ""];
  const hidden = events.length - newest.length;
  return el("details", { class: "panel", "data-key": "events" },
    el("summary", {}, `All ${events.length} events: starts, checkpoints, bad steps, ends`),
    scrolled(table(titles, rows, "events"), "Events"),
    hidden ? el("p", { class: "note" }, `${hidden} earlier ones are in events.jsonl.`) : null);
}

function footer() {
  return el("footer", {}, "Drag over a chart to zoom, double-click or press Escape to see all. With the keyboard: Tab to a ",
    "chart, arrow keys move the cursor, + and − zoom. A faint line is what was logged, the strong one its mean over ",
    "nearby points.");
}

const page = new Page(JSON.parse(document.getElementById("data").textContent));
if (page.data.version != null) page.refresh();
