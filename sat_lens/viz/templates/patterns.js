"use strict";

/* Unpacks the patterns that the page carries, and shows them through circuitsvis. */

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function softPattern(packed, causal, queries, keys) {
  const steps = bytes(packed);
  let at = 0;
  return Array.from({ length: queries }, (_, q) =>
    Array.from({ length: keys }, (_, k) => {
      if (causal && k > q) return 0;
      return Math.round((steps[at++] / 255) * 1000) / 1000;
    }),
  );
}

function saturatedPattern(packed, causal, queries, keys) {
  if (packed.bytes !== undefined) return softPattern(packed.bytes, causal, queries, keys);
  const rows = packed.keys || keysFromBits(bytes(packed.bits), queries, keys);
  return rows.map((row) => {
    const values = new Array(keys).fill(0);
    for (const key of row) values[key] = Math.round(1000 / row.length) / 1000;
    return values;
  });
}

function keysFromBits(bits, queries, keys) {
  return Array.from({ length: queries }, (_, q) => {
    const row = [];
    for (let k = 0; k < keys; k++) {
      const at = q * keys + k;
      if (bits[at >> 3] & (128 >> (at & 7))) row.push(k);
    }
    return row;
  });
}

/* The darkest colour of a pattern. The first rows see few keys and would drown the rest. */
function darkest(pattern) {
  const from = Math.min(8, Math.floor(pattern.length / 4));
  let most = 0;
  for (const row of pattern.slice(from)) for (const value of row) most = Math.max(most, value);
  return most > 0 ? most : 1;
}

/* Neither a tag nor a character reference begins with an invisible word joiner. */
function inert(text) {
  return text.replace(/[<&]/g, "$&\u2060");
}

function shortened(text) {
  const characters = Array.from(text);
  return characters.length > 14 ? characters.slice(0, 13).join("") + "…" : text;
}

/*
 * A place that shows one circuitsvis component after another. circuitsvis.render can mount a
 * component but never unmounts one, and a chart that is not unmounted stays in memory for good.
 * So a small component of our own is mounted once, and redrawn with other contents: the new key
 * makes React unmount what was there.
 */
class Stage {
  constructor(id) {
    const stage = this;
    this.mounted = null;
    this.shown = null;
    this.count = 0;
    class Content {
      constructor(props) {
        this.props = props;
        stage.mounted = this;
      }
      render() {
        return stage.shown;
      }
    }
    Content.prototype.isReactComponent = {};
    this.start = () => CircuitsVis.render(id, Content, {});
  }

  show(component, props) {
    const template = CircuitsVis.ColoredTokens({ tokens: [], values: [] });
    this.count += 1;
    this.shown = component && { ...template, type: component, key: String(this.count), props };
    if (this.mounted) this.mounted.updater.enqueueForceUpdate(this.mounted);
    else this.start();
  }
}

/* circuitsvis takes every pattern for a square; this draws those that are not. */
function drawnPattern(pattern, queryTokens, keyTokens, most) {
  const labels = (tokens) => tokens.map((token, index) => `${shortened(token)} (${index})`);
  const longest = (texts) => Math.max(...texts.map((text) => text.length));
  const [rows, columns] = [labels(queryTokens), labels(keyTokens)];
  const cell = 14, left = 14 + 5.6 * longest(rows), bottom = 14 + 5 * longest(columns);
  const width = left + keyTokens.length * cell, height = pattern.length * cell + bottom;
  const svg = svgElement("svg", { class: "drawn", viewBox: `0 0 ${width} ${height}` });
  const label = (text, at) => {
    const element = svgElement("text", { ...at, "font-size": 9, "text-anchor": "end" });
    element.textContent = text;
    svg.append(element);
  };
  pattern.forEach((row, q) => {
    label(rows[q], { x: left - 6, y: (q + 0.7) * cell });
    row.forEach((value, k) => {
      if (value <= 0) return;
      const rect = svgElement("rect", {
        x: left + k * cell, y: q * cell, width: cell, height: cell,
        "fill-opacity": Math.min(value / most, 1),
      });
      const title = svgElement("title", {});
      title.textContent = `${queryTokens[q]} → ${keyTokens[k]}: ${value}`;
      rect.append(title);
      svg.append(rect);
    });
  });
  columns.forEach((text, k) => {
    const x = left + (k + 0.7) * cell, y = height - bottom + 6;
    label(text, { x, y, transform: `rotate(-60 ${x} ${y})` });
  });
  const size = { width: width - left, height: height - bottom };
  svg.append(svgElement("rect", { class: "frame", x: left, y: 0, ...size }));
  return svg;
}

function svgElement(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
