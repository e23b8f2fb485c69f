// One set of filters for the page: it chooses runs, and with them their setups, in tables, pictures and details alike.
// Means stand for all seeds of a setup; where one seed is chosen its own marks stay and means in pictures fade.
for (const runs of document.querySelectorAll("#runs-table")) {
  const rows = [...runs.tBodies[0].rows], heads = [...runs.tHead.rows[0].cells];
  const panel = document.getElementById("filters"), count = make("output"), choices = [];
  const words = make("input", { type: "search", placeholder: "any words" });
  const texts = new Map(rows.map((row) => [row, [...row.cells].map(said).join(" ").toLowerCase()]));
  const marked = [...document.querySelectorAll("[data-setups]")].map((part) =>
    [part, part.dataset.setups.split(" "), part.dataset.seed, part instanceof SVGElement]);
  const setups = new Set(rows.map((row) => row.dataset.setups)).size;

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = rows.filter((row) => wanted.every((word) => texts.get(row).includes(word)) &&
      choices.every(([i, choice]) => choice.value === "" || choice.value === `=${said(row.cells[i])}`));
    const left = new Set(chosen.map((row) => row.dataset.setups)), of = new Set(chosen.map((row) =>
      `${row.dataset.setups} ${row.dataset.seed}`)), single = new Set(chosen);
    for (const [part, numbers, seed, drawn] of marked) {
      const kept = part.parentElement === runs.tBodies[0] ? single.has(part)
        : numbers.some((number) => seed === undefined ? left.has(number) : of.has(`${number} ${seed}`));
      part.classList.toggle("out", !kept);
    }
    document.body.classList.toggle("one-seed", choices.some(([i, choice]) => heads[i].dataset.seed === "" && choice.value));
    count.textContent = `${chosen.length} of ${rows.length} runs, ${left.size} of ${setups} setup${setups === 1 ? "" : "s"}`;
  };

  const add = (name, control) => {
    panel.append(make("label", {}, name, control));
    control.addEventListener("input", filter);
  };
  add("Filter", words);
  heads.forEach((head, i) => {
    const values = [...new Set(rows.map((row) => said(row.cells[i])))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    if (!("choose" in head.dataset) || values.length < 2) return;
    const choice = make("select", {}, new Option("all", ""), ...values.map((value) => new Option(value, `=${value}`)));
    choices.push([i, choice]);
    add(said(head), choice);
  });
  const all = make("button", { type: "button" }, "Show all");
  all.addEventListener("click", () => {
    words.value = "";
    for (const [, choice] of choices) choice.value = "";
    filter();
  });
  panel.append(count, all);
  panel.hidden = false;
  filter();
}

// A table of its own column to choose by, for example networks.
for (const table of document.querySelectorAll("table.sortable:not(#runs-table)")) {
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (!("choose" in head.dataset)) return;
    const rows = [...table.tBodies[0].rows], values = [...new Set(rows.map((row) => said(row.cells[i])))];
    if (values.length < 2) return;
    const choice = make("select", {}, new Option("all", ""), ...values.map((value) => new Option(value, `=${value}`)));
    choice.addEventListener("input", () => {
      for (const row of rows) row.classList.toggle("unchosen", choice.value !== "" && choice.value !== `=${said(row.cells[i])}`);
    });
    table.closest(".scroll").before(make("div", { className: "tools" }, make("label", {}, said(head), choice)));
  });
}

// A link to a part that is folded away opens it.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();
