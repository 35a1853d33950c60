// What happens when people click, type and drag.

const page = (id) => document.getElementById(id);

function refresh() {
  draw();
  showPanel();
  const shown = nodes.filter(isShown).length;
  page("threshold-value").textContent = state.threshold.toFixed(2);
  page("count").textContent = `${shown} of ${nodes.length} nodes`;
  const kinds = new Set([...state.pinned].map((node) => node.kind));
  page("group").disabled = state.pinned.size < 2 || kinds.size > 1;
  page("save").textContent = state.unsaved ? "Save labels •" : "Save labels";
}

function select(item) {
  expanded.clear();
  state.selected = item && !item.isGroup ? standsFor(item) : item;
  refresh();
  panel.scrollTop = 0;
  if (state.selected) bringIntoView(state.selected);
}

function bringIntoView(item) {
  const box = plot.parentElement;
  const [x, y] = placeOf(item);
  const left = x + frame.margin.l;
  const top = frame.height - y + frame.margin.t;
  if (left < box.scrollLeft + frame.margin.l || left > box.scrollLeft + box.clientWidth - 40) box.scrollLeft = left - box.clientWidth / 2;
  if (top < box.scrollTop + 40 || top > box.scrollTop + box.clientHeight - 40) box.scrollTop = top - box.clientHeight / 2;
}

function changed() {
  state.unsaved = true;
  refresh();
}

function setLabel(node, text) {
  state.labels.set(node.id, text); // an empty one is saved too: it takes the graph's own away
  changed();
}

function togglePin(node) {
  if (!state.pinned.delete(node)) state.pinned.add(node);
  changed();
}

function fold(group, collapsed) {
  group.collapsed = collapsed;
  select(collapsed ? group : null);
}

function renameGroup(group, name) {
  if (name && !state.groups.some((other) => other !== group && other.name === name)) group.name = name;
  changed();
}

function dissolve(group) {
  state.groups = state.groups.filter((other) => other !== group);
  state.selected = null;
  changed();
}

function groupPinned() {
  const group = addGroup("group", [...state.pinned]);
  state.pinned.clear();
  state.unsaved = true;
  fold(group, true);
}

function save() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(notes(), null, 2)], { type: "application/json" }));
  const link = make("a", { href: url, download: "graph-labels.json" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  state.unsaved = false;
  refresh();
}

// ---------------------------------------------------------------- search

function showFound() {
  const text = page("search").value;
  const found = searchFor(text);
  const rows = found.slice(0, 12).map((node, i) =>
    make("button", { type: "button", role: "option", className: i ? "" : "first", onclick: () => pick(node) },
      make("span", { className: "text", textContent: nameOf(node) }),
      make("span", { className: "where", textContent: node.id })));
  const left = found.length - rows.length;
  if (!found.length) rows.push(make("div", { className: "none", textContent: "nothing found" }));
  if (left > 0) rows.push(make("div", { className: "none", textContent: `and ${left} more` }));
  page("found").replaceChildren(...rows);
  page("found").hidden = !text.trim();
}

function pick(node) {
  page("found").hidden = true;
  page("search").blur();
  select(node);
}

// ---------------------------------------------------------------- the keyboard

const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

// Go to the nearest node in a direction; what lies off to the side counts as farther away.
function move([dx, dy]) {
  const items = shownItems();
  if (!state.selected) return select(items.find((item) => item.kind === "target") || items[0]);
  const [x, y] = placeOf(state.selected);
  let best = null;
  for (const item of items) {
    const [ox, oy] = placeOf(item).map((value, axis) => value - [x, y][axis]);
    const along = ox * dx + oy * dy;
    const aside = Math.abs(ox * dy) + Math.abs(oy * dx);
    const distance = along + 3 * aside;
    if (item !== state.selected && along > 1 && (!best || distance < best.distance)) best = { item, distance };
  }
  return best ? select(best.item) : undefined;
}

function onKey(event) {
  const at = event.target instanceof Element ? event.target : document.body;
  const typing = at.matches("input[type=text], input[type=search]");
  if (event.key === "Escape") {
    if (!page("found").hidden) page("found").hidden = true;
    else if (!typing) select(null);
    if (typing) at.blur();
    return;
  }
  if (at.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in DIRECTIONS) move(DIRECTIONS[event.key]);
  else if (event.key === "/") page("search").focus();
  else if (event.key === "p" && state.selected && !state.selected.isGroup) togglePin(state.selected);
  else return;
  event.preventDefault();
}

// ---------------------------------------------------------------- the start

function fillHeader() {
  page("model").textContent = data.eyebrow;
  page("prompt").textContent = data.prompt || data.tokens.join("");
  page("prompt").title = data.prompt;
  page("note").textContent = data.note;
  page("threshold").value = state.threshold;
  const fact = (name, value, title, className = "") =>
    make("div", { className: `fact ${className}`, title }, make("div", { className: "name", textContent: name }), make("div", { className: "value", textContent: value }));
  const { holds, text, residual } = data.certificate;
  page("facts").replaceChildren(
    ...data.scores.map((score) => fact(score.name, score.value === null ? "–" : score.value.toFixed(3), score.title)),
    fact("certificate", holds ? `holds (${residual})` : `FAILS (${residual})`, text, holds ? "good" : "bad"),
  );
}

function listen() {
  plot.on("plotly_click", (event) => {
    const at = event.points.find((point) => point.customdata);
    if (!at) return;
    const { node, group } = at.customdata;
    select(node === undefined ? state.groups.find((g) => g.name === group) : byId.get(node));
  });
  page("threshold").addEventListener("input", (event) => { state.threshold = Number(event.target.value); refresh(); });
  page("errors").addEventListener("change", (event) => { state.errors = event.target.checked; refresh(); });
  page("group").addEventListener("click", groupPinned);
  page("save").addEventListener("click", save);
  page("search").addEventListener("input", showFound);
  page("search").addEventListener("focus", showFound);
  page("search").addEventListener("keydown", (event) => {
    const [first] = searchFor(event.target.value);
    if (event.key === "Enter" && first) pick(first);
  });
  document.addEventListener("mousedown", (event) => {
    if (!page("search").parentElement.contains(event.target)) page("found").hidden = true;
  });
  document.addEventListener("keydown", onKey);
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { arrange(); refresh(); }, 120);
  });
}

fillHeader();
arrange();
refresh();
listen();
document.body.dataset.ready = "yes";
