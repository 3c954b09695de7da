"use strict";

// Draws the picture that the page's JSON block holds: nodes in a grid of rows and columns, edges below
// them, names above. What is on screen follows from `state`, the picture and the view (size and zoom).

const picture = JSON.parse(document.getElementById("picture").textContent);
const { nodes, edges } = picture;
const SHAPES = {
  MLP: d3.symbolCircle,
  Attn: d3.symbolDiamond,
  Embedding: d3.symbolSquare,
  PositionEmbedding: d3.symbolSquare,
  Error: d3.symbolTriangle,
  Bias: d3.symbolCross,
  Logit: d3.symbolStar,
};
const KINDS = {
  MLP: "MLP features",
  Attn: "attention features",
  Embedding: "token embeddings",
  PositionEmbedding: "position embeddings",
  Error: "errors",
  Bias: "biases",
  Logit: "logits",
};
// where columns are tokens, an embedding's column says its name
const UNNAMED = new Set(picture.columns_are === "tokens" ? ["Embedding", "PositionEmbedding"] : []);
const MARGIN = { left: 84, right: 18, top: 18, bottom: 96 }; // px, of the axes
const EXPORT = { width: 1100, height: 620, head: 96 }; // px, the least size of a saved figure
const FIRST_EDGES = 300; // as many are drawn at first
const LISTED = 60; // edges in a card
const LONGEST = 24; // characters of a name in the figure

nodes.forEach((node, i) => Object.assign(node, { i, into: [], out: [] }));
for (const edge of edges) {
  nodes[edge.target].into.push(edge);
  nodes[edge.source].out.push(edge);
}
for (const node of nodes) {
  node.into.sort((a, b) => b.strength - a.strength);
  node.out.sort((a, b) => b.strength - a.strength);
}
const byStrength = d3.sort(edges, (edge) => -edge.strength);
const largest = d3.max(nodes, (node) => Math.abs(node.size)) || 1;
const strongest = byStrength[0]?.strength || 1;
const root = Math.max(0, nodes.findIndex((node) => node.root));
const edgeScale = logScale(edges.map((edge) => edge.strength));
const nodeScale = logScale(nodes.map((node) => Math.abs(node.size)));

const state = {
  edgesFrom: byStrength.length > FIRST_EDGES ? byStrength[FIRST_EDGES - 1].strength : 0,
  nodesFrom: 0,
  hidden: new Set(), // kinds and parts
  from: 0,
  to: picture.rows.length - 1,
  words: "",
  pinned: null, // node that stays, by its place
  near: null, // node under the pointer or with the focus
  current: root, // node that Tab enters at
};
let shown = []; // nodes that pass the filters
let grid = null; // where rows and columns are
let view = { width: 800, height: 600, zoom: d3.zoomIdentity, exporting: false };

// ---------------------------------------------------------------- filters

/** A slider of 0..100 over positive values, by their logarithm; 0 lets everything through. */
function logScale(values) {
  const positive = values.filter((value) => value > 0);
  const [low, high] = positive.length ? d3.extent(positive) : [1, 1];
  const span = Math.log(high / low) || 1;
  return {
    value: (slider) => (slider > 0 ? low * Math.exp((span * slider) / 100) * (1 - 1e-9) : 0),
    slider: (value) => (value > low ? Math.ceil((100 * Math.log(value / low)) / span) : 0),
  };
}

function passes(node) {
  return (
    Math.abs(node.size) >= state.nodesFrom &&
    node.row >= state.from &&
    node.row <= state.to &&
    !state.hidden.has(node.kind) &&
    !state.hidden.has(node.part)
  );
}

function drawnEdges() {
  const inside = new Set(shown.map((node) => node.i));
  return byStrength.filter(
    (edge) =>
      edge.strength >= state.edgesFrom &&
      inside.has(edge.source) &&
      inside.has(edge.target) &&
      !state.hidden.has(edge.part),
  );
}

/** What a search finds: all its words, in whatever a node says of itself. */
function found(node) {
  const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return false;
  const column = picture.columns[node.column].name;
  const said = [node.name, node.label, node.caption, column, ...node.facts.map((fact) => fact[1])].join(" ").toLowerCase();
  return words.every((word) => said.includes(word));
}

// ---------------------------------------------------------------- layout

