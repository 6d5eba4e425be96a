// Elements, numbers and words of the explorer. Data enter the page as text nodes and attributes, never as markup.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});

  const filled = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined && value !== false)
        element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  };

  // An element. Attributes that are null or false are left out; children are text, elements, or lists of these.
  X.el = (name, attributes, ...children) => filled(document.createElement(name), attributes, children);

  // The same inside an SVG drawing.
  X.svg = (name, attributes, ...children) =>
    filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

  X.button = (words, action, attributes) => {
    const button = X.el("button", { type: "button", ...attributes }, words);
    button.addEventListener("click", action);
    return button;
  };

  const three = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

  X.count = (value) => whole.format(value);

  // Three significant digits, integers from 1000 on, a true minus sign.
  X.number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    return (value < 0 ? "\u2212" : "") + (size >= 1000 ? whole : three).format(size);
  };

  // A value that is stored in 255 steps of the largest one: no digit that it does not have.
  X.stepped = (value, most) => {
    const digits = Math.min(Math.max(-Math.ceil(Math.log10(most / 255)), 0), 12);
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };

  X.signed = (value) => (value > 0 ? "+" : "") + X.number(value);

  X.percent = (share) => `${X.number(100 * share)}\u00a0%`;

  X.plural = (count, noun) => `${X.count(count)} ${noun}${count === 1 ? "" : "s"}`;

  // A token as it can be read: line breaks, tabs and control characters as signs; the style sheet keeps spaces.
  X.readable = (text) =>
    text
      .replace(/\r?\n|\r/g, "\u21b5")
      .replace(/\t/g, "\u21e5")
      .replace(/[\u0000-\u001f\u007f]/g, (sign) => `\\x${sign.charCodeAt(0).toString(16).padStart(2, "0")}`);

  // A token among words, such as in a table: in a box that shows its spaces.
  X.token = (text) => X.el("code", { class: "ex-token" }, X.readable(text));

  X.tokens = (texts) => texts.map((text) => [X.token(text), " "]);

  X.featureLink = (feature) => X.el("a", { href: `#feature=${feature}` }, `feature ${feature}`);

  X.pairLink = (first, second, words) =>
    X.el("a", { href: `#pair=${first},${second}` }, words || `${first} \u00d7 ${second}`);

  // A table; columns are {label, number}, rows are lists of cells.
  X.table = (columns, rows, attributes) =>
    X.el(
      "table",
      attributes,
      X.el(
        "thead",
        null,
        X.el(
          "tr",
          null,
          columns.map((c) => X.el("th", { scope: "col", class: c.number && "ex-number" }, c.label)),
        ),
      ),
      X.el(
        "tbody",
        null,
        rows.map((cells) =>
          X.el(
            "tr",
            null,
            cells.map((cell, i) => X.el("td", { class: columns[i].number && "ex-number" }, cell)),
          ),
        ),
      ),
    );

  // What is beyond the first so many stays folded until asked for.
  X.folded = (words, content) => X.el("details", { class: "ex-more" }, X.el("summary", null, words), content);
})();
