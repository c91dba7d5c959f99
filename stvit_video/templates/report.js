// The page of one scoring: classes, confusion matrix, videos. `data` is what write_report_page puts there.

const { classes, paths, labels, best, scores, failures } = data;
const MATRIX = 40; // classes of a matrix that can still be seen and clicked
const chosen = { text: "", show: "all", sort: "mistakes", label: null, cell: null };

function kind(video) {
  if (video in failures) return "unreadable";
  if (!labels[video].length) return "unlabelled";
  return labels[video].includes(best[video][0]) ? "right" : "mistake";
}
const kinds = paths.map((_, video) => kind(video));
const names = (ids) => ids.map((id) => classes[id]).join(", ");
const texts = paths.map((path, video) => {
  const said = best[video].length ? classes[best[video][0]] : failures[video];
  return `${path}\n${names(labels[video])}\n${said}`.toLowerCase();
});

// Videos

const RANK = { mistake: 0, unreadable: 1, right: 2, unlabelled: 2 };
const sure = (video) => (best[video].length ? scores[video][0] : 0);
const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const ORDERS = {
  mistakes: (a, b) =>
    RANK[kinds[a]] - RANK[kinds[b]] || (kinds[a] === "mistake" ? sure(b) - sure(a) : sure(a) - sure(b)),
  sure: (a, b) => sure(b) - sure(a),
  unsure: (a, b) => sure(a) - sure(b),
  label: (a, b) => compare(names(labels[a]), names(labels[b])),
  path: (a, b) => compare(paths[a], paths[b]),
};

const guesses = best.reduce((most, ids) => Math.max(most, ids.length), 0);
document.getElementById("list").style.setProperty("--guesses", guesses);
const list = new VideoList(document.getElementById("list"), (video) => {
  const status = element("p", { class: `is ${kinds[video]}` }, kinds[video].replace("unlabelled", "no label"));
  const label = element("p", { class: "labels", title: names(labels[video]) });
  if (labels[video].length) label.append(element("small", {}, "label "), names(labels[video]));
  const what = element("div", { class: "what" }, pathLine(video), label, status);
  const right = element("div", { class: "guesses" });
  if (video in failures) right.append(element("p", { class: "cause", title: failures[video] }, failures[video]));
  best[video].forEach((id, place) => {
    const mark = labels[video].includes(id) ? "true" : place === 0 && labels[video].length ? "wrong" : "";
    right.append(guess(classes[id], scores[video][place], mark));
  });
  return previews.length ? [preview(video), what, right] : [what, right];
});

function matches(video) {
  const { show, label, cell, text } = chosen;
  if (show !== "all" && kinds[video] !== show) return false;
  if (label !== null && !labels[video].includes(label)) return false;
  if (cell && !(labels[video][0] === cell[0] && best[video][0] === cell[1])) return false;
  return text.split(/\s+/).every((word) => texts[video].includes(word));
}

function update() {
  const order = paths.map((_, video) => video).filter(matches);
  order.sort((a, b) => ORDERS[chosen.sort](a, b) || a - b);
  document.getElementById("count").textContent =
    order.length === paths.length ? `${order.length}` : `${order.length} of ${paths.length}`;
  list.show(order);
  const chips = [];
  if (chosen.label !== null) chips.push([classes[chosen.label], "label"]);
  if (chosen.cell) chips.push([`${classes[chosen.cell[0]]}, predicted ${classes[chosen.cell[1]]}`, "cell"]);
  document.getElementById("chips").replaceChildren(...chips.map(([name, key]) => {
    const chip = element("button", { class: "chip", "aria-label": `${name}: remove this filter` }, name);
    chip.addEventListener("click", () => choose({ [key]: null }));
    return chip;
  }));
  for (const row of document.querySelectorAll("#classes tbody tr"))
    row.setAttribute("aria-selected", +row.dataset.id === chosen.label && chosen.label !== null);
  for (const cell of document.querySelectorAll("#matrix td"))
    cell.setAttribute("aria-selected", `${chosen.cell}` === cell.dataset.cell);
}

function choose(change) {
  Object.assign(chosen, change);
  update();
}

function chooseAndShow(change) { // the videos lie below what was clicked
  choose(change);
  if (Object.values(change)[0] === null) return;
  document.getElementById("of-videos").scrollIntoView({ behavior: still ? "auto" : "smooth" });
}

// Classes

let order = ["value", 1];
const KEYS = { name: (id) => classes[id], videos: (id) => data.videos_of[id], value: (id) => data.values[id] ?? 2 };