/**
 * Gives every shown node its place. A cell's nodes stand side by side, the largest first, in lines as
 * long as its column has slots; what is left of the wanted aspect goes to the columns or to the rows.
 */
function arrange(aspect) {
  shown = nodes.filter(passes);
  const slot = shown.length <= 60 ? 44 : shown.length <= 250 ? 30 : 20;
  const gap = slot * 0.8;
  const cells = d3.rollup(shown, (cell) => d3.sort(cell, (node) => -Math.abs(node.size)), (node) => node.column, (node) => node.row);
  const slots = picture.columns.map((_, column) => {
    const most = d3.max(cells.get(column)?.values() ?? [], (cell) => cell.length) ?? 0;
    return Math.ceil(Math.sqrt(most * 1.6));
  });
  const lines = picture.rows.map((_, row) =>
    d3.max(picture.columns, (_, column) => Math.ceil((cells.get(column)?.get(row)?.length ?? 0) / (slots[column] || 1))),
  );
  const empty = picture.columns_are === "tokens" ? 16 : 0; // tokens stand there even without nodes
  const widths = slots.map((n) => (n ? n * slot + gap : empty));
  const heights = lines.map((n) => (n ? n * slot + gap : 0));
  spread(widths, d3.sum(heights) * aspect - d3.sum(widths), empty);
  spread(heights, d3.sum(widths) / aspect - d3.sum(heights), 0);
  const left = [0, ...d3.cumsum(widths)];
  const height = d3.sum(heights);
  const bottom = [0, ...d3.cumsum(heights)].map((y) => height - y);
  for (const [column, inColumn] of cells) {
    for (const [row, cell] of inColumn) {
      const across = (widths[column] - gap) / slots[column];
      const up = (heights[row] - gap) / lines[row];
      const rows = Math.ceil(cell.length / slots[column]);
      cell.forEach((node, i) => {
        const line = Math.floor(i / slots[column]);
        const inLine = Math.min(slots[column], cell.length - line * slots[column]);
        node.x = left[column] + widths[column] / 2 + ((i % slots[column]) - (inLine - 1) / 2) * across;
        node.y = bottom[row] - heights[row] / 2 + (line - (rows - 1) / 2) * up;
      });
    }
  }
  grid = { left, bottom, widths, heights, width: left.at(-1) || 1, height: height || 1 };
  const least = Math.min(slot * 0.4, 3 / fitted().k); // the smallest can still be seen and hit
  for (const node of shown) node.radius = Math.max(least, slot * 0.5 * Math.sqrt(Math.abs(node.size) / largest));
}

/** Adds `extra`, where it is positive, in proportion to the sizes above `empty`. */
function spread(sizes, extra, empty) {
  const used = d3.sum(sizes.filter((size) => size > empty));
  if (extra <= 0 || !used) return;
  sizes.forEach((size, i) => {
    if (size > empty) sizes[i] *= 1 + extra / used;
  });
}

function fitted() {
  const width = view.width - MARGIN.left - MARGIN.right;
  const height = view.height - MARGIN.top - MARGIN.bottom;
  const k = Math.min(width / grid.width, height / grid.height, 2);
  return d3.zoomIdentity
    .translate(MARGIN.left + (width - k * grid.width) / 2, MARGIN.top + (height - k * grid.height) / 2)
    .scale(k);
}

// ---------------------------------------------------------------- the page around the figure

const body = d3.select(document.body);
const header = body.append("header");
header.append("h1").text(picture.title);
for (const prompt of picture.prompts) {
  const line = header.append("p").attr("class", "prompt");
  for (const [text, marked] of prompt) line.append(marked ? "mark" : "span").text(text);
}
for (const line of picture.lines) header.append("p").text(line);

const controls = body.append("div").attr("class", "controls").attr("role", "toolbar").attr("aria-label", "Filters");
const search = controls.append("label").text("Search");
search
  .append("input")
  .attr("type", "search")
  .attr("id", "search")
  .attr("placeholder", "name, label, token")
  .on("input", (event) => {
    state.words = event.target.value;
    draw();
  })
  .on("keydown", (event) => {
    const first = d3.greatest(shown.filter(found), (node) => Math.abs(node.size));
    if (event.key === "Enter" && first) focusOn(first.i);
  });
