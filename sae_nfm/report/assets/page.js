// Draws the figures of the page from the JSON beside them, hands out their data as CSV, and marks the section in view.
(function () {
  "use strict";
  const NARROW = 600;
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };

  function read(figure) {
    return JSON.parse(document.getElementById(figure.id + "-data").textContent);
  }

  function merged(layout, changes) {
    const result = Object.assign({}, layout);
    for (const [key, value] of Object.entries(changes || {})) {
      const plain = value !== null && typeof value === "object" && !Array.isArray(value);
      result[key] = plain ? merged(layout[key] || {}, value) : value;
    }
    return result;
  }

  function layoutFor(layout, width) {
    if (width >= NARROW) return layout;
    const smaller = merged(layout, { font: { size: 11 }, legend: { font: { size: 11 } } });
    return merged(smaller, layout.meta && layout.meta.narrow);
  }

  function draw(figure) {
    const div = figure.querySelector(".figure");
    if (div.dataset.ready) return Promise.resolve();
    div.dataset.ready = "drawing";
    const plot = read(figure).plot;
    const layout = layoutFor(plot.layout, div.clientWidth);
    div.style.minHeight = layout.height + "px";
    return Plotly.newPlot(div, plot.data, layout, CONFIG).then(function () { div.dataset.ready = "true"; });
  }

  function csv(table) {
    const quoted = function (value) {
      const text = value === null ? "" : String(value);
      return /[",\n\r]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
    };
    return [table.columns].concat(table.data).map(function (row) { return row.map(quoted).join(","); }).join("\r\n") + "\r\n";
  }

  function download(figure) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(read(figure).data)], { type: "text/csv" }));
    link.download = figure.id + ".csv";
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  }

  const figures = Array.from(document.querySelectorAll("figure")).filter(function (figure) { return figure.querySelector(".figure"); });
  if ("IntersectionObserver" in window) {
    const near = new IntersectionObserver(function (entries) {
      for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
    }, { rootMargin: "800px" });
    figures.forEach(function (figure) { near.observe(figure); });
  } else {
    figures.forEach(draw);
  }
  window.addEventListener("beforeprint", function () { figures.forEach(draw); });
  // a phone that is turned: other layouts, not only another width
  window.matchMedia("(max-width: " + (NARROW - 1) + "px)").addEventListener("change", function () {
    for (const figure of figures) {
      const div = figure.querySelector(".figure");
      if (div.dataset.ready === "true") { div.dataset.ready = ""; draw(figure); }
    }
  });
  document.addEventListener("click", function (event) {
    const button = event.target.closest("button.download");
    if (button) download(document.getElementById(button.dataset.figure));
  });

  const menu = document.querySelector("nav details");
  if (menu && window.innerWidth < 1100) menu.open = false;
  if (menu) menu.addEventListener("click", function (event) {
    if (event.target.closest("a") && window.innerWidth < 1100) menu.open = false;
  });
  const links = new Map(Array.from(document.querySelectorAll("nav a")).map(function (a) { return [a.getAttribute("href").slice(1), a]; }));
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver(function (entries) {
      for (const entry of entries) {
        const link = links.get(entry.target.id);
        if (!link || !entry.isIntersecting) continue;
        links.forEach(function (other) { other.removeAttribute("aria-current"); });
        link.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "0px 0px -80% 0px" });
    document.querySelectorAll("main > section").forEach(function (section) { seen.observe(section); });
  }
})();
