// The explorer: reads its data from the page, and shows what the address names: #feature=12, or #pair=12,45.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});
  const HASH = /^#(feature|pair)=(.*)$/;

  class App {
    constructor(data, place) {
      this.data = data;
      this.place = place;
      this.base = document.title;
      this.shown = null;
      this.card = X.el("div", { class: "ex-shown" });
      this.status = X.el("p", { class: "ex-hidden", role: "status" });
      place.replaceChildren(this.controls(), this.status, this.card, X.list(data));
      place.classList.add("ex-ready");
      window.addEventListener("hashchange", () => this.follow());
    }

    controls() {
      return X.el(
        "div",
        { class: "ex-controls" },
        X.search(this.data, (hash) => this.open(hash)),
        X.el(
          "div",
          { class: "ex-steps", role: "group", "aria-label": "Other features" },
          X.button("\u2190 previous", () => this.step(-1)),
          X.button("next \u2192", () => this.step(1)),
          X.button("random", () => this.random()),
          X.button("list \u2193", () => this.toList()),
        ),
      );
    }

    toList() {
      const list = this.place.querySelector("#ex-list");
      list.focus({ preventScroll: true });
      list.scrollIntoView();
    }

    // Show what the hash names, as a link does; the same hash again only brings it back into view.
    open(hash) {
      this.moves = true;
      if (location.hash === hash) this.follow();
      else location.hash = hash;
    }

    // The card of the address, if it names one.
    follow() {
      const named = HASH.exec(location.hash.replace(/%2C/gi, ","));
      document.title = this.base;
      if (!location.hash) this.begin();
      if (!named) return false;
      const isLink = this.place.contains(document.activeElement) && document.activeElement.tagName === "A";
      this.show(named[1], named[2]);
      document.title = `${this.card.querySelector("h3").textContent} \u00b7 ${this.base}`;
      this.status.textContent = `${this.card.querySelector("h3").textContent} is shown.`;
      if (this.moves || isLink) this.card.querySelector("h3").focus({ preventScroll: true });
      this.moves = false;
      if (this.card.getBoundingClientRect().top < 0 || this.card.getBoundingClientRect().top > window.innerHeight * 0.8)
        this.place.scrollIntoView();
      return true;
    }

    show(kind, words) {
      const numbers = /^\d+(,\d+)?$/.test(words) ? words.split(",").map(Number) : [];
      this.shown = null;
      this.card.replaceChildren(kind === "feature" ? this.feature(words, numbers) : this.pair(words, numbers));
    }

    feature(words, numbers) {
      if (numbers.length !== 1 || numbers[0] >= this.data.featureCount) return X.noCard(X.noFeature(this.data, words));
      this.shown = { kind: "feature", number: numbers[0] };
      return X.featureCard(this.data, numbers[0]);
    }

    pair(words, numbers) {
      if (numbers.length !== 2)
        return X.noCard(
          `A pair is named by the numbers of two features, such as #pair=12,45, not by \u201c${words}\u201d.`,
        );
      const pair = this.data.pairOf(...numbers);
      if (pair < 0) return X.noCard(X.noPair(this.data, ...numbers));
      this.shown = { kind: "pair", number: pair };
      return X.pairCard(this.data, pair);
    }

    // Where nothing is named: the first feature of the strongest pair, or the feature that fires most.
    begin() {
      const { data } = this;
      const commonest = data.alive.reduce(
        (best, i) => (data.features.tokens[i] > data.features.tokens[best] ? i : best),
        data.alive[0] || 0,
      );
      this.show("feature", String(data.pairCount ? data.ends(0)[0] : commonest));
    }

    step(by) {
      const { kind, number } = this.shown || { kind: "feature", number: -by };
      const count = kind === "pair" ? this.data.pairCount : this.data.featureCount;
      this.go(kind, (number + by + count) % count);
    }

    random() {
      const isPair = this.shown && this.shown.kind === "pair";
      const among = isPair ? [...this.data.pairs.first.keys()] : this.data.alive;
      if (among.length) this.go(isPair ? "pair" : "feature", among[Math.floor(Math.random() * among.length)]);
    }

    go(kind, number) {
      location.hash = kind === "pair" ? `#pair=${this.data.ends(number)}` : `#feature=${number}`;
    }
  }

  X.start = async () => {
    const place = document.getElementById("explorer");
    const data = document.getElementById("explorer-data");
    if (!place || !data) return;
    if (!("DecompressionStream" in window)) {
      place.textContent =
        "This browser is too old for the explorer: it cannot inflate gzip. Browsers from 2023 on can.";
      return;
    }
    try {
      const app = new App(await X.read(data), place);
      app.begin();
      if (app.follow()) place.scrollIntoView();
    } catch (error) {
      place.textContent = `The explorer cannot read its data (${error.message}): make them again with sae-nfm explore.`;
    }
  };

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", X.start);
  else X.start();
})();