slider("edges-from", `Edges: ${picture.strength}`, edgeScale, "edgesFrom", picture.percent);
slider("nodes-from", `Nodes: ${picture.size}`, nodeScale, "nodesFrom", picture.percent);
const layers = controls.append("fieldset").attr("aria-label", "Layers");
rowSelect("from", "Layers from");
rowSelect("to", "to");
if (Object.keys(picture.parts).length) boxes("Parts", Object.entries(picture.parts), (key) => [key, d3.symbolCircle]);
const kinds = Object.entries(KINDS).filter(([kind]) => nodes.some((node) => node.kind === kind));
boxes("Kinds", kinds, (kind) => [colour({ kind, part: null }), SHAPES[kind]]);
const counts = controls.append("output").attr("role", "status").attr("id", "counts");

const main = body.append("main");
const figure = main.append("div").attr("class", "figure");
const svg = figure
  .append("svg")
  .attr("role", "group")
  .attr("aria-label", "Graph. Arrow keys move between nodes, Enter keeps one, Escape lets it go.");
const buttons = header.append("div").attr("class", "buttons");
for (const [text, name, action] of [
  ["+", "Zoom in", () => svg.call(zoom.scaleBy, 1.4)],
  ["−", "Zoom out", () => svg.call(zoom.scaleBy, 1 / 1.4)],
  ["Fit", "Fit the graph into the window", fit],
  ["SVG", "Save the figure as SVG", () => save(new Blob([svgText()], { type: "image/svg+xml" }), "svg")],
  ["PNG", "Save the figure as PNG", savePng],
]) {
  buttons.append("button").attr("type", "button").attr("title", name).attr("aria-label", name).text(text).on("click", action);
}
if (!nodes.length) figure.append("p").attr("class", "empty").text(picture.empty);
const card = main.append("aside").attr("aria-live", "polite").attr("aria-label", "Chosen node");

function colour(node) {
  if (node.part) return node.part;
  return Object.keys(picture.parts).length ? "both" : node.kind;
}

function slider(id, name, scale, key, percent) {
  const label = controls.append("label").text(`${name} ≥`);
  const input = label.append("input").attr("type", "range").attr("id", id).attr("min", 0).attr("max", 100);
  const output = label.append("output").attr("for", id);
  const say = () => output.text(percent ? `${(100 * state[key]).toFixed(1)}%` : Math.ceil(state[key]));
  input.property("value", scale.slider(state[key])).on("input", (event) => {
    state[key] = scale.value(+event.target.value);
    say();
    rearrange();
  });
  say();
}

function rowSelect(key, name) {
  const select = layers.append("label").text(name).append("select").attr("id", key);
  select.selectAll("option").data(picture.rows).join("option").attr("value", (_, i) => i).text((row) => row);
  select.property("value", state[key]).on("change", (event) => {
    state[key] = +event.target.value;
    rearrange();
  });
}

function boxes(name, entries, look) {
  const set = controls.append("fieldset").attr("aria-label", name);
  for (const [key, text] of entries) {
    const label = set.append("label");
    label
      .append("input")
      .attr("type", "checkbox")
      .attr("name", key)
      .property("checked", true)
      .on("change", (event) => {
        if (event.target.checked) state.hidden.delete(key);
        else state.hidden.add(key);
        rearrange();
      });
    const [style, shape] = look(key);
    const icon = label.append("svg").attr("width", 14).attr("height", 14).attr("aria-hidden", true);
    icon.append("path").attr("class", style).attr("transform", "translate(7,7)").attr("d", d3.symbol(shape, 70)());
    label.append("span").text(text);
  }
}

// ---------------------------------------------------------------- the figure

const back = svg.append("rect").attr("class", "back").attr("width", "100%").attr("height", "100%");
const world = svg.append("g").attr("class", "world");
const bands = world.append("g").attr("aria-hidden", true);
const farEdges = world.append("g").attr("class", "edges").attr("aria-hidden", true);
const nearEdges = world.append("g").attr("class", "edges near").attr("aria-hidden", true);
const nodeLayer = world.append("g").attr("class", "nodes");
const names = svg.append("g").attr("class", "names").attr("aria-hidden", true);
const axes = svg.append("g").attr("class", "axes").attr("aria-hidden", true);
const zoom = d3
  .zoom()
  .scaleExtent([0.05, 16])
  .on("zoom", (event) => {
    view.zoom = event.transform;
    world.attr("transform", view.zoom);
    soon();
  });
