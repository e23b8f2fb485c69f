"use strict";
// Every table.sortable gets a button in each header that sorts it; every table with data-export gets buttons that copy
// the rows that are shown as Markdown or LaTeX, or save them as CSV with the exact values.
const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const said = (cell) => cell.dataset.text ?? cell.textContent.replace(/\s+/g, " ").trim();

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const sort = (column) => {
    const head = heads[column], falls = head.getAttribute("aria-sort") === (head.dataset.first ?? "ascending");
    const way = (head.dataset.first === "descending") === falls ? 1 : -1;
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    const number = "number" in head.dataset;
    const value = (row) => number ? parseFloat(row.cells[column].dataset.value) : said(row.cells[column]);
    const keyed = [...body.rows].map((row) => [value(row), row]);
    keyed.sort(([x], [y]) => {
      if (!number) return way * x.localeCompare(y, "en", { numeric: true });
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what was not measured comes last, either way
      return way * (x - y);
    });
    body.append(...keyed.map(([, row]) => row));
  };
  heads.forEach((head, i) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => sort(i));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
}

const shownRows = (table) => [...table.tBodies[0].rows].filter((row) => !row.matches(".out, .unchosen"));
const columnsOf = (table) => [...table.tHead.rows[0].cells].map((head) =>
  ({ name: said(head), number: head.classList.contains("number") }));
const WRITERS = {
  Markdown(table) {
    const line = (cells) => `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |\n`;
    const columns = columnsOf(table);
    return line(columns.map((c) => c.name)) + line(columns.map((c) => c.number ? "---:" : "---")) +
      shownRows(table).map((row) => line([...row.cells].map(said))).join("");
  },
  LaTeX(table) {
    const signs = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$",
      "−": "$-$", "Δ": "$\\Delta$", "α": "$\\alpha$", "–": "--", "·": "$\\cdot$", "∞": "$\\infty$", "<": "$<$", ">": "$>$" };
    const tex = (text) => text.replace(/[\\~^±−Δα–·∞<>]|[&%$#_{}]/g, (sign) => signs[sign] ?? `\\${sign}`);
    const line = (cells) => `  ${cells.map(tex).join(" & ")} \\\\\n`;
    const columns = columnsOf(table);
    return `% needs \\usepackage{booktabs}\n\\begin{tabular}{${columns.map((c) => c.number ? "r" : "l").join("")}}\n` +
      `  \\toprule\n${line(columns.map((c) => c.name))}  \\midrule\n` +
      shownRows(table).map((row) => line([...row.cells].map(said))).join("") + "  \\bottomrule\n\\end{tabular}\n";
  },
  CSV(table) {
    const quoted = (text) => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const rows = shownRows(table), columns = columnsOf(table);
    const spread = columns.map((_, i) => rows.some((row) => row.cells[i].dataset.spread)); // of ±, where there is one
    const line = (cells, more) => cells.flatMap((cell, i) => spread[i] ? [cell, more[i]] : [cell]).map(quoted).join(",") + "\n";
    return line(columns.map((c) => c.name), columns.map((c) => `${c.name} ±`)) + rows.map((row) => line(
      [...row.cells].map((c) => c.dataset.value ?? said(c)), [...row.cells].map((c) => c.dataset.spread ?? ""))).join("");
  },
};

function save(name, text, type) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const table of document.querySelectorAll("table[data-export]")) {
  const tools = make("p", { className: "export" });
  for (const [kind, write] of Object.entries(WRITERS)) {
    const button = make("button", { type: "button" }, kind === "CSV" ? "Save CSV" : `Copy ${kind}`);
    button.addEventListener("click", async () => {
      const text = write(table), name = button.textContent;
      if (kind === "CSV") return save(`${table.dataset.export}.csv`, text, "text/csv");
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = name; }, 1500);
      } catch { // no clipboard for this page: a file instead
        save(`${table.dataset.export}.${kind === "LaTeX" ? "tex" : "md"}`, text, "text/plain");
      }
    });
    tools.append(button);
  }
  table.closest(".scroll").after(tools);
}
