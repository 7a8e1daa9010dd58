// Replaces each drawing by an interactive one. With `ast` Vega interprets its expressions and does not run text as code,
// which the page's policy does not allow.
const specifications = JSON.parse(document.getElementById("specifications").textContent);
for (const place of document.querySelectorAll("[data-panel]")) {
  vegaEmbed(place, specifications[place.dataset.panel], {
    actions: false,
    ast: true,
    defaultStyle: false,
    renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  });
}