svg.call(zoom).on("dblclick.zoom", null);
back.on("click", () => pin(null));

const link = d3
  .linkVertical()
  .source((edge) => nodes[edge.source])
  .target((edge) => nodes[edge.target])
  .x((node) => node.x)
  .y((node) => node.y);

const width = (edge) => 0.6 + 4.4 * Math.sqrt(edge.strength / strongest);
const edgeStyle = (edge) => ["edge", edge.part, edge.negative ? "against" : null].filter(Boolean).join(" ");

let waiting = false;
/** Axes and names once a frame while the figure moves. */
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawAxes();
    drawNames();
  });
}

/** Width over height of what is between the axes. */
function aspect({ width, height }) {
  return Math.max(1, width - MARGIN.left - MARGIN.right) / Math.max(1, height - MARGIN.top - MARGIN.bottom);
}

function rearrange() {
  arrange(aspect(view));
  if (state.pinned !== null && !passes(nodes[state.pinned])) state.pinned = null;
  if (!passes(nodes[state.current] ?? {})) state.current = d3.greatest(shown, (node) => Math.abs(node.size))?.i ?? root;
  draw();
  fit();
}

function fit() {
  svg.call(zoom.transform, fitted());
}

function draw() {
  const drawn = drawnEdges();
  const said = `${shown.length} of ${nodes.length} nodes, ${drawn.length} of ${edges.length} edges`;
  counts.text(state.words ? `${said}, ${shown.filter(found).length} found` : said);
  bands
    .selectAll("rect")
    .data(d3.range(picture.rows.length).filter((row) => grid.heights[row]))
    .join("rect")
    .attr("class", "band")
    .attr("x", -6)
    .attr("width", grid.width + 12)
    .attr("y", (row) => grid.bottom[row + 1] + 2)
    .attr("height", (row) => grid.heights[row] - 4);
  // one path for all edges of a style and width: thousands of edges cost as much as a few
  const bundles = d3.groups(drawn, (edge) => edgeStyle(edge), (edge) => Math.ceil(width(edge)));
  farEdges
    .selectAll("path")
    .data(bundles.flatMap(([style, byWidth]) => byWidth.map(([wide, bundle]) => ({ style, wide, bundle }))))
    .join("path")
    .attr("class", (d) => d.style)
    .attr("stroke-width", (d) => d.wide - 0.4)
    .attr("d", (d) => d.bundle.map(link).join(""));
  nodeLayer
    .selectAll("g")
    .data(shown, (node) => node.i)
    .join(enterNode)
    .attr("transform", (node) => `translate(${node.x},${node.y})`)
    .attr("tabindex", (node) => (node.i === state.current ? 0 : -1))
    .each(function (node) {
      d3.select(this).select(".ring").attr("r", node.radius * (node.kind === "Logit" ? 1.6 : 1.15) + 3);
      d3.select(this).select("path").attr("d", d3.symbol(SHAPES[node.kind] ?? d3.symbolCircle, Math.PI * node.radius ** 2)());
    });
  drawNear();
}

function enterNode(enter) {
  const group = enter
    .append("g")
    .attr("role", "button")
    .attr("aria-label", (node) => [node.name, node.label, ...node.facts.slice(0, 2).map((fact) => fact.join(" "))].filter(Boolean).join(", "))
    .on("pointerenter", (_, node) => near(node.i))
    .on("pointerleave", () => near(null))
    .on("focus", (_, node) => {
      makeCurrent(node.i);
      near(node.i);
    })
    .on("blur", () => near(null))
    .on("click", (_, node) => pin(state.pinned === node.i ? null : node.i));
  group.append("circle").attr("class", "ring");
  group.append("path").attr("class", colour);
  return group;
}

