"use strict";
// What a number of each head was at a step: tables whose cells are coloured, and a slider that chooses the step.

class HeatMap {
  constructor(page, panel) {
    this.page = page;
    this.step = null; // null: the last one
    this.body = el("div", { class: "blocks" });
    this.value = el("output", {});
    this.slider = el("input", { type: "range", min: "0", "aria-label": `Step of ${panel.title}` });
    this.slider.addEventListener("input", () => this.choose(Number(this.slider.value)));
    this.chooser = el("select", { "aria-label": "Run" });
    this.chooser.addEventListener("change", () => this.chooseRun(Number(this.chooser.value)));
    this.note = el("p", { class: "note" });
    this.element = el("article", { class: "card heat" },
      el("header", {}, el("h3", {}, `${panel.title}, each head`), this.chooser,
        el("label", { class: "step" }, this.slider, this.value)),
      this.body, this.note);
    this.number = 0;
    this.update(panel);
  }

  update(panel) {
    this.grids = panel.grids;
    this.number = Math.min(this.number, this.grids.length - 1);
    const options = this.grids.map(({ run }, number) => el("option", { value: number }, this.page.runName(run)));
    this.chooser.replaceChildren(...options);
    this.chooser.value = String(this.number);
    this.chooser.hidden = this.grids.length < 2;
    this.draw();
  }

  get grid() {
    return this.grids[this.number];
  }

  chooseRun(number) {
    this.number = number;
    this.step = null;
    this.draw();
  }

  choose(place) {
    this.step = place === this.grid.steps.length - 1 ? null : this.grid.steps[place].step;
    this.draw();
  }

  place() {
    const place = this.grid.steps.findIndex(({ step }) => step === this.step);
    return place < 0 ? this.grid.steps.length - 1 : place;
  }

  draw() {
    const { steps, blocks, meaning, column } = this.grid;
    const widest = Math.max(...blocks.map(({ columns }) => columns.length));
    this.element.classList.toggle("narrow", blocks.length === 1 && widest <= 8);
    const place = this.place();
    this.slider.max = steps.length - 1;
    this.slider.value = place;
    this.slider.disabled = steps.length < 2;
    this.value.textContent = `step ${whole(steps[place].step)}`;
    this.slider.setAttribute("aria-valuetext", this.value.textContent);
    const largest = Math.max(...blocks.flatMap(({ values }) => values.flat(2)).map((value) => value ?? 0), 1e-12);
    this.body.replaceChildren(...blocks.map((block) => heatTable(block, place, largest, column)));
    this.note.textContent = `${meaning[0].toUpperCase()}${meaning.slice(1)}.`;
  }
}

function heatTable(block, place, largest, column) {
  const head = el("tr", {}, el("td", {}, column), ...block.columns.map((name) => el("th", { scope: "col" }, name)));
  const rows = block.rows.map((name, row) => el("tr", {}, el("th", { scope: "row" }, name),
    ...block.values[place][row].map((value, number) =>
      heatCell(value, largest, `${name}, ${column} ${block.columns[number]}: ${short(value)}`))));
  const caption = block.title ? el("caption", {}, block.title) : null;
  return el("table", {}, caption, el("thead", {}, head), el("tbody", {}, ...rows));
}

function heatCell(value, largest, title) {
  const share = Math.max(0, Math.min(1, (value ?? 0) / largest));
  const text = value == null ? "" : value.toFixed(2).replace(/^0\./, ".");
  return el("td", { title, style: `--heat: ${(100 * share).toFixed(0)}%` }, text);
}
