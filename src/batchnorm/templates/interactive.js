// Replaces each drawing by a live one. `ast` makes Vega interpret its expressions: no text is run as code, so
// the page's policy need not allow that.
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
