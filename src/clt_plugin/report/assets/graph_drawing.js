// Where nodes stand, and how they are drawn. Coordinates are pixels of the plot, so that spacing never depends on zoom.

const plot = document.getElementById("plot");
const COLOUR = { positive: "#1f66ad", negative: "#c2551b", ink: "#1c2430", soft: "#5b6675", faint: "#8b95a3" };
const SYMBOL = { feature: "circle", error: "diamond", embedding: "square", target: "square", group: "circle" };
const STEPS = [17, 15, 13, 12, 11, 10, 9, 8, 7]; // pixels from node to node: the first that fits the window
const LETTER = 6.6; // pixels, about
const FAINT_EDGES = 700; // the strongest, behind everything
const BRIGHT_EDGES = 80; // of what is chosen, each way
const N_WIDTHS = 5;
const WIDE_SHARE = 0.12; // of its target's input: an edge of less is never drawn at full width
const places = new Map(); // node -> [x, y]
let frame = { width: 0, height: 0, columns: [], rows: [], step: 0, margin: { l: 74, r: 26, t: 60, b: 40 } };

// Plotly reads a little HTML in every text; tokens and labels are to be shown as they are.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function short(text, length) {
  const letters = [...text];
  return letters.length > length ? letters.slice(0, length - 1).join("") + "…" : text;
}

function rowOf(node) {
  if (node.kind === "embedding") return 0;
  return node.kind === "target" ? data.n_layers + 1 : node.layer + 1;
}

// Place all nodes once per size of the window: a cell for each layer and position, its nodes in a small grid.
function arrange() {
  const top = data.n_layers + 1;
  const cells = new Map();
  for (const node of nodes) {
    const key = `${rowOf(node)}:${node.position}`;
    if (!cells.has(key)) cells.set(key, { row: rowOf(node), column: node.position, members: [] });
    cells.get(key).members.push(node);
  }
  for (const cell of cells.values()) {
    const flat = cell.row === 0 || cell.row === top;
    const high = flat ? 1 : Math.min(6, Math.ceil(Math.sqrt(cell.members.length / 2.2)));
    cell.wide = Math.ceil(cell.members.length / high);
    cell.members.sort((a, b) => (a.kind === "error") - (b.kind === "error") || b.influence - a.influence);
  }
  frame = frameFor([...cells.values()], top);
  for (const { row, column, members, wide } of cells.values()) {
    const gap = row === top ? frame.targetGap : frame.step;
    const high = Math.ceil(members.length / wide);
    members.forEach((node, i) => {
      const line = Math.floor(i / wide);
      const inLine = Math.min(wide, members.length - line * wide);
      const x = frame.columns[column].middle + ((i % wide) - (inLine - 1) / 2) * gap;
      const y = frame.rows[row].middle - (line - (high - 1) / 2) * frame.step;
      places.set(node, [x, y]);
    });
  }
}

// Columns and rows with room for their cells, as generous as fits the window; what fits at no step is scrolled.
function frameFor(cells, top) {
  const margin = marginFor(cells, top);
  const box = plot.parentElement;
  const room = [box.clientWidth - margin.l - margin.r - 2, box.clientHeight - margin.t - margin.b - 2];
  for (const step of STEPS) {
    const targetGap = Math.max(15, 1.8 * step);
    const widths = data.tokens.map(() => step);
    const heights = Array.from({ length: top + 1 }, () => step);
    for (const { row, column, members, wide } of cells) {
      widths[column] = Math.max(widths[column], wide * (row === top ? targetGap : step));
      heights[row] = Math.max(heights[row], Math.ceil(members.length / wide) * step);
    }
    const gap = Math.max(5, 0.7 * step);
    const [across, up] = [spread(widths, gap, room[0]), spread(heights, gap, room[1])];
    if (step === STEPS.at(-1) || (across.fits && up.fits)) {
      return { width: across.total, height: up.total, columns: across.at, rows: up.at, step, targetGap, margin };
    }
  }
}

