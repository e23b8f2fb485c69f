"use strict";
// Every table.sortable gets a button in each header, a text filter, and a choice for each column marked data-choose.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const tools = document.createElement("div"), count = document.createElement("output");
  const search = document.createElement("input"), choices = [];
  const text = (row, i) => row.cells[i].dataset.text ?? row.cells[i].textContent.trim();

  const add = (name, control) => {
    const label = document.createElement("label");
    label.append(name, control);
    tools.append(label);
    control.addEventListener("input", filter);
  };

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const all = heads.map((_, i) => text(row, i)).join(" ").toLowerCase();
      row.hidden = !words.every((word) => all.includes(word)) ||
        !choices.every(([i, choice]) => choice.value === "" || choice.value === "=" + text(row, i));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }

  function sort(column) {
    const head = heads[column], falls = head.getAttribute("aria-sort") === (head.dataset.first ?? "ascending");
    const way = (head.dataset.first === "descending") === falls ? 1 : -1;
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    const number = "number" in head.dataset;
    const value = (row) => number ? parseFloat(row.cells[column].dataset.value) : text(row, column);
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (!number) return way * x.localeCompare(y, "en", { numeric: true });
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what was not measured comes last, either way
      return way * (x - y);
    };
    body.append(...[...rows].sort(compare));
  }

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(i));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
  search.type = "search";
  search.placeholder = "any words";
  add("Filter", search);
  heads.forEach((head, i) => {
    if (!("choose" in head.dataset)) return;
    const choice = document.createElement("select");
    choice.append(new Option("all", ""));
    for (const value of new Set(rows.map((row) => text(row, i)))) choice.append(new Option(value, "=" + value));
    choices.push([i, choice]);
    add(head.textContent, choice);
  });
  tools.className = "tools";
  tools.append(count);
  table.closest(".scroll").before(tools);
  filter();
}
