// The page of txl_dist.look: a text coloured by loss, and where attention goes from each of its tokens.
//
// Token k of the text is predicted by row k, which belongs to segment k / tgt_len (txl_dist/evaluation/attention.py).
// A key `distance` tokens before it is token k - distance; -1 is the mark of the text's start, which is read first.
"use strict";
(() => {
  const MOST_ARCS = 12;
  const MOST_KEYS = 5; // that the panel lists
  const MOST_GAINS = 5;
  const data = JSON.parse(document.getElementById("data").textContent);
  const gain = data.loss.map((loss, k) => data.alone[k] - loss);
  const attention = data.attention && decode(data.attention);
  const everyHead = attention ? [...Array(attention.heads).keys()] : [];

  const state = {
    colour: gain.some((nats) => nats !== 0) ? "gain" : "loss",
    choice: { name: "all heads, their mean", heads: everyHead },
    selected: null,
    hovered: null,
  };

  // ------------------------------------------------------------------------------------------------- the data

  function decode(stored) {
    const count = bytes(stored.count);
    const offset = new Uint32Array(count.length + 1);
    count.forEach((keys, row) => (offset[row + 1] = offset[row] + keys));
    const sublayers = [];
    let heads = 0;
    for (const [layer, number] of stored.layers) {
      sublayers.push({ layer, heads: Array.from({ length: number }, (_, head) => heads + head) });
      heads += number;
    }
    return {
      sublayers,
      heads,
      offset,
      distance: new Uint16Array(bytes(stored.distance).buffer),
      weight: new Uint16Array(bytes(stored.weight).buffer),
      memory: new Uint16Array(bytes(stored.memory).buffer),
      reach: stored.reach,
      kept: stored.kept,
    };
  }

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  }

  // The tokens that gain most by the memory, the first one most.
  function strongestGains() {
    const helped = [...gain.keys()].filter((k) => gain[k] > 0);
    return helped.sort((one, other) => gain[other] - gain[one]).slice(0, MOST_GAINS);
  }

  function segmentStart(token) {
    return token - (token % data.tgt_len);
  }

  function isRemembered(token, distance) {
    return token + 1 - distance < segmentStart(token);
  }

  // The keys of a token with their weights, the mean of some heads; the largest first.
  function keysOf(token, heads) {
    const weights = new Map();
    for (const head of heads) {
      const row = token * attention.heads + head;
      for (let i = attention.offset[row]; i < attention.offset[row + 1]; i++) {
        const distance = attention.distance[i];
        weights.set(distance, (weights.get(distance) || 0) + attention.weight[i] / 1000 / heads.length);
      }
    }
    const keys = [...weights].map(([distance, weight]) => ({
      distance,
      weight,
      token: token - distance,
      remembered: isRemembered(token, distance),
    }));
    return keys.sort((one, other) => other.weight - one.weight);
  }

  function memoryShare(tokens, heads) {
    let sum = 0;
    for (const token of tokens) for (const head of heads) sum += attention.memory[token * attention.heads + head];
    return sum / 1000 / Math.max(1, tokens.length * heads.length);
  }

  // The tokens that the panel speaks of: the one that is shown, or all that have a memory.
  function shownTokens() {
    const token = shown();
    if (token !== null) return [token];
    return [...data.tokens.keys()].filter((k) => k >= data.tgt_len);
  }

  function shown() {
    return state.hovered ?? state.selected;
  }

  // The weights by distance, in bins that each begin at a power of two.
  function byDistance(tokens, heads) {
    const bins = [];
    for (const token of tokens) {
      for (const key of keysOf(token, heads)) {
        const bin = Math.floor(Math.log2(key.distance));
        while (bins.length <= bin) bins.push({ from: 2 ** bins.length, remembered: 0, segment: 0 });
        bins[bin][key.remembered ? "remembered" : "segment"] += key.weight / tokens.length;
      }
    }
    return bins;
  }

  // ------------------------------------------------------------------------------------------------ in words

  function nats(value) {
    const words = value.toFixed(2);
    return Number(words) === 0 ? "0.00" : words.replace("-", "\u2212");
  }

  function signed(value) {
    return (value >= 0.005 ? "+" : "") + nats(value);
  }

  function percent(share) {
    const value = 100 * share;
    if (value > 0 && value < 0.01) return "<\u00a00.01\u00a0%";
    return `${value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0)}\u00a0%`;
  }

  function plural(count, thing) {
    return `${count.toLocaleString("en")} ${thing}${count === 1 ? "" : "s"}`;
  }

  function nameOf(token) {
    if (token < 0) return "start of the text";
    return data.tokens[token] === "" ? "a part of a character" : JSON.stringify(data.tokens[token]);
  }

  function positionOf(token) {
    const before = data.tokens.slice(0, token).join("");
    return `token ${(token + 1).toLocaleString("en")} of ${data.tokens.length.toLocaleString("en")}, line ${before.split("\n").length}`;
  }

  function contextOf(token) {
    const inSegment = token - segmentStart(token) + 1;
    const segment = segmentStart(token) / data.tgt_len + 1;
    const words = `Predicted in segment ${segment} from ${plural(inSegment, "token")} of it`;
    if (!attention) return `${words} and from its memory.`;
    const remembered = attention.reach[token] - inSegment;
    return `${words} and ${remembered > 0 ? plural(remembered, "remembered one") : "none remembered"}.`;
  }

  function describe(token) {
    return (
      `${nameOf(token)}, ${positionOf(token)}: probability ${percent(Math.exp(-data.loss[token]))}, ` +
      `loss ${nats(data.loss[token])} nats with memory, ${nats(data.alone[token])} without, ` +
      `gain ${signed(gain[token])}. ${contextOf(token)}`
    );
  }

  // ------------------------------------------------------------------------------------------------ elements

  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  // A choice of one of several buttons, in rows. Arrow keys move, and choose; Tab enters and leaves.
  function radioGroup(group, rows, choose) {
    const buttons = rows.flat();
    const select = (chosen) => {
      for (const button of buttons) {
        button.setAttribute("role", "radio");
        button.setAttribute("aria-checked", String(button === chosen));
        button.tabIndex = button === chosen ? 0 : -1;
      }
    };
    const pick = (button) => {
      select(button);
      choose(buttons.indexOf(button));
    };
    buttons.forEach((button) => button.addEventListener("click", () => pick(button)));
    group.setAttribute("role", "radiogroup");
    group.addEventListener("keydown", (event) => {
      const next = neighbour(rows, event.target, event.key);
      if (!next) return;
      event.preventDefault();
      next.focus();
      pick(next);
    });
    return select;
  }

  function neighbour(rows, button, key) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const row = rows.findIndex((buttons) => buttons.includes(button));
    if (!steps[key] || row < 0) return null;
    const [down, right] = steps[key];
    const buttons = rows[row + down];
    if (!buttons) return null;
    const column = rows[row].indexOf(button) + right;
    return buttons[down ? Math.min(column, buttons.length - 1) : column] || null;
  }

  // --------------------------------------------------------------------------------------------- the heading

  function heading() {
    const memory = !attention
      ? ", and with the model's memory"
      : data.mem_len
        ? ` with a memory of ${data.mem_len.toLocaleString("en")}`
        : ", without memory";
    const facts = `${data.run} at step ${data.step.toLocaleString("en")} \u00b7 ${plural(data.tokens.length, "token")}, read in segments of ${data.tgt_len.toLocaleString("en")}${memory}`;
    const header = element("header", {}, element("h1", {}, "What the memory does in a text"), element("p", { class: "facts" }, facts));
    if (data.text_tokens > data.tokens.length) {
      const cut = `The text has ${plural(data.text_tokens, "token")}; these are the first ${data.tokens.length.toLocaleString("en")} (max_tokens).`;
      header.append(element("p", { class: "notice" }, cut));
    }
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const figures = [
      ["", nats(mean(data.loss)), "nats per token with memory"],
      ["", nats(mean(data.alone)), "without, each segment alone"],
      [" memory", signed(mean(gain)), "gained by the memory"],
    ];
    const shownFigures = figures.map(([kind, value, words]) =>
      element("div", { class: `figure${kind}` }, element("b", {}, value), element("span", {}, words)),
    );
    header.append(element("div", { class: "figures" }, ...shownFigures));
    return header;
  }

  // ---------------------------------------------------------------------------------------------- the colours

  const NICE = [0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30];

  function topOf(values) {
    const sorted = [...values].sort((one, other) => one - other);
    const high = sorted[Math.floor(0.97 * (sorted.length - 1))];
    return NICE.find((top) => top >= high) ?? NICE.at(-1);
  }

  const lossTop = topOf([...data.loss, ...data.alone]);
  const gainTop = topOf(gain.map(Math.abs));
  const COLOURS = {
    gain: { label: "Gain", values: gain, top: gainTop, ticks: [`\u2264 \u2212${gainTop}`, "0", `\u2265 +${gainTop} nats`] },
    loss: { label: "Loss with memory", values: data.loss, top: lossTop, ticks: ["0", String(lossTop / 2), `\u2265 ${lossTop} nats`] },
    alone: { label: "Loss without", values: data.alone, top: lossTop, ticks: ["0", String(lossTop / 2), `\u2265 ${lossTop} nats`] },
  };

  function colourBar() {
    const names = Object.keys(COLOURS);
    const buttons = names.map((name) => element("button", { type: "button" }, COLOURS[name].label));
    const group = element("div", { class: "switch", "aria-label": "Colour of the tokens" }, ...buttons);
    const legend = element("div", { class: "legend" });
    const choose = (number) => {
      state.colour = names[number];
      legend.replaceChildren(...scale(state.colour === "gain" ? "gain" : "loss", COLOURS[state.colour].ticks));
      colourTokens();
    };
    radioGroup(group, [buttons], choose)(buttons[names.indexOf(state.colour)]);
    choose(names.indexOf(state.colour));
    return element("div", { class: "bar" }, group, legend);
  }

  function scale(kind, ticks) {
    const labels = ticks.map((tick) => element("span", {}, tick));
    return [element("div", { class: `scale ${kind}` }), element("div", { class: "ticks" }, ...labels)];
  }

  function colourTokens() {
    const { values, top } = COLOURS[state.colour];
    text.dataset.colour = state.colour;
    tokens.forEach((token, k) => {
      const heat = Math.min(1, Math.abs(values[k]) / top);
      token.style.setProperty("--heat", heat.toFixed(3));
      token.classList.toggle("hurts", values[k] < 0);
    });
  }

  // ------------------------------------------------------------------------------------------------- the text

  const start = element("span", { class: "token start", "aria-hidden": "true", title: "the start of the text" }, "\u25b8 ");
  const tokens = data.tokens.map(makeToken);
  const arcs = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const text = makeText();

  function makeToken(piece, k) {
    const token = element("span", { class: "token", role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": describe(k) });
    token.append(...visible(piece));
    token.dataset.token = k;
    return token;
  }

  // A token's text in which white space, controls and parts of characters can be seen.
  function visible(piece) {
    const mark = (character) => element("span", { class: "mark" }, character);
    if (piece === "") return [mark("\u25cc")];
    const isBlank = piece.trim() === "";
    return [...piece].map((character) => {
      if (character === "\n") return element("span", {}, mark("\u23ce"), "\n");
      if (character === "\t") return element("span", {}, mark("\u2192"), "\t");
      if (character === " " && isBlank) return element("span", { class: "space" }, " ");
      if (character < " ") return mark(String.fromCharCode(0x2400 + character.charCodeAt(0)));
      return character;
    });
  }

  function makeText() {
    const made = element("div", { class: "text", role: "listbox", "aria-label": "The text, token by token", "aria-orientation": "horizontal" });
    arcs.setAttribute("class", "arcs");
    arcs.setAttribute("aria-hidden", "true");
    made.append(arcs, start);
    tokens.forEach((token, k) => {
      if ((k + 1) % data.tgt_len === 0) made.append(border((k + 1) / data.tgt_len + 1));
      made.append(token);
    });
    made.addEventListener("pointermove", (event) => movedByHand(event) && hover(event.target));
    made.addEventListener("pointerleave", () => hover(null));
    made.addEventListener("click", (event) => tokenAt(event.target)?.focus());
    made.addEventListener("focusin", (event) => {
      select(tokens.indexOf(event.target));
      event.target.scrollIntoView({ block: "nearest" }); // on a narrow screen the panel has just covered the lower half
    });
    made.addEventListener("keydown", moveByKey);
    return made;
  }

  // Where a segment begins to be read: what stands before is memory to it.
  function border(segment) {
    return element("span", { class: "border", "aria-hidden": "true", "data-segment": segment });
  }

  function tokenAt(target) {
    return target && target.closest('[role="option"]');
  }

  let mousePlace = "";

  // Text that scrolls below a resting mouse, as under the arrow keys, is not pointed at.
  function movedByHand(event) {
    const place = `${event.screenX} ${event.screenY}`;
    const moved = event.pointerType === "mouse" && place !== mousePlace;
    mousePlace = place;
    return moved;
  }

  function hover(target) {
    const token = tokenAt(target);
    const hovered = token ? Number(token.dataset.token) : null;
    if (hovered === state.hovered) return;
    state.hovered = hovered;
    update();
  }

  function select(token) {
    tokens[state.selected ?? 0].tabIndex = -1;
    state.selected = token < 0 ? null : token;
    state.hovered = null;
    tokens[state.selected ?? 0].tabIndex = 0;
    update();
  }

  function moveByKey(event) {
    if (event.key === "Escape") {
      document.activeElement.blur();
      select(-1);
      return;
    }
    const next = destination(event.key, tokens.indexOf(event.target));
    if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    tokens[Math.max(0, Math.min(tokens.length - 1, next))].focus();
  }

  function destination(key, token) {
    switch (key) {
      case "ArrowLeft": return token - 1;
      case "ArrowRight": return token + 1;
      case "ArrowUp": return inNextLine(token, -1);
      case "ArrowDown": return inNextLine(token, 1);
      case "PageUp": return token - data.tgt_len;
      case "PageDown": return token + data.tgt_len;
      case "Home": return 0;
      case "End": return tokens.length - 1;
    }
  }

  // The token of the line above or below that is nearest.
  function inNextLine(token, step) {
    const from = boxOf(tokens[token]);
    let best = token;
    let line = null;
    for (let k = token + step; k >= 0 && k < tokens.length; k += step) {
      const box = boxOf(tokens[k]);
      if (line === null && Math.abs(box.top - from.top) < from.height / 2) continue;
      if (line !== null && Math.abs(box.top - line) > from.height / 2) break;
      if (line === null || Math.abs(middle(box) - middle(from)) < Math.abs(middle(boxOf(tokens[best])) - middle(from))) best = k;
      line = box.top;
    }
    return best;
  }

  function boxOf(token) {
    return token.getClientRects()[0] ?? token.getBoundingClientRect();
  }

  function middle(box) {
    return box.left + box.width / 2;
  }

  // ------------------------------------------------------------------------------- where attention goes, in the text

  function markKeys(token, keys) {
    for (const each of text.querySelectorAll(".key, .unseen")) each.classList.remove("key", "remembered", "unseen");
    text.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    if (token === null) return;
    tokens[token].setAttribute("aria-selected", "true");
    if (!attention) return;
    const first = token - attention.reach[token];
    tokens.forEach((each, k) => (k > token || k < first) && each.classList.add("unseen"));
    for (const key of keys) {
      const marked = key.token < 0 ? start : tokens[key.token];
      marked.classList.add("key");
      marked.classList.toggle("remembered", key.remembered);
      marked.style.setProperty("--key", Math.sqrt(key.weight / keys[0].weight).toFixed(3));
    }
  }

  function drawArcs(token, keys) {
    arcs.replaceChildren();
    if (token === null || !attention) return;
    const origin = text.getBoundingClientRect();
    const from = boxOf(tokens[token]);
    for (const key of keys.slice(0, MOST_ARCS).reverse()) {
      const to = boxOf(key.token < 0 ? start : tokens[key.token]);
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", arc(from, to, origin));
      path.setAttribute("class", key.remembered ? "remembered" : "");
      path.setAttribute("stroke-width", (1 + 4 * Math.sqrt(key.weight)).toFixed(2));
      path.setAttribute("stroke-opacity", (0.12 + 0.6 * (key.weight / keys[0].weight)).toFixed(2));
      arcs.append(path);
    }
  }

  function arc(from, to, origin) {
    const x1 = middle(from) - origin.left;
    const x2 = middle(to) - origin.left;
    const y1 = from.top - origin.top;
    if (Math.abs(from.top - to.top) < from.height / 2) {
      const rise = Math.min(16, 6 + Math.abs(x1 - x2) / 12);
      return `M${x1} ${y1} C${x1} ${y1 - rise} ${x2} ${y1 - rise} ${x2} ${y1}`;
    }
    const y2 = to.bottom - origin.top;
    const bend = (y1 - y2) / 2;
    return `M${x1} ${y1} C${x1} ${y1 - bend} ${x2} ${y2 + bend} ${x2} ${y2}`;
  }

  // ---------------------------------------------------------------------------------------------------- the panel

  const details = element("div", {});
  const panel = element("aside", { class: "panel", "aria-label": "The chosen token" }, details);
  const shares = element("p", { class: "shares" });
  const distances = element("div", {});
  const keyList = element("div", {});
  const cells = [];

  function fillPanel() {
    if (!attention) {
      panel.append(element("p", { class: "hint" }, "This model has no attention that could be shown."));
      return;
    }
    panel.append(element("h2", {}, "Attention on the memory"), shares, makeHeads());
    panel.append(element("div", { class: "legend" }, ...scale("share", ["0 %", "of a head\u2019s attention", "100 %"])));
    panel.append(distances, keyList);
  }

  function makeHeads() {
    const all = element("button", { type: "button", class: "all" }, "Mean of all heads");
    const widest = Math.max(...attention.sublayers.map(({ heads }) => heads.length));
    const grid = element("div", { class: "heads" });
    grid.style.gridTemplateColumns = `auto repeat(${widest}, minmax(16px, 1fr))`;
    grid.append(element("span", { class: "number" }, "layer"));
    for (let head = 0; head < widest; head++) grid.append(element("span", { class: "number", "aria-hidden": "true" }, String(head)));
    const rows = [[all]];
    const choices = [state.choice];
    for (const { layer, heads } of attention.sublayers) {
      const row = [element("button", { type: "button", "aria-label": `layer ${layer}, the mean of its heads` }, String(layer))];
      choices.push({ name: `layer ${layer}, the mean of its heads`, heads });
      heads.forEach((head, number) => {
        const name = `layer ${layer}, head ${number}`;
        const cell = element("button", { type: "button", class: "cell" });
        row.push(cell);
        cells.push({ cell, name, head });
        choices.push({ name, heads: [head] });
      });
      row[0].style.gridColumn = "1";
      grid.append(...row);
      rows.push(row);
    }
    const group = element("div", { "aria-label": "Which heads" }, all, grid);
    radioGroup(group, rows, (number) => {
      state.choice = choices[number];
      update();
    })(all);
    return group;
  }

  function showDetails(token) {
    panel.classList.toggle("idle", token === null);
    if (token === null) {
      details.replaceChildren(...overview());
      return;
    }
    const probability = element("span", { class: "probability" }, `probability ${percent(Math.exp(-data.loss[token]))}`);
    const name = element("p", { class: "chosen" }, element("mark", {}, ...visible(data.tokens[token])), probability);
    const place = positionOf(token);
    const words = element("p", { class: "hint" }, `${place[0].toUpperCase()}${place.slice(1)}. ${contextOf(token)}`);
    details.replaceChildren(name, lossBars(token), words);
  }

  // What the panel shows while no token is chosen: where to look first.
  function overview() {
    const hint = "Point at a token, click or tap to hold it, or move with the arrow keys. Below are means of all tokens that have a memory.";
    const items = strongestGains().map((k) => {
      const go = element("button", { type: "button", class: "go", onclick: () => tokens[k].focus() });
      go.append(element("code", {}, nameOf(k)), element("span", { class: "away" }, positionOf(k).split(" of ")[0]), element("span", { class: "weight" }, signed(gain[k])));
      return element("li", {}, go);
    });
    if (!items.length) return [element("p", { class: "hint" }, hint)];
    return [element("p", { class: "hint" }, hint), element("h2", {}, "The memory helps most at"), element("ul", { class: "keys" }, ...items)];
  }

  function lossBars(token) {
    const rows = [
      ["with memory", data.loss[token], nats(data.loss[token]), ""],
      ["without", data.alone[token], nats(data.alone[token]), " alone"],
      ["gain", gain[token], signed(gain[token]), gain[token] < 0 ? " gain hurts" : " gain"],
    ];
    const top = Math.max(1, data.loss[token], data.alone[token]);
    const bars = element("div", { class: "losses" });
    for (const [label, value, words, kind] of rows) {
      const fill = element("div", { class: `fill${kind}` });
      fill.style.width = `${(100 * Math.abs(value)) / top}%`;
      bars.append(element("span", {}, label), element("div", { class: "track" }, fill), element("span", { class: "value" }, `${words} nats`));
    }
    return bars;
  }

  function showHeads(of) {
    for (const { cell, name, head } of cells) {
      const share = memoryShare(of, [head]);
      cell.style.setProperty("--share", share.toFixed(3));
      cell.setAttribute("aria-label", `${name}: ${percent(share)} on the memory`);
      cell.title = `${name}: ${percent(share)}`;
    }
    shares.textContent = `${percent(memoryShare(of, state.choice.heads))} by ${state.choice.name}`;
  }

  function showDistances(of) {
    const bins = byDistance(of, state.choice.heads);
    const top = Math.max(...bins.map(({ remembered, segment }) => remembered + segment), 0.001);
    const bars = element("div", { class: "distances", role: "img", "aria-label": distanceWords(bins) });
    for (const { from, remembered, segment } of bins) {
      const part = (share, kind) => {
        const made = element("div", { class: `part${kind}` });
        made.style.height = `${(78 * share) / top}%`;
        return made;
      };
      const bin = element("div", { class: "bin", title: `from ${from} tokens back: ${percent(remembered + segment)}` });
      bin.append(part(remembered, " remembered"), part(segment, ""), element("div", { class: "label" }, String(from)));
      bars.append(bin);
    }
    const swatch = (kind) => element("span", { class: `swatch${kind}` });
    const legend = element("p", { class: "hint" }, swatch(" remembered"), "memory \u00a0 ", swatch(""), `its segment \u00a0 (the largest weights: ${percent(attention.kept)} of all)`);
    distances.replaceChildren(element("h2", {}, "How far back, in tokens"), bars, legend);
  }

  function distanceWords(bins) {
    return bins.map(({ from, remembered, segment }) => `from ${from}: ${percent(remembered + segment)}`).join(", ");
  }

  function listKeys(token, keys) {
    keyList.replaceChildren();
    if (token === null) return;
    const items = keys.slice(0, MOST_KEYS).map((key) => {
      const swatch = element("span", { class: `swatch${key.remembered ? " remembered" : ""}` });
      const name = element("code", {}, swatch, nameOf(key.token));
      const away = element("span", { class: "away" }, `${key.distance} back${key.remembered ? ", memory" : ""}`);
      return element("li", {}, name, away, element("span", { class: "weight" }, percent(key.weight)));
    });
    keyList.append(element("h2", {}, "Looks most at"), element("ul", { class: "keys" }, ...items));
  }

  function update() {
    const token = shown();
    const keys = token === null || !attention ? [] : keysOf(token, state.choice.heads);
    markKeys(token, keys);
    drawArcs(token, keys);
    showDetails(token);
    if (!attention) return;
    const of = shownTokens();
    showHeads(of);
    showDistances(of);
    listKeys(token, keys);
  }

  // ------------------------------------------------------------------------------------------------------ the page

  const borders = "A dashed line marks where a segment begins to be read: what stands before it is its memory. ";
  const byKeyboard = "Arrow keys move from token to token, Page Up and Page Down by a segment, Escape lets go of it.";
  fillPanel();
  document.getElementById("page").append(
    heading(),
    colourBar(),
    element("p", { class: "hint" }, borders, element("span", { class: "keyboard" }, byKeyboard)),
    element("div", { class: "columns" }, text, panel),
  );
  select(-1);
  new ResizeObserver(() => {
    const token = shown();
    drawArcs(token, token === null || !attention ? [] : keysOf(token, state.choice.heads));
  }).observe(text);
})();
