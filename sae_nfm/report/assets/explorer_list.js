// The list of all features, or of the pairs: sorted by what the reader chooses, a page at a time.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});
  const ROWS = 15;

  const featureColumns = (data) => [
    {
      label: "fires on",
      value: (i) => data.features.tokens[i],
      words: (i) => X.percent(data.features.tokens[i] / data.about.tokens),
    },
    { label: "largest activation", value: (i) => data.features.max[i], words: (i) => X.number(data.features.max[i]) },
    ...(data.pairCount
      ? [{ label: "interaction energy", value: (i) => data.energy(i), words: (i) => X.percent(data.energy(i)) }]
      : []),
    ...(data.about.paths.includes("interaction")
      ? [
          {
            label: `interaction share, ${data.gauge}`,
            value: (i) => data.share(i, "interaction"),
            words: (i) => X.percent(data.share(i, "interaction")),
          },
        ]
      : []),
  ];

  const pairColumns = (data) => [
    { label: "share of energy", value: (i) => data.pairs.share[i], words: (i) => X.percent(data.pairs.share[i]) },
    {
      label: "both are read on",
      value: (i) => data.pairs.tokens[i],
      words: (i) => X.percent(data.pairs.tokens[i] / data.about.tokens),
    },
    { label: "mean norm", value: (i) => data.pairs.norm[i], words: (i) => X.number(data.pairs.norm[i]) },
    { label: "largest norm", value: (i) => data.pairs.max_norm[i], words: (i) => X.number(data.pairs.max_norm[i]) },
  ];

  const kinds = (data) => [
    {
      name: "Features",
      items: data.alive,
      columns: featureColumns(data),
      link: (i) => [X.featureLink(i)],
      tokens: (i) => X.tokens(data.label(i)),
      sorted: 0,
    },
    {
      name: "Pairs",
      items: [...data.pairs.first.keys()],
      columns: pairColumns(data),
      link: (i) => [X.pairLink(...data.ends(i))],
      tokens: (i) => data.ends(i).map((end, n) => [n ? "\u00d7 " : "", X.tokens(data.label(end).slice(0, 2))]),
      sorted: 0,
    },
  ];

  X.list = (data) => {
    const all = kinds(data).filter(({ items }) => items.length);
    return new List(all).element;
  };

  class List {
    constructor(all) {
      Object.assign(this, { all, kind: all[0], descending: true, page: 0 });
      this.chooser = X.el(
        "div",
        { class: "ex-kinds", role: "group", "aria-label": "What to list" },
        all.length > 1 ? all.map((kind) => this.kindButton(kind)) : null,
      );
      this.sorter = X.el("select", { id: "ex-sort" });
      this.sorter.addEventListener("change", () => this.sort(Number(this.sorter.value)));
      this.place = X.el("div", { class: "ex-listed" });
      this.status = X.el("p", { role: "status" });
      this.back = X.button("\u2190 earlier", () => this.turn(-1), { "aria-label": "Earlier rows" });
      this.on = X.button("later \u2192", () => this.turn(1), { "aria-label": "Later rows" });
      const bar = X.el(
        "div",
        { class: "ex-listbar" },
        this.chooser,
        X.el("label", { for: "ex-sort" }, "by"),
        this.sorter,
      );
      this.element = X.el(
        "div",
        { id: "ex-list", class: "ex-list", tabindex: "-1" },
        X.el("h3", null, all.length > 1 ? "All features and pairs" : "All features"),
        bar,
        this.place,
        X.el("div", { class: "ex-pages" }, this.back, this.status, this.on),
      );
      this.draw();
    }

    kindButton(kind) {
      return X.button(`${kind.name} (${X.count(kind.items.length)})`, () => {
        Object.assign(this, { kind, page: 0, descending: true });
        this.draw();
      });
    }

    // By a column, largest first; the same again: smallest first.
    sort(column, again) {
      this.descending = again && this.kind.sorted === column ? !this.descending : true;
      this.kind.sorted = column;
      this.page = 0;
      this.draw(again ? column : null);
    }

    turn(step) {
      this.page += step;
      this.draw();
    }

    sorted() {
      const { value } = this.kind.columns[this.kind.sorted];
      const sign = this.descending ? -1 : 1;
      return [...this.kind.items].sort((a, b) => sign * (value(a) - value(b)) || a - b);
    }

    draw(focused) {
      const items = this.sorted();
      const from = this.page * ROWS;
      const shown = items.slice(from, from + ROWS);
      this.sorter.replaceChildren(
        ...this.kind.columns.map(({ label }, i) =>
          X.el("option", { value: i, selected: i === this.kind.sorted }, label),
        ),
      );
      [...this.chooser.children].forEach((button, i) =>
        button.setAttribute("aria-pressed", String(this.all[i] === this.kind)),
      );
      this.place.replaceChildren(this.table(shown));
      this.status.textContent = `${X.count(from + 1)} to ${X.count(from + shown.length)} of ${X.count(items.length)}`;
      this.back.disabled = from === 0;
      this.on.disabled = from + ROWS >= items.length;
      if (focused !== null && focused !== undefined) this.place.querySelectorAll("th button")[focused].focus();
    }

    table(shown) {
      const { columns, link, tokens, sorted } = this.kind;
      const state = (i) => (i === sorted ? (this.descending ? "descending" : "ascending") : null);
      const class_ = (i) => `ex-number${i === sorted ? " ex-sorted" : ""}`;
      const arrow = (i) =>
        X.el("span", { "aria-hidden": "true" }, { descending: " \u25bc", ascending: " \u25b2" }[state(i)] || "");
      const heading = ({ label }, i) =>
        X.el(
          "th",
          { scope: "col", class: class_(i), "aria-sort": state(i) },
          X.button([label, arrow(i)], () => this.sort(i, true)),
        );
      const row = (item) =>
        X.el(
          "tr",
          null,
          X.el("td", null, link(item)),
          X.el("td", { class: "ex-words" }, tokens(item)),
          columns.map(({ words }, i) => X.el("td", { class: class_(i) }, words(item))),
        );
      return X.el(
        "table",
        null,
        X.el(
          "thead",
          null,
          X.el(
            "tr",
            null,
            X.el("th", { scope: "col" }, this.kind.name === "Pairs" ? "pair" : "feature"),
            X.el("th", { scope: "col", class: "ex-words" }, "strongest at"),
            columns.map(heading),
          ),
        ),
        X.el("tbody", null, shown.map(row)),
      );
    }
  }
})();
