// What the page knows: nodes, edges, groups, and what people have chosen. No drawing.
// The files of this page share one scope: the page wraps them together, in the order model, drawing, panel, page.

const data = JSON.parse(document.getElementById("graph-data").textContent);
const nodes = data.nodes;
const byId = new Map(nodes.map((node) => [node.id, node]));
for (const node of nodes) Object.assign(node, { inputs: [], outputs: [] });
const edges = data.edges.weight.map((weight, i) => {
  const source = nodes[data.edges.source[i]];
  const target = nodes[data.edges.target[i]];
  const edge = { source, target, weight, share: target.input ? weight / target.input : 0 };
  source.outputs.push(edge);
  target.inputs.push(edge);
  return edge;
});
// What an edge has of the influence on the targets: its share of what its target hands on.
const score = (edge) => Math.abs(edge.share) * (edge.target.influence + (edge.target.weight || 0));
const strongest = [...edges].sort((a, b) => score(b) - score(a));

const GROUP_COLOURS = ["#8a5fb0", "#2b8a7e", "#b08a1e", "#b5527f", "#5a7d2a", "#4a6fc4", "#9a6a4a", "#3f8fb0"];
const state = {
  threshold: data.threshold,
  errors: true,
  selected: null, // a node or a collapsed group
  pinned: new Set(data.pinned.map((id) => byId.get(id))),
  labels: new Map(Object.entries(data.labels)),
  groups: [],
  unsaved: false,
};
for (const [name, ids] of Object.entries(data.supernodes)) {
  const group = addGroup(name, ids.map((id) => byId.get(id)).filter(Boolean));
  group.elsewhere = ids.filter((id) => !byId.has(id));
}

// A node is in one group: a new group takes its members out of others.
function addGroup(name, members) {
  for (const other of state.groups) other.members = other.members.filter((node) => !members.includes(node));
  state.groups = state.groups.filter((other) => other.members.length);
  const taken = new Set(state.groups.map((group) => group.name));
  let free = name;
  for (let i = 2; taken.has(free); i++) free = `${name} ${i}`;
  const used = new Set(state.groups.map((group) => group.colour));
  const colour = GROUP_COLOURS.find((c) => !used.has(c)) || GROUP_COLOURS[state.groups.length % GROUP_COLOURS.length];
  const group = { isGroup: true, kind: "group", name: free, members, elsewhere: [], colour, collapsed: false };
  state.groups.push(group);
  return group;
}

function nameOf(item) {
  return item.isGroup ? item.name : labelOf(item) || item.name;
}

function labelOf(node) {
  return state.labels.get(node.id) || "";
}

// What stands for a node in the picture: the first collapsed group that it belongs to, or the node itself.
function standsFor(node) {
  return state.groups.find((group) => group.collapsed && group.members.includes(node)) || node;
}

function isShown(node) {
  if (node.kind === "embedding" || node.kind === "target") return true;
  if (node === state.selected || state.pinned.has(node)) return true;
  if (node.kind === "error" && !state.errors) return false;
  return state.threshold >= 1 || node.cumulative <= state.threshold;
}

// The nodes and collapsed groups in the picture; a collapsed group shows as long as any of its members would.
function shownItems() {
  return [...new Set(nodes.filter(isShown).map(standsFor))];
}

// The edges of a node or of a collapsed group, the strongest first. An edge of a group is the sum over its members.
function connections(item) {
  const members = item.isGroup ? item.members : [item];
  const inside = new Set(members);
  const inputs = new Map();
  const outputs = new Map();
  for (const member of members) {
    for (const edge of member.inputs) if (!inside.has(edge.source)) gather(inputs, standsFor(edge.source), edge);
    for (const edge of member.outputs) if (!inside.has(edge.target)) gather(outputs, standsFor(edge.target), edge);
  }
  const total = inputOf(item);
  return {
    inputs: ranked(inputs, () => total),
    outputs: ranked(outputs, inputOf),
  };
}

function gather(sums, other, edge) {
  sums.set(other, (sums.get(other) || 0) + edge.weight);
}

function ranked(sums, totalOf) {
  return [...sums]
    .map(([other, weight]) => ({ other, weight, share: totalOf(other) ? weight / totalOf(other) : 0 }))
    .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

// The absolute sum of all edges into a node, of those too that this page leaves out.
function inputOf(item) {
  return item.isGroup ? item.members.reduce((sum, member) => sum + member.input, 0) : item.input;
}

function searchFor(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const rank = (node) => {
    const own = [nameOf(node), node.id, `${node.layer}.${node.feature}`].map((t) => t.toLowerCase());
    if (own.some((t) => t === wanted)) return 0;
    if (own.some((t) => t.includes(wanted))) return 1;
    const tokens = (infoOf(node).top_tokens || []).map((t) => String(Array.isArray(t) ? t[0] : t).toLowerCase());
    if (node.token.toLowerCase().includes(wanted)) return 2;
    return tokens.some((t) => t.includes(wanted)) ? 3 : -1;
  };
  return nodes
    .map((node) => ({ node, rank: rank(node) }))
    .filter((found) => found.rank >= 0)
    .sort((a, b) => a.rank - b.rank || b.node.influence - a.node.influence)
    .map((found) => found.node);
}

function infoOf(node) {
  for (const key of [node.id, `${node.group}_${node.feature}`]) {
    if (node.kind === "feature" && Object.hasOwn(data.features, key)) return data.features[key];
  }
  return {};
}

// What is saved: `with_notes` reads it back into a graph. An empty text or list says that something is gone.
function notes() {
  const gone = Object.fromEntries(Object.keys(data.supernodes).map((name) => [name, []]));
  const groups = state.groups.map((group) => [group.name, [...group.members.map((node) => node.id), ...group.elsewhere]]);
  return {
    format: "clt_plugin graph notes",
    version: 1,
    prompt: data.prompt,
    labels: Object.fromEntries(state.labels),
    supernodes: { ...gone, ...Object.fromEntries(groups) },
    pinned: [...state.pinned].map((node) => node.id),
  };
}
