// Comfort only: the page says everything without it.
document.querySelectorAll("button.copy").forEach((button) => {
  button.hidden = false;
  button.addEventListener("click", () => {
    const line = button.previousElementSibling;
    const range = document.createRange();
    range.selectNodeContents(line);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    if (!navigator.clipboard) return;
    navigator.clipboard.writeText(line.textContent).then(() => {
      button.textContent = "copied";
      setTimeout(() => (button.textContent = "copy"), 1500);
    }, () => {});
  });
});
document.querySelectorAll("figure table").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.classList.add("sortable");
    head.tabIndex = 0;
    const key = (row) => {
      const cell = row.cells[column];
      const exact = cell.querySelector("span[title]");
      const value = Number(exact ? exact.title : cell.textContent);
      return Number.isNaN(value) ? cell.textContent : value;
    };
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x < typeof y ? -1 : 1;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
});
