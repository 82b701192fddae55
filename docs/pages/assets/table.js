// The table of measurements: a choice for each of suite and machine, words to look for, and columns that sort.
function measuredTable(root) {
  const { columns, rows } = JSON.parse(root.querySelector("script").textContent);
  const [body, head, count] = ["tbody", "thead", "output"].map((name) => root.querySelector(name));
  const controls = [...root.querySelectorAll("[data-column]")];
  const words = root.querySelector("input");
  let sorted = { column: 0, up: true };

  for (const control of controls) {
    const column = Number(control.dataset.column);
    for (const value of [...new Set(rows.map((row) => row[column]))].sort()) control.add(new Option(value, value));
    control.addEventListener("change", show);
  }
  words.addEventListener("input", show);
  const titles = head.appendChild(document.createElement("tr"));
  columns.forEach((title, column) => {
    const button = document.createElement("button");
    button.textContent = title;
    button.addEventListener("click", () => {
      sorted = { column, up: sorted.column === column ? !sorted.up : true };
      show();
    });
    titles.appendChild(document.createElement("th")).appendChild(button);
  });

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = rows.filter(
      (row) =>
        controls.every((control) => !control.value || row[Number(control.dataset.column)] === control.value) &&
        wanted.every((word) => row.join(" ").toLowerCase().includes(word)),
    );
    const { column, up } = sorted;
    const order = (a, b) =>
      typeof a === "number" && typeof b === "number" ? a - b : String(a ?? "").localeCompare(String(b ?? ""));
    kept.sort((a, b) => (up ? 1 : -1) * order(a[column], b[column]));
    [...titles.children].forEach((title, place) =>
      title.setAttribute("aria-sort", place !== column ? "none" : up ? "ascending" : "descending"),
    );
    body.replaceChildren(
      ...kept.map((row) => {
        const line = document.createElement("tr");
        for (const value of row) {
          const cell = line.appendChild(document.createElement("td"));
          cell.textContent = typeof value === "number" ? Number(value.toPrecision(3)) : value ?? "";
          if (typeof value === "number") cell.className = "number";
        }
        return line;
      }),
    );
    count.textContent = `${kept.length} of ${rows.length} measurements`;
  }
  show();
}
for (const root of document.querySelectorAll(".measured")) measuredTable(root);
