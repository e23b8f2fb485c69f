// Pictures: what a mark is, said beside the pointer; a click on the legend switches its series off and on.
{
  const tip = make("div", { id: "tip", hidden: true });
  document.body.append(tip);
  for (const title of document.querySelectorAll("figure svg title")) { // ours is quicker than the browser's own
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const part = event.target instanceof Element && event.target.closest("figure [data-tip]");
    tip.hidden = !part;
    if (!part) return;
    tip.textContent = part.dataset.tip;
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = event.clientY + 18 + tip.offsetHeight > innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${event.clientY + (above ? -tip.offsetHeight - 10 : 18)}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  for (const svg of document.querySelectorAll("figure svg")) {
    const series = new Map();
    for (const part of svg.querySelectorAll("[data-series]"))
      series.set(part.dataset.series, [...(series.get(part.dataset.series) ?? []), part]);
    const entries = [...svg.querySelectorAll("[data-legend]")].filter((entry) => series.has(entry.dataset.legend));
    for (const entry of entries) {
      const name = entry.dataset.legend, text = entry.querySelector("text") !== null;
      const toggle = () => {
        const off = !series.get(name)[0].classList.contains("off");
        for (const part of series.get(name)) part.classList.toggle("off", off);
        for (const other of entries) if (other.dataset.legend === name) {
          other.classList.toggle("faded", off);
          if (other.hasAttribute("role")) other.setAttribute("aria-pressed", String(!off));
        }
      };
      entry.classList.add("switch");
      entry.addEventListener("click", toggle);
      if (!text) continue; // one stop of the keyboard per entry: its name
      for (const [key, value] of Object.entries({ role: "button", tabindex: "0", "aria-pressed": "true", "aria-label": name }))
        entry.setAttribute(key, value);
      entry.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle();
      });
    }
    const button = make("button", { type: "button" }, "Save SVG");
    button.addEventListener("click", () => {
      const style = getComputedStyle(svg), copy = svg.cloneNode(true);
      copy.querySelectorAll(".off, .out").forEach((part) => part.remove());
      const text = new XMLSerializer().serializeToString(copy)
        .replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name));
      save(`${svg.dataset.name}.svg`, text, "image/svg+xml");
    });
    svg.closest("figure").append(make("p", { className: "export" }, button));
  }
}