function drawClasses() {
  const [key, sign] = order;
  const ids = classes.map((_, id) => id).sort((a, b) => sign * compare(KEYS[key](a), KEYS[key](b)) || a - b);
  const rows = ids.map((id) => {
    const name = element("button", {}, classes[id]);
    name.addEventListener("click", () => chooseAndShow({ label: chosen.label === id ? null : id, cell: null }));
    const value = data.values[id];
    const bar = value === null ? "" : element("span", { class: "bar" }, element("i", { "--of": value }));
    const cells = [name, data.videos_of[id], value === null ? "–" : percent(value), bar];
    const row = element("tr", { "data-id": id, "aria-selected": id === chosen.label });
    row.append(...cells.map((content, i) => element("td", i === 3 ? { class: "measure" } : {}, content)));
    return row;
  });
  document.querySelector("#classes tbody").replaceChildren(...rows);
  for (const head of document.querySelectorAll("#classes th[data-key]")) {
    const direction = sign > 0 ? "ascending" : "descending";
    head.setAttribute("aria-sort", head.dataset.key === key ? direction : "none");
  }
}

for (const head of document.querySelectorAll("#classes th[data-key]")) {
  head.firstElementChild.addEventListener("click", () => {
    order = [head.dataset.key, order[0] === head.dataset.key ? -order[1] : 1];
    drawClasses();
  });
}

// Confusion

function drawMatrix() {
  const counts = new Map(); // "true,predicted" -> videos
  const mistakes = classes.map(() => 0);
  paths.forEach((_, video) => {
    if (!labels[video].length || !best[video].length) return;
    const pair = [labels[video][0], best[video][0]];
    counts.set(`${pair}`, (counts.get(`${pair}`) || 0) + 1);
    if (pair[0] !== pair[1]) pair.forEach((id) => mistakes[id]++);
  });
  let ids = classes.map((_, id) => id);
  if (ids.length > MATRIX) {
    ids = ids.sort((a, b) => mistakes[b] - mistakes[a]).slice(0, MATRIX).sort((a, b) => a - b);
    document.getElementById("which").textContent =
      `the ${MATRIX} of ${classes.length} classes with most mistakes; rows: true class, columns: predicted`;
    drawPairs(counts);
  }
  const matrix = document.getElementById("matrix");
  const room = matrix.parentElement.clientWidth - 120; // beside the names
  const side = Math.max(ids.length > 20 ? 15 : 28, Math.min(44, Math.floor(room / ids.length) - 2));
  matrix.style.setProperty("--cell", side + "px");
  const heads = ids.map((id) => element("th", { title: classes[id] }, element("span", {}, classes[id])));
  matrix.tHead.append(element("tr", {}, element("th"), ...heads));
  const cells = [];
  for (const label of ids) {
    const head = element("th", { scope: "row", title: classes[label] }, element("span", {}, classes[label]));
    const row = element("tr", {}, head);
    for (const predicted of ids) {
      const count = counts.get(`${[label, predicted]}`) || 0;
      const share = count / Math.max(1, data.videos_of[label]);
      const says = `${classes[label]}, predicted ${classes[predicted]}: ` +
        `${count} of ${data.videos_of[label]} videos (${percent(share)})`;
      const cell = element("td", {
        role: "gridcell", "aria-label": says, "aria-selected": false, "data-cell": `${[label, predicted]}`,
        "--of": Math.sqrt(share), "--tone": label === predicted ? "var(--blue)" : "var(--red)",
      }, count && side >= 24 ? count : "");
      const tell = () => (document.getElementById("readout").textContent = says);
      cell.addEventListener("mouseenter", tell);
      cell.addEventListener("focus", tell);
      cell.addEventListener("click", () => chooseCell([label, predicted]));
      row.append(cell);
      cells.push(cell);
    }
    matrix.tBodies[0].append(row);
  }
  arrows(cells, ids.length);
}

function chooseCell(cell) {
  chooseAndShow({ cell: `${chosen.cell}` === `${cell}` ? null : cell, label: null });
}

function drawPairs(counts) { // of many classes, where some lie outside the matrix
  const pairs = [...counts].map(([pair, count]) => [pair.split(",").map(Number), count]);
  const confused = pairs.filter(([[label, predicted]]) => label !== predicted).sort((a, b) => b[1] - a[1]);
  for (const [pair, count] of confused.slice(0, 100)) {
    const button = element("button", {}, `${classes[pair[0]]} → ${classes[pair[1]]} (${count})`);
    button.addEventListener("click", () => chooseCell(pair));
    document.getElementById("pairs").append(element("li", {}, button));
  }
}

// Start

const titles = { all: "all", mistake: "mistakes", right: "right", unreadable: "unreadable", unlabelled: "without label" };
for (const [show, title] of Object.entries(titles)) {
  const count = show === "all" ? paths.length : kinds.filter((kind) => kind === show).length;
  if (count) document.getElementById("show").append(element("option", { value: show }, `${title} (${count})`));
}
document.getElementById("search").addEventListener("input", (event) => choose({ text: event.target.value.trim().toLowerCase() }));
document.getElementById("show").addEventListener("change", (event) => choose({ show: event.target.value }));
document.getElementById("sort").addEventListener("change", (event) => choose({ sort: event.target.value }));
drawClasses();
if (document.getElementById("matrix")) drawMatrix();
update();
