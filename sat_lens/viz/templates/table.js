/* The table of all heads: sorted by a click on a heading, narrowed by text and role. */

const COLUMNS = [
  ["label", "head", "word"], ["role", "role", "word"], ["target", "looks at", "word"],
  ["lean", "lean", 3], ["lean_se", "±", 3], ["tv_argmax", "tv argmax", 3],
  ["tv_mean", "tv mean", 3], ["tv_nearest", "tv nearest", 3], ["median_m", "m*", 1],
  ["agreement", "rows agreeing", 2], ["sink_mass", "sink mass", 2], ["c_lo", "c lo", 2],
  ["c_hi", "c hi", 2], ["effect", "effect", 3], ["n_rows", "rows", 0],
];

function roleClass(role) {
  return `r-${role || "none"}`;
}

class HeadTable {
  constructor(data, csv, choose) {
    this.values = { ...data.columns, label: data.labels };
    this.columns = COLUMNS.filter(([name]) => this.values[name] !== undefined);
    this.body = document.querySelector("#table tbody");
    this.find = document.getElementById("find");
    this.role = document.getElementById("role");
    this.sorted = null;
    this.rows = data.labels.map((label, index) => this.row(label, index, choose));
    this.order = this.rows.map((_, index) => index);
    this.head();
    this.find.addEventListener("input", () => this.show());
    this.role.addEventListener("change", () => this.show());
    document.getElementById("download").addEventListener("click", () => download(csv));
    this.show();
  }

  head() {
    const row = document.createElement("tr");
    for (const [name, title, kind] of this.columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      if (kind === "word") cell.className = "word";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title;
      button.addEventListener("click", () => this.sort(name, cell));
      cell.append(button);
      row.append(cell);
    }
    document.querySelector("#table thead").append(row);
  }

  row(label, index, choose) {
    const row = document.createElement("tr");
    for (const [name, , kind] of this.columns) {
      const cell = document.createElement("td");
      const value = this.values[name][index];
      if (kind === "word") cell.className = "word";
      if (name === "label") {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = label;
        button.addEventListener("click", () => choose(index, true));
        cell.append(button);
      } else {
        if (name === "role") {
          const swatch = document.createElement("span");
          swatch.className = `swatch ${roleClass(value)}`;
          cell.append(swatch);
        }
        cell.append(kind === "word" ? value : numberText(value, kind));
      }
      row.append(cell);
    }
    return row;
  }

  sort(name, cell) {
    const descending = this.sorted === `${name} up` || this.sorted === null && name !== "label";
    this.sorted = `${name} ${descending ? "down" : "up"}`;
    const values = this.values[name], sign = descending ? -1 : 1;
    const compare = (a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return sign * order || a - b;
    };
    this.order = this.rows.map((_, index) => index).sort(compare);
    for (const other of cell.parentNode.children) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    this.show();
  }

  show() {
    const words = this.find.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    const role = this.role.value;
    const kept = this.order.filter((index) => {
      if (role && this.values.role[index] !== role) return false;
      const parts = ["label", "role", "target"].map((name) => this.values[name][index]);
      const text = parts.join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    this.body.replaceChildren(...kept.map((index) => this.rows[index]));
    const all = this.rows.length;
    document.getElementById("count").textContent =
      kept.length === all ? `${all} heads` : `${kept.length} of ${all} heads`;
  }

  select(index) {
    this.rows.forEach((row, at) => row.classList.toggle("selected", at === index));
  }
}

function numberText(value, digits) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function download(text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  link.download = "heads.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
