// Tables of class `sorted` by any column, from its head's button; cells may have a data-value.
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => { const cell = row.cells[at]; return cell.dataset.value ?? cell.textContent.trim(); };
    const number = text => text !== "" && isFinite(text);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      return number(x) && number(y) ? x - y : x.localeCompare(y);
    });
    table.tBodies[0].append(...(up ? rows : rows.reverse()));
  }));
}