/** What depends on the pinned node, on the one pointed at and on the search: it follows the pointer. */
function drawNear() {
  const chosen = state.near ?? state.pinned;
  const own = chosen === null ? [] : [...nodes[chosen].into, ...nodes[chosen].out].filter(joinsShown);
  const beside = besides(chosen);
  farEdges.classed("dim", chosen !== null);
  nearEdges
    .selectAll("path")
    .data(own.slice(0, 600))
    .join("path")
    .attr("class", edgeStyle)
    .attr("stroke-width", width)
    .attr("d", link);
  nodeLayer.selectAll("g").attr("class", (node) => {
    const isFound = found(node);
    const dim = chosen !== null ? !beside.has(node.i) : Boolean(state.words) && !isFound;
    return d3
      .filter(["node", node.root && "root", isFound && "found", node.i === state.pinned && "pinned", dim && "dim"], Boolean)
      .join(" ");
  });
  nodeLayer.selectAll("g").attr("aria-pressed", (node) => node.i === state.pinned);
  drawAxes();
  drawNames();
  drawCard();
}

const joinsShown = (edge) => passes(nodes[edge.source]) && passes(nodes[edge.target]);

/** A node with those that share an edge with it; nothing for none. */
function besides(chosen) {
  if (chosen === null) return new Set();
  return new Set([chosen, ...nodes[chosen].into.map((edge) => edge.source), ...nodes[chosen].out.map((edge) => edge.target)]);
}

function drawAxes() {
  const { width, height, zoom: t } = view;
  const floor = view.exporting ? t.applyY(grid.height) : Math.min(height - MARGIN.bottom + 6, Math.max(60, t.applyY(grid.height)));
  const rowsAt = picture.rows
    .map((name, row) => ({ name, marked: false, at: t.applyY(grid.bottom[row] - grid.heights[row] / 2), size: grid.heights[row] }))
    .filter((row) => row.size && row.at > 8 && row.at < floor - 4);
  const columnsAt = picture.columns
    .map((column, i) => ({ ...column, at: t.applyX(grid.left[i] + grid.widths[i] / 2), size: grid.widths[i] }))
    .filter((column) => column.size && column.at > MARGIN.left - 20 && column.at < width);
  axes.selectAll("*").remove();
  axes.append("rect").attr("class", "margin").attr("width", MARGIN.left - 10).attr("height", height);
  axes.append("rect").attr("class", "margin").attr("y", floor + 2).attr("width", width).attr("height", Math.max(0, height - floor));
  const axis = axes.append("g").attr("class", "axis");
  for (const row of apart(rowsAt, 12)) axis.append("text").attr("x", 10).attr("y", row.at + 4).text(row.name);
  for (const column of apart(columnsAt, 12)) {
    axis
      .append("text")
      .attr("class", column.marked ? "marked" : null)
      .attr("text-anchor", "end")
      .attr("transform", `translate(${column.at + 4},${floor + 14}) rotate(-40)`)
      .text(short(column.name, 18));
  }
}

/** Those of the entries that stand at least `least` px from one that was taken before; marked ones are taken first. */
function apart(entries, least) {
  const taken = [];
  for (const entry of d3.sort(entries, (a) => (a.marked ? 0 : 1))) {
    if (taken.every((other) => Math.abs(other.at - entry.at) >= least)) taken.push(entry);
  }
  return taken;
}

/** Names of the most important nodes, as many as fit without covering each other. */
function drawNames() {
  const { width, height, zoom: t } = view;
  const chosen = state.near ?? state.pinned;
  const beside = besides(chosen);
  const rank = (node) => (node.i === chosen ? 3e9 : beside.has(node.i) ? 2e9 : node.root || found(node) ? 1e9 : 0) + Math.abs(node.size) / largest;
  const candidates = chosen === null ? shown.filter((node) => !UNNAMED.has(node.kind)) : shown.filter((node) => beside.has(node.i));
  const most = Math.min(90, (width * height) / 7000);
  const placed = [];
  for (const node of d3.sort(candidates, (node) => -rank(node))) {
    const text = short(node.caption, LONGEST);
    const half = text.length * 3 + 4;
    const [at, y] = [t.applyX(node.x), t.applyY(node.y) + node.radius * t.k + 11];
    const x = Math.max(at, MARGIN.left - 8 + half);
    if (at < MARGIN.left - 12 || x > width || y < 0 || y > height - (view.exporting ? 0 : MARGIN.bottom - 10)) continue;
    if (placed.some((other) => Math.abs(other.x - x) < other.half + half && Math.abs(other.y - y) < 12)) continue;
    placed.push({ x, y, half, text });
    if (placed.length >= most) break;
  }
  names
    .selectAll("text")
    .data(placed)
    .join("text")
    .attr("text-anchor", "middle")
    .attr("x", (name) => name.x)
    .attr("y", (name) => name.y)
    .text((name) => name.text);
}