// Room for the names of targets, aslant above, and of tokens below.
function marginFor(cells, top) {
  const targets = cells.filter((cell) => cell.row === top).flatMap((cell) => cell.members);
  const slope = targets.length > 1 ? 0.71 : 0.1;
  const longest = (texts) => Math.max(4, ...texts.map((text) => [...text].length)) * LETTER;
  const up = longest(targets.map(targetName)) * slope;
  return { l: 74, r: 12 + up, t: 30 + up, b: 22 + 0.77 * longest(data.tokens.map(tokenName)) };
}

function tokenName(token) {
  return short(token, 16);
}

function targetName(node) {
  return `${short(labelOf(node) || node.token || node.name, 20)} ${percent(node.weight)}`;
}

// Give each band the room it needs and share what is left; [{from, to, middle}] in pixels.
function spread(needs, gap, room) {
  const sum = needs.reduce((total, need) => total + need + gap, 0);
  const left = Math.max(0, room - sum) / needs.length;
  let from = 0;
  const at = needs.map((need) => {
    const to = from + need + gap + left;
    const band = { from, to, middle: (from + to) / 2 };
    from = to;
    return band;
  });
  return { at, total: from, fits: sum <= room };
}

function placeOf(item) {
  if (!item.isGroup) return places.get(item);
  const all = item.members.map((member) => places.get(member));
  return [0, 1].map((axis) => all.reduce((sum, place) => sum + place[axis], 0) / all.length);
}

function draw() {
  const items = shownItems();
  const shown = new Set(items);
  const chosen = chosenEdges(shown);
  const traces = [faintEdges(shown), ...brightEdges(chosen), ...halos(shown), nodeTrace(items, chosen), labelTrace(items)];
  Plotly.react(plot, traces, layout(items), { displayModeBar: false, doubleClick: "reset", responsive: false });
}

// The edges to point out: those of what is selected, or else those among what is pinned. [{from, to, weight, share}]
function chosenEdges(shown) {
  const item = state.selected;
  if (item) {
    const { inputs, outputs } = connections(item);
    const there = (list) => list.filter((edge) => shown.has(edge.other)).slice(0, BRIGHT_EDGES);
    return [
      ...there(inputs).map((edge) => ({ ...edge, from: edge.other, to: item })),
      ...there(outputs).map((edge) => ({ ...edge, from: item, to: edge.other })),
    ];
  }
  const pinned = [...new Set([...state.pinned].map(standsFor))];
  return pinned.flatMap((to) =>
    connections(to)
      .inputs.filter((edge) => pinned.includes(edge.other))
      .map((edge) => ({ ...edge, from: edge.other, to })),
  );
}

function faintEdges(shown) {
  const line = { x: [], y: [] };
  let count = 0;
  for (const edge of strongest) {
    if (count >= FAINT_EDGES) break;
    const [from, to] = [standsFor(edge.source), standsFor(edge.target)];
    if (from === to || !shown.has(from) || !shown.has(to)) continue;
    addLine(line, from, to);
    count += 1;
  }
  const strength = state.selected ? 0.05 : count > 300 ? 0.07 : 0.16;
  return lineTrace(line, `rgba(28,36,48,${strength})`, 1);
}

// One trace for each sign and width: a line of a trace has one width.
function brightEdges(chosen) {
  const strength = strengthAmong(chosen);
  const lines = new Map();
  for (const edge of chosen) {
    const width = Math.min(N_WIDTHS - 1, Math.floor(strength(edge) * N_WIDTHS));
    const key = `${edge.weight < 0 ? "negative" : "positive"}:${width}`;
    if (!lines.has(key)) lines.set(key, { x: [], y: [] });
    addLine(lines.get(key), edge.from, edge.to);
  }
  return [...lines]
    .sort(([a], [b]) => Number(a.split(":")[1]) - Number(b.split(":")[1]))
    .map(([key, line]) => {
      const [sign, width] = key.split(":");
      return { ...lineTrace(line, COLOUR[sign], 0.6 + 0.75 * Number(width)), opacity: 0.38 + 0.12 * Number(width) };
    });
}

// How strong an edge is drawn, from 0 to 1: among those chosen, but what is weak for its target stays faint.
function strengthAmong(chosen) {
  const largest = Math.max(...chosen.map((edge) => Math.abs(edge.share)), WIDE_SHARE);
  return (edge) => Math.sqrt(Math.abs(edge.share) / largest);
}

