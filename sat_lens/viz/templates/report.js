/* Opens one head at a time: its patterns, its numbers, where it attends, examples. */

const data = JSON.parse(document.getElementById("data").textContent);
const cells = Array.from(document.querySelectorAll("#maps .cell"));
const stages = { soft: new Stage("soft-here"), saturated: new Stage("saturated-here") };
const strip = new Stage("strip-here");
let table = null, chosen = data.start, openLayer = -1, layerPair = null;

function byId(id) {
  return document.getElementById(id);
}

function choose(index, scroll) {
  for (const cell of cells) {
    const chosen = Number(cell.dataset.head) === index;
    cell.setAttribute("aria-pressed", String(chosen));
    cell.setAttribute("tabindex", chosen ? "0" : "-1");
  }
  const head = (name) => (data.columns[name] || [])[index];
  const [role, target] = [head("role"), head("target")];
  byId("head-label").textContent = data.labels[index];
  byId("head-role").textContent = [role || data.descriptions[role], target].filter(Boolean).join(", ");
  byId("head-role").className = `chip ${roleClass(role)}`;
  byId("head-words").textContent = words(role, target, head("saturable_nearest"));
  showNumbers(head);
  showMasses(head);
  showPatterns(index, [role, target].filter(Boolean).join(" "));
  chosen = index;
  showLayer();
  if (table) table.select(index);
  if (scroll) byId("head").scrollIntoView({ block: "start" });
}

