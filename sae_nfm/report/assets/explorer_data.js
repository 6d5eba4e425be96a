// What `sae-nfm explore` wrote: inflating it, and looking things up in its columns.
(() => {
  "use strict";
  const X = (window.SaeExplorer = window.SaeExplorer || {});
  const KIND = "explore/1";
  const STRONGEST = 255;

  // The data in an element of base64 text.
  X.read = async (element) => {
    const bytes = Uint8Array.from(atob(element.textContent.trim()), (character) => character.charCodeAt(0));
    const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const content = await new Response(inflated).json();
    const kind = content.kind ?? KIND; // files of 0.1.0 say none
    if (kind !== KIND) throw new Error(`its kind is "${kind}", not "${KIND}"`);
    return new Explorer(content);
  };

  class Explorer {
    constructor(content) {
      this.about = content;
      this.features = content.features;
      this.pairs = content.pairs;
      this.featureCount = content.features.tokens.length;
      this.pairCount = content.pairs.first.length;
      this.alive = [];
      this.features.tokens.forEach((tokens, feature) => tokens > 0 && this.alive.push(feature));
      this.labels = new Map();
      this.partnersOf = new Map();
      this.pairNumbers = new Map();
      for (let pair = 0; pair < this.pairCount; pair += 1) this.enter(pair);
    }

    enter(pair) {
      const ends = this.ends(pair);
      this.pairNumbers.set(`${Math.min(...ends)},${Math.max(...ends)}`, pair);
      for (const feature of new Set(ends)) {
        if (!this.partnersOf.has(feature)) this.partnersOf.set(feature, []);
        this.partnersOf.get(feature).push(pair);
      }
    }

    ends(pair) {
      return [this.pairs.first[pair], this.pairs.second[pair]];
    }

    // The number of the pair of two features, -1 for none.
    pairOf(first, second) {
      const pair = this.pairNumbers.get(`${Math.min(first, second)},${Math.max(first, second)}`);
      return pair === undefined ? -1 : pair;
    }

    // The pairs that contain a feature, by descending energy.
    pairsWith(feature) {
      return this.partnersOf.get(feature) || [];
    }

    // What part of the interaction energy its pairs have, of those listed.
    energy(feature) {
      return this.pairsWith(feature).reduce((sum, pair) => sum + this.pairs.share[pair], 0);
    }

    // The gauge to compare features in: the canonical one where the SAE has it.
    get gauge() {
      return this.about.gauges[this.about.gauges.length - 1];
    }

    share(feature, path, gauge) {
      return this.features.shares[gauge || this.gauge][path][feature];
    }

    word(position) {
      return this.about.vocab[this.about.stream.ids[position]];
    }

    histogram(feature) {
      return this.features.histogram.slice(feature * this.about.bins, (feature + 1) * this.about.bins);
    }

    // Where the feature is strongest, and firings drawn evenly from the ranks of all; both by descending activation.
    contexts(feature) {
      const { contexts, marks } = this.about;
      return this.firings(feature, this.features.context_starts, contexts, marks);
    }

    quantileContexts(feature) {
      const { quantile_contexts: contexts, quantile_marks: marks } = this.about;
      return contexts ? this.firings(feature, this.features.quantile_starts, contexts, marks) : [];
    }

    firings(feature, starts, contexts, marks) {
      const most = this.features.max[feature];
      return range(starts, feature).map((context) => {
        const strengths = new Map(
          marksOf(contexts, marks, context).map(({ at, strength }) => [at, strength / STRONGEST]),
        );
        const position = contexts.position[context];
        return {
          ...this.window(position, (at) => strengths.get(at) || 0, most),
          value: X.stepped(strengths.get(position) * most, most),
        };
      });
    }

    pairContexts(pair) {
      const most = this.pairs.max_norm[pair];
      return range(this.pairs.context_starts, pair).map((context) => {
        const position = this.about.pair_contexts.position[context];
        const value = this.about.pair_contexts.norm[context];
        return { ...this.window(position, (at) => (at === position ? value / most : 0), most), value: X.number(value) };
      });
    }

    // The tokens around a position: text, strength from 0 to 1, value in words, whether it is the one in question; and
    // whether the sequence begins or ends inside the window.
    window(position, strength, most) {
      const starts = this.about.stream.row_starts;
      const row = last(starts, position);
      const [before, after] = this.about.window;
      const from = Math.max(starts[row], position - before);
      const to = Math.min(starts[row + 1], position + after + 1);
      const tokens = [];
      for (let at = from; at < to; at += 1) {
        tokens.push({
          text: this.word(at),
          strength: strength(at),
          value: X.stepped(strength(at) * most, most),
          peak: at === position,
        });
      }
      return { tokens, begins: position - before < from, ends: position + after >= to };
    }

    // Tokens pushed up and down: {up, down} with {text, value}, strongest first; null where there are none.
    logits(table, number) {
      const entries = range(table.starts, number).map((i) => ({
        text: this.about.vocab[table.token[i]],
        value: table.value[i],
      }));
      const half = entries.length / 2;
      return entries.length ? { up: entries.slice(0, half), down: entries.slice(half) } : null;
    }

    // Up to three tokens at which the feature is strongest, the commonest first: what it is called in lists.
    label(feature) {
      if (!this.labels.has(feature)) {
        const tally = new Map();
        for (const context of range(this.features.context_starts, feature)) {
          const word = this.word(this.about.contexts.position[context]);
          tally.set(word, (tally.get(word) || 0) + 1);
        }
        this.labels.set(
          feature,
          [...tally]
            .sort((a, b) => b[1] - a[1])
            .slice(0, 3)
            .map(([word]) => word),
        );
      }
      return this.labels.get(feature);
    }

    // Tokens that a text means: those that read the same, upper or lower case; failing these, those that begin with it.
    tokensLike(text) {
      const wanted = X.readable(text).trim().toLowerCase();
      const read = this.about.vocab.map((word) => X.readable(word).trim().toLowerCase());
      const found = (test) => new Set(read.map((word, id) => (test(word) ? id : -1)).filter((id) => id >= 0));
      if (!wanted) return { exact: true, ids: new Set() };
      const same = found((word) => word === wanted);
      return same.size ? { exact: true, ids: same } : { exact: false, ids: found((word) => word.startsWith(wanted)) };
    }

    // Features that fire at some tokens in their top contexts, by the sum of their strengths there, one a context.
    featuresAt(ids) {
      return ranked(this.alive, (feature) =>
        range(this.features.context_starts, feature).map((context) =>
          marksOf(this.about.contexts, this.about.marks, context).reduce(
            (most, { at, strength }) =>
              ids.has(this.about.stream.ids[at]) ? Math.max(most, strength / STRONGEST) : most,
            0,
          ),
        ),
      );
    }

    // Pairs with contexts at some tokens, by the sum of the norms there.
    pairsAt(ids) {
      const { position, norm } = this.about.pair_contexts;
      return ranked([...this.pairs.first.keys()], (pair) =>
        range(this.pairs.context_starts, pair).map((context) =>
          ids.has(this.about.stream.ids[position[context]]) ? norm[context] : 0,
        ),
      );
    }
  }

  // Items with any strength in their contexts, the largest sum first.
  const ranked = (items, strengths) =>
    items
      .map((item) => ({ item, strengths: strengths(item) }))
      .map(({ item, strengths }) => ({
        item,
        strength: strengths.reduce((sum, value) => sum + value, 0),
        hits: strengths.filter((value) => value > 0).length,
        contexts: strengths.length,
      }))
      .filter(({ hits }) => hits > 0)
      .sort((a, b) => b.strength - a.strength);

  // Where the feature fires in a context: positions, and strengths from 1 to 255.
  const marksOf = ({ position, mark_starts: starts }, { offset, strength }, context) =>
    range(starts, context).map((mark) => ({ at: position[context] + offset[mark], strength: strength[mark] }));

  // The indices of row `i` in a table whose rows begin at `starts`.
  const range = (starts, i) => Array.from({ length: starts[i + 1] - starts[i] }, (_, offset) => starts[i] + offset);

  // The last i with starts[i] <= value.
  const last = (starts, value) => {
    let low = 0;
    let high = starts.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (starts[middle] <= value) low = middle;
      else high = middle;
    }
    return low;
  };
})();