function addLine(line, from, to) {
  const [x0, y0] = placeOf(from);
  const [x1, y1] = placeOf(to);
  line.x.push(x0, x1, null);
  line.y.push(y0, y1, null);
}

function lineTrace(line, color, width) {
  return { type: "scatter", mode: "lines", ...line, line: { color, width }, hoverinfo: "skip", showlegend: false };
}

// Open groups: a patch of colour behind every member, joined to the group's name in their middle.
function halos(shown) {
  return state.groups
    .filter((group) => !group.collapsed)
    .flatMap((group) => {
      const members = group.members.filter((member) => shown.has(member));
      if (!members.length) return [];
      const middle = placeOf(group);
      const spokes = { x: [], y: [] };
      for (const member of members) {
        const [x, y] = places.get(member);
        spokes.x.push(middle[0], x, null);
        spokes.y.push(middle[1], y, null);
      }
      const at = members.map((member) => places.get(member));
      return [
        { ...lineTrace(spokes, group.colour, 1.4), opacity: 0.45 },
        {
          type: "scatter", mode: "markers", x: at.map((p) => p[0]), y: at.map((p) => p[1]), opacity: 0.32,
          marker: { size: frame.step + 8, color: group.colour, line: { width: 0 } }, hoverinfo: "skip", showlegend: false,
        },
      ];
    });
}

function nodeTrace(items, chosen) {
  const lit = new Map();
  for (const edge of chosen) {
    const other = edge.from === state.selected ? edge.to : edge.from;
    if (state.selected && other !== state.selected) lit.set(other, edge);
  }
  const strength = strengthAmong(chosen);
  const looks = items.map((item) => look(item, lit.get(item), strength));
  return {
    type: "scatter",
    mode: "markers",
    x: items.map((item) => placeOf(item)[0]),
    y: items.map((item) => placeOf(item)[1]),
    customdata: items.map((item) => (item.isGroup ? { group: item.name } : { node: item.id })),
    hovertext: items.map(hoverText),
    hoverinfo: "text",
    hoverlabel: { bgcolor: "#fff", bordercolor: "#d2d8df", font: { color: COLOUR.ink, size: 12 }, align: "left" },
    showlegend: false,
    marker: {
      symbol: items.map((item) => SYMBOL[item.kind]),
      size: looks.map((l) => l.size),
      color: looks.map((l) => l.color),
      opacity: looks.map((l) => l.opacity),
      line: { color: looks.map((l) => l.edge), width: looks.map((l) => l.width) },
    },
  };
}

function look(item, edge, strength) {
  const size = { feature: 0.68, error: 0.5, embedding: 0.62, target: 0.68, group: 1.5 }[item.kind] * frame.step;
  const base = { size, opacity: state.selected && item !== state.selected && !edge ? 0.35 : 1, width: 1, edge: "#77818e" };
  if (item.kind === "error") Object.assign(base, { color: "#fff", edge: "#aab2bd" });
  else if (item.kind === "embedding") Object.assign(base, { color: "#efe6d2", edge: "#b5a988" });
  else if (item.kind === "target") Object.assign(base, { color: "#4b5768", edge: "#2c3644" });
  else if (item.isGroup) Object.assign(base, { color: item.colour, edge: "#fff" });
  else base.color = grey((item.influence / data.largest_influence) ** 0.4);
  if (edge) {
    base.edge = edge.weight < 0 ? COLOUR.negative : COLOUR.positive;
    base.color = towards(base.edge, 0.25 + 0.75 * strength(edge));
  }
  if (state.pinned.has(item)) Object.assign(base, { edge: COLOUR.ink, width: 2, opacity: 1 });
  if (item === state.selected) Object.assign(base, { edge: COLOUR.ink, width: 3, size: size * 1.35 });
  return base;
}

function grey(strength) {
  return towards("#596575", 0.22 + 0.78 * Math.min(1, strength || 0));
}

// Mix white with a colour.
function towards(colour, strength) {
  const parts = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return `rgb(${parts.map((part) => Math.round(255 + (part - 255) * strength)).join(",")})`;
}

