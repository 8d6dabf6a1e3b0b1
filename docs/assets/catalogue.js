// Filters of the catalogue. The page is whole without this script; there is no library and no request.
(function () {
  "use strict";
  const table = document.getElementById("catalogue-table");
  const place = document.getElementById("catalogue-filters");
  if (!table || !place) return;
  const rows = [...table.tBodies[0].rows];
  const filters = [
    ["kind", "Kind"],
    ["acts", "Acts on"],
    ["needs", "Reads"],
    ["update", "Changes"],
    ["year", "Since year"],
  ];
  const values = (row, name) => (row.dataset[name] || "").split(" ").filter(Boolean);
  const controls = {};

  function labelled(text, control) {
    const label = document.createElement("label");
    label.append(text, control);
    place.append(label);
    return control;
  }

  const words = labelled("Words", document.createElement("input"));
  words.type = "search";
  words.name = "words";

  for (const [name, text] of filters) {
    const select = labelled(text, document.createElement("select"));
    select.name = name;
    const found = [...new Set(rows.flatMap((row) => values(row, name)))].sort();
    select.append(new Option("any", ""));
    for (const value of found) select.append(new Option(value.replace(/_/g, " "), value));
    controls[name] = select;
  }

  const clear = document.createElement("button");
  clear.type = "button";
  clear.textContent = "Show all";
  const count = document.createElement("output");
  count.setAttribute("aria-live", "polite");
  place.append(clear, count);

  function fits(row) {
    for (const [name] of filters) {
      const wanted = controls[name].value;
      if (!wanted) continue;
      if (name === "year" ? !(Number(row.dataset.year) >= Number(wanted)) : !values(row, name).includes(wanted)) return false;
    }
    const text = row.textContent.toLowerCase();
    return words.value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  function apply() {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !fits(row);
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length}`;
  }

  place.addEventListener("input", apply);
  clear.addEventListener("click", () => {
    words.value = "";
    for (const select of Object.values(controls)) select.value = "";
    apply();
    words.focus();
  });
  place.hidden = false;
  apply();
})();
