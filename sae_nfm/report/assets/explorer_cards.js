// What the explorer says of one feature, and of one pair.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});
  const [CONTEXTS, PARTNERS] = [8, 8];

  const card = (title, ...content) =>
    X.el(
      "article",
      { class: "ex-card", "aria-labelledby": "ex-title" },
      X.el("h3", { id: "ex-title", tabindex: "-1" }, title),
      content,
    );

  const part = (title, ...content) => X.el("section", { class: "ex-part" }, X.el("h4", null, title), content);

  const note = (...words) => X.el("p", { class: "ex-note" }, words);

  const facts = (entries) =>
    X.el(
      "dl",
      { class: "ex-facts" },
      entries.map(([name, value, more]) =>
        X.el("div", null, X.el("dt", null, name), X.el("dd", null, value, more && X.el("small", null, more))),
      ),
    );

  // Instead of a card: why there is none.
  X.noCard = (words) => card("Nothing to show", X.el("p", null, words));

  X.featureCard = (data, feature) => {
    const title = `Feature ${feature}`;
    if (!data.features.tokens[feature]) {
      return card(
        title,
        X.el(
          "p",
          null,
          `It never fires on the ${X.plural(data.about.tokens, "token")} looked at: a dead feature, ${deadWords(data)}`,
        ),
      );
    }
    return card(
      title,
      X.el("p", { class: "ex-label" }, strongestAt(data, feature)),
      featureFacts(data, feature),
      X.el(
        "div",
        { class: "ex-columns" },
        X.el(
          "div",
          null,
          topContexts(data.contexts(feature)),
          quantileContexts(data.quantileContexts(feature)),
          partners(data, feature),
        ),
        X.el("div", null, activations(data, feature), shares(data, feature), featureLogits(data, feature)),
      ),
    );
  };

  const strongestAt = (data, feature) => {
    const tokens = data.label(feature);
    return tokens.length ? ["strongest at ", X.tokens(tokens)] : "no contexts here";
  };

  const deadWords = (data) => {
    const dead = data.featureCount - data.alive.length;
    return `one of ${X.count(dead)} among ${X.plural(data.featureCount, "feature")}.`;
  };

  const firing = (data, tokens) => [
    X.percent(tokens / data.about.tokens),
    `${X.count(tokens)} of ${X.plural(data.about.tokens, "token")}`,
  ];

  const featureFacts = (data, feature) => {
    const { tokens, mean, max } = data.features;
    const pairs = data.pairsWith(feature);
    return facts([
      ["Fires on", ...firing(data, tokens[feature])],
      ["Mean activation", X.number(mean[feature]), "where it fires"],
      ["Largest activation", X.number(max[feature])],
      ...(data.pairCount
        ? [["Interaction energy", X.percent(data.energy(feature)), `in ${X.plural(pairs.length, "listed pair")}`]]
        : []),
    ]);
  };

  const topContexts = (contexts) => {
    if (!contexts.length) return null;
    const list = (some) => X.contextList(some, "activation");
    const more = contexts.slice(CONTEXTS);
    const folded = more.length ? X.folded(`${X.count(more.length)} more`, list(more)) : null;
    return part("Where it is strongest", list(contexts.slice(0, CONTEXTS)), folded);
  };

  const quantileContexts = (contexts) =>
    contexts.length
      ? part(
          "Across its range",
          note("Firings from all fifths of its activations, the strongest fifth first."),
          X.contextList(contexts, "activation"),
        )
      : null;

  const activations = (data, feature) =>
    part("Activations", X.histogram(data.histogram(feature), data.features.max[feature]));

  const shares = (data, feature) => {
    const { paths, gauges } = data.about;
    if (paths.length < 2) return null;
    return part(
      "Its paths",
      note("Each path\u2019s share of what the feature writes, root mean square over the tokens where it fires."),
      gauges.map((gauge) =>
        X.stackedShares(
          `${gauge[0].toUpperCase()}${gauge.slice(1)}`,
          paths.map((path) => ({ path, share: data.share(feature, path, gauge) })),
        ),
      ),
      note(
        "Shares as trained depend on the gauge: weight moved between W_dec and W_lin changes them, not the output",
        gauges.length > 1 ? "; read the canonical ones." : ".",
      ),
    );
  };

  const featureLogits = (data, feature) => {
    const { logit_direction: direction, logits_note: why } = data.about;
    const logits = data.logits(data.about.logits, feature);
    return part(
      "What it writes",
      logits
        ? [
            note(
              `Added to each token\u2019s logit per unit of activation, along ${direction}; mean over tokens removed.`,
            ),
            X.logitBars(logits),
          ]
        : note(why || "There are no logits for this feature."),
    );
  };

  const partners = (data, feature) => {
    if (!data.pairCount) return null;
    const rows = data.pairsWith(feature).map((pair) => partnerRow(data, feature, pair));
    const columns = [
      { label: "pair" },
      { label: "partner" },
      { label: "energy", number: true },
      { label: "mean norm", number: true },
      { label: "tokens", number: true },
    ];
    const table = (some) =>
      X.el(
        "div",
        { class: "ex-scroll", role: "region", "aria-label": "Partners", tabindex: "0" },
        X.table(columns, some, { class: "ex-partners" }),
      );
    const few = `None of the ${X.plural(data.pairCount, "listed pair")} contains it.`;
    return part(
      "Partners",
      rows.length
        ? [
            note("Pairs that contain it, by their share of the interaction energy of all pairs."),
            table(rows.slice(0, PARTNERS)),
          ]
        : note(few),
      rows.length > PARTNERS ? X.folded(`${X.count(rows.length - PARTNERS)} more`, table(rows.slice(PARTNERS))) : null,
    );
  };

  const partnerRow = (data, feature, pair) => {
    const [first, second] = data.ends(pair);
    const partner = first === feature ? second : first;
    return [
      X.pairLink(first, second),
      [X.featureLink(partner), " ", X.tokens(data.label(partner))],
      X.percent(data.pairs.share[pair]),
      X.number(data.pairs.norm[pair]),
      X.count(data.pairs.tokens[pair]),
    ];
  };

  X.pairCard = (data, pair) => {
    const ends = data.ends(pair);
    return card(
      `Pair ${ends[0]} \u00d7 ${ends[1]}`,
      X.el(
        "ul",
        { class: "ex-ends" },
        ends.map((feature) =>
          X.el(
            "li",
            null,
            X.featureLink(feature),
            ": ",
            strongestAt(data, feature),
            X.el("small", null, `fires on ${firing(data, data.features.tokens[feature])[0]}`),
          ),
        ),
      ),
      pairFacts(data, pair),
      X.el(
        "div",
        { class: "ex-columns" },
        X.el("div", null, part("Where it writes most", X.contextList(data.pairContexts(pair), "norm")), gates()),
        X.el("div", null, pairLogits(data, pair)),
      ),
    );
  };

  const pairFacts = (data, pair) => {
    const { tokens, share, norm, max_norm: most } = data.pairs;
    return facts([
      ["Both are read on", ...firing(data, tokens[pair])],
      ["Share of energy", X.percent(share[pair]), `rank ${X.count(pair + 1)} of ${X.count(data.pairCount)} listed`],
      ["Mean norm", X.number(norm[pair]), "of what it writes, where both are read"],
      ["Largest norm", X.number(most[pair])],
    ]);
  };

  const gates = () =>
    part(
      "What this cannot show",
      note(
        "What a pair writes holds the gates of the hidden units as they are. Removing the pair flips gates: ",
        X.el("code", null, "sae-nfm attribute"),
        " measures what that does.",
      ),
    );

  const pairLogits = (data, pair) => {
    const logits = data.logits(data.about.pair_logits, pair);
    return part(
      "What it writes",
      logits
        ? [
            note(
              "Added to each token\u2019s logit by the mean of what it writes, gates at their mean; mean over tokens removed.",
            ),
            X.logitBars(logits),
          ]
        : note("Logits are there for the strongest pairs only."),
    );
  };
})();