function short(text, most) {
  const letters = [...text];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : text;
}

// ---------------------------------------------------------------- choosing nodes

function near(i) {
  state.near = i;
  drawNear();
}

function pin(i) {
  state.pinned = i;
  if (i !== null) makeCurrent(i);
  drawNear();
}

function makeCurrent(i) {
  state.current = i;
  nodeLayer.selectAll("g").attr("tabindex", (node) => (node.i === i ? 0 : -1));
}

function focusOn(i) {
  if (!passes(nodes[i])) return;
  const [x, y] = view.zoom.apply([nodes[i].x, nodes[i].y]);
  const out = x < MARGIN.left || x > view.width || y < 0 || y > view.height - MARGIN.bottom;
  if (out) svg.call(zoom.translateTo, nodes[i].x, nodes[i].y);
  nodeLayer.selectAll("g").filter((node) => node.i === i).node()?.focus();
}

/** The next node in a direction: near in it, and little to the side. */
function beyond(from, [dx, dy]) {
  const ahead = (node) => (node.x - from.x) * dx + (node.y - from.y) * dy;
  const aside = (node) => Math.abs((node.x - from.x) * dy) + Math.abs((node.y - from.y) * dx);
  return d3.least(shown.filter((node) => node !== from && ahead(node) > 0.5), (node) => ahead(node) + 3 * aside(node));
}

const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
svg.on("keydown", (event) => {
  const node = d3.select(event.target).datum();
  if (node?.i === undefined) return;
  if (DIRECTIONS[event.key]) focusOn((beyond(node, DIRECTIONS[event.key]) ?? node).i);
  else if (event.key === "Home") focusOn(root);
  else if (event.key === "Enter" || event.key === " ") pin(state.pinned === node.i ? null : node.i);
  else return;
  event.preventDefault();
});
body.on("keydown", (event) => {
  if (event.key !== "Escape") return;
  state.near = null;
  pin(null);
});

// ---------------------------------------------------------------- the card

let carded; // the node whose card is drawn: drawn again, it would close what a person opened in it

function drawCard() {
  const chosen = state.pinned ?? state.near;
  if (chosen === carded) return;
  carded = chosen;
  card.selectAll("*").remove();
  if (chosen === null) {
    card.append("p").attr("class", "hint").text("Point at a node or move to one with Tab and the arrow keys: here stands what drives it and what it drives. Click or Enter keeps it, Escape lets it go.");
    return;
  }
  const node = nodes[chosen];
  card.append("h2").text(node.name);
  if (node.label) card.append("p").attr("class", "label").text(`“${node.label}”`);
  const facts = card.append("dl");
  for (const [name, value] of node.facts) {
    facts.append("dt").text(name);
    facts.append("dd").text(value);
  }
  if (/^https?:\/\//.test(node.url ?? "")) {
    card.append("a").attr("href", node.url).attr("target", "_blank").attr("rel", "noopener noreferrer").text("Its page");
  }
  list(`Driven by ${node.into.length}`, node.into, (edge) => edge.source);
  list(`Drives ${node.out.length}`, node.out, (edge) => edge.target);
}

function list(title, listed, end) {
  if (!listed.length) return;
  card.append("h3").text(title);
  const items = card.append("ol");
  for (const edge of listed.slice(0, LISTED)) {
    const item = items.append("li");
    item.append("span").attr("class", edge.negative ? "amount against" : "amount").text(edge.text);
    item
      .append("button")
      .attr("type", "button")
      .text(nodes[end(edge)].name)
      .on("click", () => {
        pin(end(edge));
        focusOn(end(edge));
      });
    for (const head of edge.heads) drawHead(item, head);
  }
  if (listed.length > LISTED) items.append("li").attr("class", "hint").text(`and ${listed.length - LISTED} weaker`);
}

function drawHead(item, head) {
  const look = picture.looks[head.look];
  if (!look) {
    item.append("div").attr("class", "head").text(head.text);
    return;
  }
  const details = item.append("details");
  details.append("summary").text(head.text);
  details.append("p").text(look.text);
  details.append("ul").selectAll("li").data(look.pairs).join("li").text((pair) => pair);
}