function hoverText(item) {
  if (item.isGroup) return `<b>${plain(short(item.name, 80))}</b><br>a group of ${item.members.length}`;
  const lines = [`<b>${plain(short(nameOf(item), 80))}</b>`];
  if (labelOf(item)) lines.push(plain(item.name));
  if (item.kind === "feature") lines.push(`activation ${number(item.activation)}`);
  if (item.kind === "target") lines.push(`value ${number(item.value)}, share ${percent(item.weight)}`);
  else lines.push(`influence ${percent(item.influence)}, kept from ${item.cumulative.toFixed(2)}`);
  return lines.join("<br>");
}

// Names of what people named: groups, and labelled nodes as long as there are few.
function labelTrace(items) {
  const there = new Set(items);
  const groups = state.groups.filter((group) => there.has(group) || (!group.collapsed && group.members.some((m) => there.has(m))));
  const named = items.filter((item) => !item.isGroup && item.kind !== "target" && labelOf(item));
  const all = [...groups, ...(named.length <= 40 ? named : named.filter((item) => state.pinned.has(item)))];
  const beside = (item) => item.isGroup && item.collapsed;
  return {
    type: "scatter",
    mode: "text",
    x: all.map((item) => placeOf(item)[0] + (beside(item) ? 1.25 * frame.step : 0)),
    y: all.map((item) => placeOf(item)[1] + (item.isGroup ? 0 : 0.35 * frame.step)),
    text: all.map((item) => plain(short(nameOf(item), 26))),
    textposition: all.map((item) => (beside(item) ? "middle right" : item.isGroup ? "middle center" : "top center")),
    textfont: { size: 11.5, color: all.map((item) => (item.isGroup ? item.colour : COLOUR.ink)) },
    cliponaxis: false,
    hoverinfo: "skip",
    showlegend: false,
  };
}

function layout(items) {
  const tokens = data.tokens.map(tokenName);
  const tight = tokens.some((token, i) => frame.columns[i].to - frame.columns[i].from < 7.2 * [...token].length);
  const line = { layer: "below", type: "line", xref: "x", yref: "y", line: { color: "#eceff3", width: 1 } };
  const names = frame.rows.map((_, row) => (row === 0 ? "tokens" : row > data.n_layers ? "targets" : `layer ${row - 1}`));
  return {
    width: frame.width + frame.margin.l + frame.margin.r,
    height: frame.height + frame.margin.t + frame.margin.b,
    margin: frame.margin,
    uirevision: `${frame.width}x${frame.height}`, // a zoom stays until the window changes
    hovermode: "closest",
    hoverdistance: 12,
    dragmode: "zoom",
    showlegend: false,
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    font: { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: COLOUR.ink },
    xaxis: {
      range: [0, frame.width], tickvals: frame.columns.map((c) => c.middle), ticktext: tokens.map(plain), showgrid: false,
      zeroline: false, tickangle: tight ? -50 : 0, ticks: "", automargin: false,
    },
    yaxis: {
      range: [0, frame.height], tickvals: frame.rows.map((r) => r.middle), ticktext: names, showgrid: false,
      zeroline: false, ticks: "", tickfont: { color: COLOUR.soft, size: 11 },
    },
    shapes: [
      ...frame.rows.slice(1).map((r) => ({ ...line, x0: 0, x1: frame.width, y0: r.from, y1: r.from })),
      ...frame.columns.slice(1).map((c) => ({ ...line, x0: c.from, x1: c.from, y0: 0, y1: frame.height })),
    ],
    annotations: targetNames(items),
  };
}

function targetNames(items) {
  const targets = items.filter((item) => item.kind === "target").slice(0, 24);
  return targets.map((item) => ({
    x: placeOf(item)[0],
    y: placeOf(item)[1] + frame.step * 0.6,
    text: plain(targetName(item)),
    textangle: targets.length > 1 ? -45 : 0,
    xanchor: targets.length > 1 ? "left" : "center",
    yanchor: "bottom",
    showarrow: false,
    font: { size: 11.5 },
  }));
}
