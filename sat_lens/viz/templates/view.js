/* Shows one view: groups of heads, or a single circuitsvis component. */

const view = JSON.parse(document.getElementById("data").textContent);
const place = document.getElementById("view");

function unpacked(group) {
  const queries = view.texts[group.queries], keys = view.texts[group.keys];
  const size = [group.causal, queries.length, keys.length];
  return {
    ...group, limit: view.limit, queries, keys,
    soft: group.soft.map((packed) => softPattern(packed, ...size)),
    saturated: group.saturated.map((packed) => saturatedPattern(packed, ...size)),
  };
}

(view.groups || []).forEach((group, index) => {
  const heads = unpacked(group);
  if (heads.queries === heads.keys) new HeadPair(place, `group-${index}`).show(heads);
  else drawnGroup(place, heads);
});
if (view.component) {
  place.className = "cv";
  CircuitsVis.render("view", CircuitsVis[view.component], view.props);
}
document.documentElement.dataset.ready = "true";