function words(role, target, nearSaturated) {
  if (!role) return "No row of this head had enough keys to be counted, so it has no role.";
  const shape = data.descriptions[role] || "";
  const place = data.targets[target] || target;
  const looks = place ? `, looks at ${place}` : "";
  const near = nearSaturated ? "its rows are near to saturated ones" : "its rows are far from saturated ones";
  const text = `${shape}${looks}; ${near}.`;
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function showNumbers(head) {
  const share = (value) => (value === null ? "–" : `${Math.round(100 * value)}%`);
  const error = head("lean_se");
  const entries = [
    ["lean", `${numberText(head("lean"), 3)}${error === null ? "" : ` ± ${numberText(error, 3)}`}`],
    ["distance to argmax", numberText(head("tv_argmax"), 3)],
    ["distance to uniform", numberText(head("tv_mean"), 3)],
    ["distance to the nearest", numberText(head("tv_nearest"), 3)],
    ["keys of the nearest", numberText(head("median_m"), 1)],
    ["rows agreeing", share(head("agreement"))],
    ["effective keys", share(head("n_eff_share"))],
    ["rows counted", numberText(head("n_rows"), 0)],
  ];
  if (head("c_lo") !== undefined && head("c_hi") !== undefined) {
    entries.push(["c, uniform to limit", `${numberText(head("c_lo"), 2)} – ${numberText(head("c_hi"), 2)}`]);
  }
  if (head("effect") !== undefined) entries.push(["effect of saturating", numberText(head("effect"), 3)]);
  const present = entries.filter(([, text]) => text !== "undefined");
  byId("numbers").replaceChildren(...present.map(([name, text]) => entry(name, text)));
}

function entry(name, text, between) {
  const row = document.createElement("div");
  const term = document.createElement("dt"), value = document.createElement("dd");
  term.textContent = name;
  value.textContent = text;
  row.append(...[term, between, value].filter(Boolean));
  return row;
}

function showMasses(head) {
  const rows = data.masses.map((name) => {
    const value = head(name), track = document.createElement("div"), fill = document.createElement("div");
    track.className = "track";
    fill.className = "fill";
    fill.style.width = `${100 * (value || 0)}%`;
    track.append(fill);
    return entry(name, value === null ? "–" : numberText(value, 2), track);
  });
  const offset = head("modal_target"), share = head("modal_share");
  if (offset && typeof share === "number") {
    rows.push(entry("maximum", `${offset} in ${Math.round(100 * share)}% of rows`));
    rows[rows.length - 1].className = "wide";
  }
  byId("masses").replaceChildren(...rows);
}

function showPatterns(index, name) {
  const where = data.where[index];
  byId("pair").hidden = byId("strip-block").hidden = !where;
  byId("examples").hidden = !where;
  byId("pair-note").hidden = byId("layer").hidden = !where;
  if (!where) return;
  const site = data.sites[where[0]];
  const queries = data.texts[site.queries], keys = data.texts[site.keys];
  const size = [site.causal, queries.length, keys.length];
  const soft = softPattern(site.soft[where[1]], ...size);
  const saturated = saturatedPattern(site.saturated[where[1]], ...size);
  const label = `${data.labels[index]} ${name}`;
  showPattern("soft", soft, queries, keys, site.causal, `Soft pattern of ${label}`, "");
  const limit = `c = ${data.scale}, ties ${data.ties}; `;
  showPattern("saturated", saturated, queries, keys, site.causal, `Saturated pattern of ${label}`, limit);
  showExamples(soft, saturated, queries, keys);
  const distances = soft.map((row, q) => {
    const total = row.reduce((sum, value, k) => sum + Math.abs(value - saturated[q][k]), 0);
    return Math.round(500 * total) / 1000;
  });
  const props = { tokens: queries.map(inert), values: distances, minValue: -1, maxValue: 1 };
  strip.show(CircuitsVis.ColoredTokens, { ...props, positiveColor: BLUE, paddingBottom: 0 });
}

function showPattern(which, pattern, queries, keys, causal, name, note) {
  const most = darkest(pattern), stage = byId(which);
  byId(`${which}-note`).textContent = `${note}darkest blue: ${most < 1 ? `${numberText(most, 2)} or more` : "1"}`;
  const square = queries === keys;
  stage.querySelectorAll(".drawn").forEach((old) => old.remove());
  byId(`${which}-here`).hidden = !square;
  stage.setAttribute("role", "img");
  stage.setAttribute("aria-label", `${name}: ${queries.length} queries down, ${keys.length} keys across`);
  if (!square) {
    stages[which].show(null);
    stage.append(drawnPattern(pattern, queries, keys, most));
    return;
  }
  stages[which].show(CircuitsVis.AttentionPattern, {
    attention: pattern, tokens: keys.map(shortened), minValue: -1, maxValue: most,
    positiveColor: BLUE, upperTriColor: BEYOND, maskUpperTri: causal,
  });
}

/* Drawn on demand: a layer is many charts. */
function showLayer() {
  const where = data.where[chosen], place = byId("layer-heads");
  if (!where || !byId("layer").open || where[0] === openLayer) return;
  openLayer = where[0];
  place.querySelectorAll(".drawn-pair").forEach((old) => old.remove());
  const site = data.sites[openLayer];
  const queries = data.texts[site.queries], keys = data.texts[site.keys];
  const size = [site.causal, queries.length, keys.length];
  const names = data.labels.flatMap((label, index) => {
    const [role, target] = [data.columns.role[index], data.columns.target[index]];
    return data.where[index] && data.where[index][0] === openLayer ? [[label, role, target].filter(Boolean).join(" ")] : [];
  });
  const heads = {
    names, queries, keys, causal: site.causal, limit: `c = ${data.scale}, ties ${data.ties}`,
    soft: site.soft.map((packed) => softPattern(packed, ...size)),
    saturated: site.saturated.map((packed) => saturatedPattern(packed, ...size)),
  };
  layerPair = layerPair || new HeadPair(place, "layer-heads");
  layerPair.show(queries === keys ? heads : null);
  if (queries !== keys) drawnGroup(place, heads);
}

/* The clearest queries of the second half, where rows see enough keys, one for each token. */
function showExamples(soft, saturated, queries, keys) {
  const top = (row) => row.indexOf(Math.max(...row));
  const half = Math.floor(soft.length / 2);
  const order = soft.map((row, q) => [Math.max(...row), q]).filter(([, q]) => q >= half);
  order.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  const seen = new Set(), chosen = [];
  for (const [, q] of order) {
    if (!seen.has(queries[q]) && chosen.length < 6) chosen.push(q);
    seen.add(queries[q]);
  }
  const rows = chosen.sort((a, b) => a - b).map((q) => {
    const row = document.createElement("tr");
    row.append(tokenCell([[queries[q], null]]));
    row.append(tokenCell([[keys[top(soft[q])], soft[q][top(soft[q])]]]));
    const most = saturated[q].flatMap((value, k) => (value > 0 ? [[keys[k], value]] : []));
    row.append(tokenCell(most.sort((a, b) => b[1] - a[1]).slice(0, 3), most.length));
    return row;
  });
  byId("examples").querySelector("tbody").replaceChildren(...rows);
}

function tokenCell(entries, all) {
  const cell = document.createElement("td");
  for (const [text, value] of entries) {
    const token = document.createElement("span"), share = document.createElement("span");
    token.className = "token";
    token.textContent = text;
    cell.append(token);
    if (value !== null) {
      share.className = "share";
      share.textContent = `${numberText(value, 2)} `;
      cell.append(share);
    }
  }
  if (all > entries.length) cell.append(`and ${all - entries.length} more`);
  return cell;
}

function move(event) {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(Number(cell.dataset.head), false);
    return;
  }
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const row = Number(cell.dataset.row) + step[0], column = Number(cell.dataset.column) + step[1];
  const next = cell.parentNode.querySelector(`[data-row="${row}"][data-column="${column}"]`);
  if (!next) return;
  cell.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}

for (const id of ["soft", "saturated", "strip"]) {
  const place = document.createElement("div");
  place.id = `${id}-here`;
  byId(id).append(place);
}
byId("maps").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) choose(Number(cell.dataset.head), false);
});
byId("maps").addEventListener("keydown", move);
for (const link of document.querySelectorAll(".ranked .link")) {
  link.addEventListener("click", () => choose(data.labels.indexOf(link.dataset.label), true));
}
byId("layer").addEventListener("toggle", showLayer);
table = new HeadTable(data, JSON.parse(byId("csv").textContent), choose);
choose(data.start, false);
document.documentElement.dataset.ready = "true";