// ---------------------------------------------------------------- saving

const INLINE = {
  text: ["fill", "font-family", "font-size", "font-weight", "text-anchor", "stroke", "stroke-width", "stroke-linejoin", "paint-order"],
  path: ["fill", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray"],
  circle: ["fill", "stroke", "stroke-width", "stroke-dasharray"],
  rect: ["fill", "opacity"],
  g: ["opacity"],
};

/** The whole figure as it is filtered and pinned now, in light colours: an SVG document without a style sheet. */
function svgText() {
  const before = view;
  document.documentElement.style.colorScheme = "light";
  state.near = null;
  arrange(EXPORT.width / EXPORT.height);
  const scale = Math.min(2, Math.max(1, EXPORT.width / grid.width));
  show({
    width: Math.ceil(grid.width * scale) + MARGIN.left + MARGIN.right,
    height: Math.ceil(grid.height * scale) + EXPORT.head + MARGIN.bottom,
    zoom: d3.zoomIdentity.translate(MARGIN.left, EXPORT.head).scale(scale),
    exporting: true,
  });
  const heading = svg.append("g");
  drawHeading(heading);
  const copy = svg.node().cloneNode(true);
  inline(svg.node(), copy);
  copy.setAttribute("width", view.width);
  copy.setAttribute("height", view.height);
  copy.setAttribute("viewBox", `0 0 ${view.width} ${view.height}`);
  heading.remove();
  document.documentElement.style.colorScheme = "";
  arrange(aspect(before));
  show(before);
  return new XMLSerializer().serializeToString(copy);
}

function show(wanted) {
  view = wanted;
  world.attr("transform", view.zoom);
  draw();
}

/** Title, prompts, sentences and the legend, above a saved figure. */
function drawHeading(heading) {
  const most = Math.floor(view.width / 6.2);
  heading.append("text").attr("class", "heading").attr("x", 10).attr("y", 20).text(short(picture.title, Math.floor(most / 1.4)));
  const texts = [...picture.prompts.map((prompt) => prompt.map(([text]) => text).join("")), ...picture.lines];
  texts.slice(0, 3).forEach((text, i) => {
    heading.append("text").attr("x", 10).attr("y", 37 + 15 * i).text(short(text, most));
  });
  let x = 10;
  const entry = (style, shape, text) => {
    heading.append("path").attr("class", style).attr("transform", `translate(${x + 5},${EXPORT.head - 13})`).attr("d", d3.symbol(shape, 60)());
    heading.append("text").attr("x", x + 14).attr("y", EXPORT.head - 9).text(text);
    x += 30 + text.length * 5.8;
  };
  for (const [key, text] of Object.entries(picture.parts)) if (!state.hidden.has(key)) entry(key, d3.symbolCircle, text);
  for (const [kind, text] of kinds) if (!state.hidden.has(kind)) entry(colour({ kind, part: null }), SHAPES[kind], text);
}

/** Writes what the style sheet says of an element into its copy's own attributes, and drops what a page alone needs. */
function inline(element, copy) {
  const style = getComputedStyle(element);
  for (const name of INLINE[element.tagName] ?? []) copy.setAttribute(name, style.getPropertyValue(name));
  const label = copy.getAttribute("aria-label");
  for (const name of ["class", "tabindex", "role", "aria-label", "aria-hidden", "aria-pressed"]) copy.removeAttribute(name);
  [...element.children].forEach((child, i) => inline(child, copy.children[i]));
  if (label) copy.prepend(Object.assign(document.createElementNS(copy.namespaceURI, "title"), { textContent: label }));
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${picture.title.replace(/[^\w-]+/g, "-")}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function savePng() {
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, "png"));
    URL.revokeObjectURL(image.src);
  };
  image.src = URL.createObjectURL(new Blob([svgText()], { type: "image/svg+xml" }));
}

// ---------------------------------------------------------------- begin

function measure() {
  const box = figure.node().getBoundingClientRect();
  view.width = box.width;
  view.height = box.height;
}

measure();
rearrange();
new ResizeObserver(() => {
  measure();
  rearrange();
}).observe(figure.node());

// With #svg the page is its own figure as text, which a program without a window can read.
if (location.hash === "#svg") {
  document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "svg", textContent: encodeURIComponent(svgText()) }));
}
