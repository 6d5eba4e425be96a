// Draws the plotly figures of a tutorial, in the colours of the page; each when it comes into view.
(() => {
  const colours = () => {
    const dark = document.body.getAttribute("data-md-color-scheme") === "slate";
    return { text: dark ? "#e2e4e9" : "#1a1a1a", grid: dark ? "#3c4043" : "#e3e6ea" };
  };
  const axes = (layout) => Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
  const themed = (layout) => {
    const { text, grid } = colours();
    const changed = { ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    delete changed.width;
    changed.font = { ...(layout.font || {}), color: text };
    for (const key of new Set(["xaxis", "yaxis", ...axes(layout)]))
      changed[key] = { ...(layout[key] || {}), gridcolor: grid, zerolinecolor: grid, linecolor: grid };
    return changed;
  };
  const draw = (figure) => {
    const { data, layout } = (figure.parsed ??= JSON.parse(figure.querySelector("script").textContent));
    const target = figure.querySelector(".drawn") ?? figure.appendChild(document.createElement("div"));
    target.className = "drawn";
    target.style.height = `${layout.height || 420}px`;
    Plotly.react(target, data, themed(layout), { responsive: true, displaylogo: false, displayModeBar: "hover" });
  };
  const figures = [...document.querySelectorAll(".plotly-figure")];
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "600px" });
  figures.forEach((figure) => seen.observe(figure));
  addEventListener("beforeprint", () => figures.forEach(draw));
  new MutationObserver(() => figures.filter((figure) => figure.parsed).forEach(draw))
    .observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme"] });
})();
