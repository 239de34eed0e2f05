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
const valueOf = (cell) => {
  const exact = cell.querySelector("span[title]");
  const value = exact ? exact.title : cell.textContent;
  return value === "" || Number.isNaN(Number(value)) ? cell.textContent : Number(value);
};
document.querySelectorAll("figure table").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.classList.add("sortable");
    head.tabIndex = 0;
    const key = (row) => valueOf(row.cells[column]);
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
      table.dispatchEvent(new Event("sorted"));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
});

// Tables of many rows: pages of 25, a filter for each column.
// "word": holds it, "=word": is it, ">3", "<=0.5", "2..7": numbers.
const test = (wanted) => {
  const number = "-?(?:\\d+\\.?\\d*|\\.\\d+)(?:e[-+]?\\d+)?";
  const range = wanted.match(new RegExp(`^(${number})\\.\\.(${number})$`, "i"));
  if (range) return (v) => typeof v === "number" && v >= +range[1] && v <= +range[2];
  const bound = wanted.match(new RegExp(`^(<=|>=|<|>)\\s*(${number})$`, "i"));
  if (bound) {
    const [side, than] = [bound[1], Number(bound[2])];
    return (v) => typeof v === "number"
      && (side[0] === "<" ? v < than : v > than) | (side.length === 2 && v === than);
  }
  const text = wanted.toLowerCase();
  if (text.startsWith("=")) return (v) => String(v).toLowerCase() === text.slice(1).trim();
  return (v) => String(v).toLowerCase().includes(text);
};
document.querySelectorAll("table.browse").forEach((table) => {
  const size = 25;
  const body = table.tBodies[0];
  const box = table.parentElement;
  let page = 0;
  const make = (name, text, parent) => {
    const made = document.createElement(name);
    made.textContent = text;
    parent.append(made);
    return made;
  };
  const bar = document.createElement("div");
  bar.className = "pager";
  const place = make("span", "", bar);
  place.setAttribute("role", "status");
  const steps = { "first": () => 0, "previous": (p) => p - 1, "next": (p) => p + 1, "last": () => Infinity };
  const buttons = Object.entries(steps).map(([name, step]) => {
    const button = make("button", name, bar);
    button.type = "button";
    button.addEventListener("click", () => show(step(page)));
    return button;
  });
  make("span", "keys in the table: n next, p previous, f filter; filters: word, =word, >3, 2..7", bar).className = "faint";
  box.before(bar);
  box.classList.remove("tall");
  const line = table.tHead.insertRow();
  const filters = [...table.tHead.rows[0].cells].map((head) => {
    const cell = line.insertCell();
    if (!head.textContent) return null;
    const input = document.createElement("input");
    input.type = "search";
    input.setAttribute("aria-label", `filter by ${head.textContent}`);
    input.addEventListener("input", () => show(0));
    cell.append(input);
    return input;
  });
  const show = (wanted) => {
    const tests = filters.map((input) => input && input.value.trim() && test(input.value.trim()));
    const kept = [...body.rows].filter((row) => {
      row.hidden = true;
      return tests.every((one, i) => !one || one(valueOf(row.cells[i])));
    });
    const last = Math.max(0, Math.ceil(kept.length / size) - 1);
    page = Math.min(Math.max(wanted, 0), last);
    const shown = kept.slice(page * size, (page + 1) * size);
    shown.forEach((row) => (row.hidden = false));
    const from = kept.length ? page * size + 1 : 0;
    place.textContent = `${from} to ${page * size + shown.length} of ${kept.length}`
      + (kept.length < body.rows.length ? ` that match, ${body.rows.length} in all` : "");
    buttons.forEach((button, i) => (button.disabled = i < 2 ? page === 0 : page === last));
  };
  table.addEventListener("sorted", () => show(0));
  box.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = { n: page + 1, p: page - 1, PageDown: page + 1, PageUp: page - 1, Home: 0, End: Infinity }[event.key];
    if (event.key === "f") filters.find((input) => input).focus();
    else if (key === undefined) return;
    else show(key);
    event.preventDefault();
  });
  show(0);
});
