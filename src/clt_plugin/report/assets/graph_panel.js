// The panel at the side. Every text from the graph goes in as text, never as HTML.

const panel = document.getElementById("panel");
const FIRST = 10; // entries of a list before "all"
const expanded = new Set(); // lists shown whole, as long as the same item is selected

function make(tag, properties = {}, ...children) {
  const { className, ...rest } = properties;
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(rest)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

function signed(value) {
  return (value < 0 ? "−" : "+") + number(Math.abs(value));
}

function percent(share) {
  const value = Math.abs(share) * 100;
  return `${value >= 9.95 || value === 0 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : "<0.1"}%`;
}

function showPanel() {
  const item = state.selected;
  if (!item) panel.replaceChildren(...overview());
  else if (item.isGroup) panel.replaceChildren(...groupView(item));
  else panel.replaceChildren(...nodeView(item));
}

// ---------------------------------------------------------------- a node

function nodeView(node) {
  const url = node.kind === "feature" && data.neuronpedia
    ? `${data.neuronpedia.before}${node.layer}${data.neuronpedia.after}${node.feature}` : null;
  const pinned = state.pinned.has(node);
  return [
    make("h2", { id: "selected-name", textContent: nameOf(node) }),
    labelOf(node) ? make("p", { textContent: node.name }) : null,
    make("div", { className: "row" },
      make("input", {
        id: "label", type: "text", placeholder: "Give it a label", value: labelOf(node),
        "aria-label": "Label of this node", onchange: (event) => setLabel(node, event.target.value.trim()),
      }),
      make("button", { id: "pin", type: "button", className: pinned ? "on" : "", textContent: pinned ? "Pinned" : "Pin", onclick: () => togglePin(node) }),
    ),
    facts(node),
    url ? make("div", { className: "row" }, make("a", { id: "neuronpedia", href: url, target: "_blank", rel: "noopener noreferrer", textContent: "Open on Neuronpedia" })) : null,
    ...groupsOf(node),
    ...known(node),
    ...lists(node),
  ].filter((part) => part !== null);
}

function facts(node) {
  const rows = [["id", node.id]];
  if (node.kind !== "target" && node.position >= 0) rows.push(["token", `${node.token} (position ${node.position})`]);
  if (node.kind === "feature") rows.push(["activation", number(node.activation)], ["pre-activation", number(node.value)]);
  if (node.kind === "target") rows.push(["value", number(node.value)], ["share", percent(node.weight)]);
  else rows.push(["influence", `${percent(node.influence)} · kept from ${node.cumulative.toFixed(2)}`]);
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

function groupsOf(node) {
  const own = state.groups.filter((group) => group.members.includes(node));
  return own.length ? [heading("In the group"), ...own.map(groupRow)] : [];
}

// What is known of a feature from a corpus: its tokens, and texts in which it is active.
function known(node) {
  const info = infoOf(node);
  const parts = [];
  if (info.top_tokens && info.top_tokens.length) {
    const chips = info.top_tokens.map((token) => {
      const [text, value] = Array.isArray(token) ? token : [token, null];
      return make("span", { className: "chip", title: value === null ? text : `${text}  ${number(value)}`, textContent: visible(text) });
    });
    parts.push(heading("Top tokens"), make("div", { className: "chips", id: "top-tokens" }, ...chips));
  }
  if (info.examples && info.examples.length) {
    parts.push(heading("Where it is active"), make("div", { id: "examples" }, ...info.examples.map(example)));
  }
  return parts;
}

// An example is a text, or tokens with activations, which shade them.
function example(text) {
  if (typeof text === "string") return make("div", { className: "example", textContent: text });
  const largest = Math.max(...text.activations, 1e-12);
  const marks = text.tokens.map((token, i) => {
    const mark = make("mark", { textContent: token, title: number(text.activations[i]) });
    if (text.activations[i] > 0) mark.style.backgroundColor = `rgb(240 170 60 / ${Math.round((75 * text.activations[i]) / largest)}%)`;
    return mark;
  });
  return make("div", { className: "example" }, ...marks);
}

function visible(text) {
  return String(text).replaceAll("\n", "⏎").replaceAll("\t", "→").replaceAll("\r", "↵");
}

// ---------------------------------------------------------------- lists of edges

function lists(item) {
  const { inputs, outputs } = connections(item);
  const members = item.isGroup ? item.members : [item];
  const sum = (key) => members.reduce((total, member) => total + (member[key] || 0), 0);
  const apart = [["biases", sum("bias")], ["edges left out", sum("omitted")]].filter(([, weight]) => weight);
  const covered = inputs.reduce((total, edge) => total + Math.abs(edge.share), 0);
  const parts = [];
  if (inputs.length || apart.length) {
    const note = item.isGroup ? drawn(inputs) : `${drawn(inputs)}, ${percent(covered)} of input`;
    parts.push(heading("Inputs", note), edgeList("inputs", inputs, apart, inputOf(item)));
  }
  if (outputs.length) parts.push(heading("Outputs", drawn(outputs)), edgeList("outputs", outputs, [], 0));
  return parts;
}

function drawn(list) {
  return `${list.length} edge${list.length === 1 ? "" : "s"}${list.length > BRIGHT_EDGES ? ` (${BRIGHT_EDGES} drawn)` : ""}`;
}

function edgeList(name, list, apart, total) {
  const largest = Math.max(...list.map((edge) => Math.abs(edge.weight)), ...apart.map(([, weight]) => Math.abs(weight)), 1e-12);
  const shown = expanded.has(name) ? list : list.slice(0, FIRST);
  const rows = shown.map((edge) => entry(edge.other, nameOf(edge.other), edge.weight, edge.share, largest));
  // What is left out adds up to a weight, but has no share: its edges may cancel.
  const rest = apart.map(([text, weight]) => entry(null, text, weight, text === "biases" && total ? weight / total : null, largest));
  const more = list.length > shown.length
    ? make("button", { className: "link", type: "button", textContent: `all ${list.length}`, onclick: () => { expanded.add(name); showPanel(); } })
    : null;
  return make("div", { id: name }, ...rows, ...(more ? [more] : []), ...rest);
}

function entry(other, text, weight, share, largest) {
  const sign = weight < 0 ? "negative" : "positive";
  const stripe = make("span", { className: "stripe" });
  stripe.style.width = `calc((100% - 12px) * ${Math.abs(weight) / largest})`;
  const parts = [
    make("span", { className: "text", title: text, textContent: text }),
    make("span", { className: "weight", textContent: signed(weight) }),
    make("span", { className: "share", textContent: share === null ? "" : percent(share) }),
    stripe,
  ];
  if (!other) return make("div", { className: `entry apart ${sign}` }, ...parts);
  const hidden = !other.isGroup && !isShown(other) ? "hidden-node" : "";
  return make("button", { type: "button", className: `entry ${sign} ${hidden}`, "data-goes-to": other.isGroup ? other.name : other.id, onclick: () => select(other) }, ...parts);
}

function heading(text, sum = "") {
  return make("h3", {}, make("span", { textContent: text }), make("span", { className: "sum", textContent: sum }));
}

// ---------------------------------------------------------------- groups, and the page at rest

function groupView(group) {
  return [
    make("h2", { id: "selected-name", textContent: group.name }),
    make("p", { textContent: `A group of ${group.members.length}; its edges are sums over its members.` }),
    ...groupTools(group),
    heading("Members"),
    ...group.members.map((member) => memberRow(member, group.colour)),
    ...lists(group),
  ];
}

function groupTools(group) {
  return [
    make("div", { className: "row" },
      make("input", { type: "text", value: group.name, "aria-label": "Name of this group", onchange: (event) => renameGroup(group, event.target.value.trim()) }),
    ),
    make("div", { className: "row" },
      make("button", { type: "button", textContent: "Open", onclick: () => fold(group, false) }),
      make("button", { type: "button", textContent: "Dissolve", onclick: () => dissolve(group) }),
    ),
  ];
}

function groupRow(group) {
  return make("div", { className: "member", "data-group": group.name }, swatch(group.colour),
    make("button", { type: "button", className: "link", textContent: `${group.name} (${group.members.length})`, onclick: () => { fold(group, true); } }),
    make("button", { type: "button", className: "fold", textContent: group.collapsed ? "Open" : "Collapse", onclick: () => fold(group, !group.collapsed) }),
  );
}

function memberRow(node, colour) {
  return make("div", { className: "member" }, colour ? swatch(colour) : null,
    make("button", { type: "button", className: "link", textContent: nameOf(node), onclick: () => select(node) }),
    colour ? null : make("button", { type: "button", className: "link unpin", textContent: "unpin", onclick: () => togglePin(node) }));
}

function swatch(colour) {
  const square = make("span", { className: "swatch" });
  square.style.backgroundColor = colour;
  return square;
}

function overview() {
  const rows = Object.entries(data.about).map(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]);
  return [
    make("h2", { textContent: "The graph" }),
    make("p", { textContent: "Click a node to see what drives it and what it drives. Blue adds, orange takes away; darker nodes have more influence on the targets." }),
    legend(),
    ...(state.groups.length ? [heading("Groups"), make("div", { id: "groups" }, ...state.groups.map(groupRow))] : []),
    ...(state.pinned.size ? [heading("Pinned"), make("div", { id: "pinned" }, ...[...state.pinned].map((node) => memberRow(node, null)))] : []),
    heading("Checks"),
    make("p", { id: "certificate", textContent: data.certificate.text }),
    ...data.certificate.failures.map((failure) => make("p", { textContent: failure })),
    ...(rows.length ? [heading("Made with"), make("dl", { id: "about" }, ...rows.flat())] : []),
  ];
}

function legend() {
  const drawn = { feature: "M8 2a6 6 0 1 0 .01 0z", error: "M8 3l5 5-5 5-5-5z", embedding: "M3 3h10v10H3z", target: "M3 3h10v10H3z" };
  const fill = { feature: "#8f98a4", error: "#fff", embedding: "#efe6d2", target: "#4b5768" };
  const texts = { feature: "feature", error: "what the features miss of an MLP (error)", embedding: "token embedding", target: "target: an output token, as a rule" };
  const cells = Object.keys(drawn).flatMap((kind) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 16 16");
    for (const [name, value] of Object.entries({ d: drawn[kind], fill: fill[kind], stroke: "#77818e" })) path.setAttribute(name, value);
    svg.append(path);
    return [svg, make("span", { textContent: texts[kind] })];
  });
  return make("div", { className: "legend" }, ...cells);
}
