/* Soft beside saturated in circuitsvis's AttentionHeads: a head chosen on one side is on both. */

const BLUE = "#0072B2", BEYOND = "#efefec";

class HeadPair {
  constructor(place, id) {
    this.sides = ["soft", "saturated"].map((side) => {
      const column = document.createElement("div"), title = document.createElement("h3");
      const stage = document.createElement("div");
      stage.className = "cv";
      stage.id = `${id}-${side}`;
      column.append(title, stage);
      return { name: side, column, title, stage: new Stage(stage.id) };
    });
    this.element = document.createElement("div");
    this.element.className = "heads";
    this.element.append(...this.sides.map((side) => side.column));
    this.element.addEventListener("click", (event) => this.follow(event));
    place.append(this.element);
  }

  show(heads) {
    this.element.hidden = heads === null;
    for (const { name, title, stage } of this.sides) {
      if (heads === null) {
        stage.show(null);
        continue;
      }
      title.textContent = name === "soft" ? "Soft" : `Saturated (${heads.limit})`;
      stage.show(CircuitsVis.AttentionHeads, {
        attention: heads[name], attentionHeadNames: heads.names, tokens: heads.keys.map(shortened),
        minValue: -1, maxValue: Math.max(...heads[name].map(darkest)),
        positiveColor: BLUE, maskUpperTri: heads.causal,
      });
    }
  }

  follow(event) {
    if (!event.isTrusted) return;
    const thumbnails = ({ column }) => Array.from(column.querySelectorAll("h4"), (name) => name.parentNode);
    const from = this.sides.findIndex(({ column }) => column.contains(event.target));
    if (from < 0) return;
    const index = thumbnails(this.sides[from]).findIndex((each) => each.contains(event.target));
    if (index >= 0) thumbnails(this.sides[1 - from])[index].click();
  }
}

function drawnGroup(place, heads) {
  heads.names.forEach((name, index) => {
    const row = document.createElement("div");
    row.className = "heads drawn-pair";
    for (const side of ["soft", "saturated"]) {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      caption.textContent = `${name}, ${side === "soft" ? "soft" : `saturated (${heads.limit})`}`;
      const pattern = heads[side][index];
      const drawing = drawnPattern(pattern, heads.queries, heads.keys, darkest(pattern));
      drawing.setAttribute("role", "img");
      drawing.setAttribute("aria-label", caption.textContent);
      figure.className = "stage";
      figure.append(caption, drawing);
      row.append(figure);
    }
    place.append(row);
  });
}
