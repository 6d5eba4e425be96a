// The search box: what a query means, and a combobox with a list of what it finds.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});
  const FEATURES = 12;
  const PAIRS = 6;

  // What a query finds: groups of {title, options}, each option with the hash of its card, and a sentence.
  X.found = (data, query) => {
    const numbers = query.trim().match(/^(?:(?:feature|pair)\s+)?#?(\d+)(?:\s*(?:[,x\u00d7]|\s)\s*(\d+))?$/i);
    const groups = [...(numbers ? byNumber(data, numbers) : []), ...byToken(data, query)];
    const shown = groups.filter(({ options }) => options.length);
    return { groups: shown, sentence: sentence(data, query, numbers, shown) };
  };

  const byNumber = (data, [, first, second]) => {
    if (second === undefined) {
      const options =
        Number(first) < data.featureCount ? [featureOption(data, Number(first), firing(data, Number(first)))] : [];
      return [{ title: "Number", options }];
    }
    const pair = data.pairOf(Number(first), Number(second));
    const options = pair < 0 ? [] : [pairOption(data, pair, `rank ${X.count(pair + 1)} by energy`)];
    return [{ title: "Pair", options }];
  };

  const byToken = (data, query) => {
    const { ids, exact } = data.tokensLike(query);
    if (!ids.size) return [];
    const where = exact ? `\u201c${query.trim()}\u201d` : `\u201c${query.trim()}\u2026\u201d`;
    const features = data.featuresAt(ids);
    const pairs = data.pairsAt(ids);
    const hits = ({ hits, contexts }) => `in ${hits} of ${X.plural(contexts, "context")}`;
    return [
      {
        title: `Features at ${where}${beyond(features, FEATURES)}`,
        options: features.slice(0, FEATURES).map((found) => featureOption(data, found.item, hits(found))),
      },
      {
        title: `Pairs at ${where}${beyond(pairs, PAIRS)}`,
        options: pairs.slice(0, PAIRS).map((found) => pairOption(data, found.item, hits(found))),
      },
    ];
  };

  const beyond = (found, most) => (found.length > most ? `, strongest ${most} of ${X.count(found.length)}` : "");

  const firing = (data, feature) => {
    const tokens = data.features.tokens[feature];
    return tokens ? `fires on ${X.percent(tokens / data.about.tokens)}` : "never fires";
  };

  const featureOption = (data, feature, detail) => ({
    hash: `#feature=${feature}`,
    words: `Feature ${feature}`,
    tokens: data.label(feature),
    detail,
  });

  const pairOption = (data, pair, detail) => {
    const [first, second] = data.ends(pair);
    const tokens = [...data.label(first).slice(0, 1), ...data.label(second).slice(0, 1)];
    return { hash: `#pair=${first},${second}`, words: `Pair ${first} \u00d7 ${second}`, tokens, detail };
  };

  const sentence = (data, query, numbers, groups) => {
    if (!query.trim()) return hint(data);
    const count = groups.reduce((sum, { options }) => sum + options.length, 0);
    if (count) return `${X.plural(count, "result")}. Arrow keys choose, Enter opens.`;
    if (numbers && numbers[2] !== undefined) return X.noPair(data, Number(numbers[1]), Number(numbers[2]));
    if (numbers) return X.noFeature(data, numbers[1]);
    return `No token of the contexts is or begins with \u201c${query.trim()}\u201d, or nothing fires at it.`;
  };

  const hint = (data) => {
    const pairs = data.pairCount ? `, ${X.plural(data.pairCount, "pair")}` : "";
    return `Features 0 to ${X.count(data.featureCount - 1)}${pairs}.`;
  };

  X.noFeature = (data, feature) =>
    `There is no feature ${feature}: this SAE has features 0 to ${data.featureCount - 1}.`;

  X.noPair = (data, first, second) => {
    const missing = [first, second].find((feature) => feature >= data.featureCount);
    if (missing !== undefined) return X.noFeature(data, missing);
    if (!data.pairCount) return "This explorer has no pairs: its SAE has no path that multiplies features.";
    const fired = X.count(data.about.pair_totals.pairs);
    const kept = `the ${X.plural(data.pairCount, "pair")} listed, of ${fired} that fired`;
    return `Pair ${first} \u00d7 ${second} is not among ${kept}.`;
  };

  // The search field with its list; `open` is called with the hash that was chosen.
  X.search = (data, open) => {
    const input = X.el("input", {
      id: "ex-query",
      type: "text",
      role: "combobox",
      "aria-expanded": "false",
      "aria-controls": "ex-results",
      "aria-autocomplete": "list",
      autocomplete: "off",
      autocapitalize: "none",
      spellcheck: "false",
      "aria-keyshortcuts": "/",
      enterkeyhint: "search",
      placeholder: "123, 12 x 45, or a token",
      "aria-describedby": "ex-status",
    });
    const list = X.el("div", {
      id: "ex-results",
      class: "ex-results",
      role: "listbox",
      "aria-label": "Results",
      hidden: true,
    });
    const status = X.el("p", { id: "ex-status", class: "ex-status", role: "status" }, hint(data));
    const box = new Combobox(data, input, list, status, open);
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
      event.preventDefault();
      box.focus();
    });
    return X.el(
      "div",
      { class: "ex-search", role: "search" },
      X.el("label", { for: "ex-query" }, "Feature, pair or token"),
      X.el("div", { class: "ex-field" }, input, X.el("kbd", { "aria-hidden": "true" }, "/"), list),
      status,
    );
  };

  const isTyping = (element) => element.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(element.tagName);

  class Combobox {
    constructor(data, input, list, status, open) {
      Object.assign(this, { data, input, list, status, open, options: [], active: -1 });
      input.addEventListener("input", () => this.show());
      input.addEventListener("focus", () => this.show());
      input.addEventListener("blur", () => this.close());
      input.addEventListener("keydown", (event) => this.key(event));
      list.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
      list.addEventListener("click", (event) => {
        const option = event.target.closest("[role=option]");
        if (option) this.choose(this.options.indexOf(option));
      });
    }

    focus() {
      this.input.focus();
      this.input.select();
      this.input.scrollIntoView({ block: "nearest" });
    }

    show() {
      const { groups, sentence } = X.found(this.data, this.input.value);
      this.status.textContent = sentence;
      this.options = [];
      this.list.replaceChildren(...groups.map((group, number) => this.group(group, number)));
      this.list.hidden = this.options.length === 0;
      this.input.setAttribute("aria-expanded", String(!this.list.hidden));
      this.activate(-1);
    }

    group({ title, options }, number) {
      const heading = X.el("div", { id: `ex-group-${number}`, class: "ex-group", role: "presentation" }, title);
      return X.el(
        "div",
        { role: "group", "aria-labelledby": heading.id },
        heading,
        options.map((option) => this.option(option)),
      );
    }

    option({ hash, words, tokens, detail }) {
      const id = `ex-option-${this.options.length}`;
      const option = X.el(
        "div",
        { id, role: "option", "aria-selected": "false", "data-hash": hash },
        X.el("b", null, words),
        " ",
        X.tokens(tokens),
        X.el("small", null, detail),
      );
      this.options.push(option);
      return option;
    }

    activate(number) {
      this.active = number;
      this.options.forEach((option, i) => option.setAttribute("aria-selected", String(i === number)));
      if (number < 0) return this.input.removeAttribute("aria-activedescendant");
      this.input.setAttribute("aria-activedescendant", this.options[number].id);
      return this.options[number].scrollIntoView({ block: "nearest" });
    }

    // To the next or the previous option, and round.
    move(step) {
      const count = this.options.length;
      const start = this.active < 0 && step < 0 ? 0 : this.active;
      if (count) this.activate((start + step + count) % count);
    }

    key(event) {
      if (["ArrowDown", "ArrowUp"].includes(event.key)) {
        event.preventDefault();
        if (this.list.hidden) this.show();
        this.move(event.key === "ArrowDown" ? 1 : -1);
      } else if (event.key === "Enter") {
        event.preventDefault();
        if (this.list.hidden) this.show();
        if (this.options.length) this.choose(Math.max(this.active, 0));
      } else if (event.key === "Escape") {
        if (this.list.hidden) this.input.value = "";
        this.close();
      }
    }

    choose(number) {
      const hash = this.options[number].dataset.hash;
      this.close();
      this.open(hash);
    }

    close() {
      this.list.hidden = true;
      this.input.setAttribute("aria-expanded", "false");
      this.activate(-1);
      this.status.textContent = hint(this.data);
    }
  }
})();
