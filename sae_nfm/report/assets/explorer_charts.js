// Small drawings of the explorer: a histogram, stacked shares, logits as bars, tokens in their context.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});
  const [WIDTH, HEIGHT, LEFT, TOP, BOTTOM] = [340, 150, 46, 10, 34];

  // Counts in bins that divide (0, most] equally. The count under the pointer is written below; a table has them all.
  X.histogram = (counts, most) => {
    const bins = counts.map((count, i) => ({
      count,
      words: `${X.number((i * most) / counts.length)} to ${X.number(((i + 1) * most) / counts.length)}`,
    }));
    const rest = "How many tokens by activation, where the feature fires; point at a bar for its count.";
    const readout = X.el("p", { class: "ex-readout", "aria-hidden": "true" }, rest);
    const drawing = X.svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "ex-histogram", "aria-hidden": "true" },
      axes(Math.max(...counts), most),
    );
    bins.forEach(({ count, words }, i) => {
      const bar = drawing.appendChild(
        column(count / Math.max(...counts), i, counts.length, `${words}: ${X.plural(count, "token")}`),
      );
      bar.addEventListener(
        "pointerenter",
        () => (readout.textContent = `Activation ${words}: ${X.plural(count, "token")}`),
      );
    });
    drawing.addEventListener("pointerleave", () => (readout.textContent = rest));
    const rows = bins.map(({ count, words }) => [words, X.count(count)]);
    const table = X.table([{ label: "activation" }, { label: "tokens", number: true }], rows);
    return X.el("div", { class: "ex-drawing" }, drawing, readout, X.el("div", { class: "ex-hidden" }, table));
  };

  const column = (height, i, count, words) => {
    const width = (WIDTH - LEFT - 4) / count;
    const x = LEFT + i * width;
    const tall = height * (HEIGHT - TOP - BOTTOM);
    return X.svg(
      "g",
      { class: "ex-column" },
      X.svg("title", null, words),
      X.svg("rect", { class: "ex-under", x, y: TOP, width, height: HEIGHT - TOP - BOTTOM }),
      X.svg("rect", { class: "ex-count", x: x + 0.75, y: HEIGHT - BOTTOM - tall, width: width - 1.5, height: tall }),
    );
  };

  const axes = (tallest, most) => {
    const floor = HEIGHT - BOTTOM;
    const right = WIDTH - 4;
    const label = (x, y, anchor, words) => X.svg("text", { x, y, "text-anchor": anchor }, words);
    return [
      X.svg("path", { class: "ex-axis", d: `M${LEFT} ${TOP}V${floor}H${right}` }),
      label(LEFT - 5, TOP + 8, "end", X.count(tallest)),
      label(LEFT - 5, floor, "end", "0"),
      label(LEFT, floor + 13, "middle", "0"),
      label(right, floor + 13, "end", X.number(most)),
      label((LEFT + right) / 2, floor + 13, "middle", X.number(most / 2)),
      label((LEFT + right) / 2, floor + 28, "middle", "activation"),
      X.svg(
        "text",
        { x: 12, y: (TOP + floor) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(TOP + floor) / 2})` },
        "tokens",
      ),
    ];
  };

  // Shares that sum to one as a bar, each path with a colour and a pattern, and beside it their figures.
  X.stackedShares = (title, shares) =>
    X.el(
      "div",
      { class: "ex-shares" },
      X.el("h5", null, title),
      X.el(
        "div",
        { class: "ex-stack", "aria-hidden": "true" },
        shares.map(({ path, share }) =>
          X.el("span", { class: `ex-path ex-path-${path}`, style: `flex-grow:${share}` }),
        ),
      ),
      X.el(
        "ul",
        null,
        shares.map(({ path, share }) =>
          X.el(
            "li",
            null,
            X.el("span", { class: `ex-swatch ex-path-${path}`, "aria-hidden": "true" }),
            `${path} ${X.percent(share)}`,
          ),
        ),
      ),
    );

  // Tokens with what is added to their logits, as two tables with bars of one scale.
  X.logitBars = ({ up, down }) => {
    const most = Math.max(...[...up, ...down].map(({ value }) => Math.abs(value))) || 1;
    const bar = (value) =>
      X.el("span", {
        class: `ex-bar ${value < 0 ? "ex-down" : "ex-up"}`,
        style: `width:${(100 * Math.abs(value)) / most}%`,
        "aria-hidden": "true",
      });
    const table = (title, entries) =>
      X.el(
        "table",
        { class: "ex-logits" },
        X.el("caption", null, title),
        X.el(
          "tbody",
          null,
          entries.map(({ text, value }) =>
            X.el(
              "tr",
              null,
              X.el("th", { scope: "row" }, X.token(text)),
              X.el("td", { class: "ex-bars" }, bar(value)),
              X.el("td", { class: "ex-number" }, X.signed(value)),
            ),
          ),
        ),
      );
    return X.el("div", { class: "ex-pushed" }, table("Pushed up", up), table("Pushed down", down));
  };

  // Contexts with the tokens where something fires marked: darker where it is stronger, underlined, the strongest bold.
  X.contextList = (contexts, quantity) =>
    X.el(
      "ol",
      { class: "ex-contexts" },
      contexts.map((context) => contextItem(context, quantity)),
    );

  const contextItem = ({ tokens, begins, ends, value }, quantity) =>
    X.el(
      "li",
      null,
      X.el("span", { class: "ex-value", title: quantity }, value),
      X.el(
        "span",
        { class: "ex-text" },
        begins ? null : "\u2026",
        tokens.map((token) => marked(token, quantity)),
        ends ? null : "\u2026",
      ),
    );

  const marked = ({ text, strength, value, peak }, quantity) =>
    strength
      ? X.el(
          "mark",
          { class: peak && "ex-peak", style: `--strength:${strength.toFixed(3)}`, title: `${quantity} ${value}` },
          X.readable(text),
        )
      : X.readable(text);
})();
