"use strict";
// What the pages share: their data, elements, and a list that holds only the rows in sight.
// Names and paths are set as text, never as HTML.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data");
const previews = read("previews");
const percent = (share) => (100 * share).toFixed(share > 0.9995 ? 0 : 1) + "%";
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function preview(video) {
  if (!previews[video]) return element("div", { class: "preview" });
  const image = element("img", { class: "preview", alt: "", src: "data:image/webp;base64," + previews[video] });
  if (!still) return image;
  const canvas = element("canvas", { class: "preview" }); // its first frame
  image.decode().then(() => {
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
  });
  return canvas;
}

function pathLine(video) {
  const path = data.paths[video];
  const end = path.lastIndexOf("/") + 1;
  const folder = element("small", {}, path.slice(0, end));
  return element("p", { class: "path", title: path }, folder, path.slice(end));
}

// name, share of 1, how it is marked: "true", "wrong" or ""
function guess(name, share, mark) {
  const bar = element("i", { class: "bar" }, element("i", { "--of": share }));
  const label = element("span", { title: name }, name);
  return element("div", { class: `guess ${mark}` }, label, bar, element("b", {}, percent(share)));
}

// Rows of one height; `render(video)` gives what is in one.
class VideoList {
  constructor(root, render) {
    [this.root, this.render, this.order, this.rows, this.active] = [root, render, [], new Map(), 0];
    root.classList.toggle("bare", previews.length === 0);
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focusin", (event) => this.activate(+event.target.closest(".row").dataset.place));
    addEventListener("scroll", () => this.update(), { passive: true });
    addEventListener("resize", () => this.measure());
    this.measure();
  }

  measure() { // one row, which the style sheet gives its height
    const row = this.root.appendChild(element("article", { class: "row" }));
    this.height = row.getBoundingClientRect().height;
    row.remove();
    this.update();
  }

  show(order) {
    for (const row of this.rows.values()) row.remove();
    [this.order, this.active] = [order, 0];
    this.rows.clear();
    this.update();
  }

  update() {
    this.root.style.height = this.order.length * this.height + "px";
    const top = -this.root.getBoundingClientRect().top;
    const last = Math.ceil((top + innerHeight) / this.height) + 3;
    const first = Math.max(0, Math.floor(top / this.height) - 3);
    const end = Math.min(this.order.length, Math.max(last, first + 6)); // some also while all lie below
    for (const [place, row] of this.rows) {
      if (place >= first && place < end) continue;
      row.remove();
      this.rows.delete(place);
    }
    let next = this.root.firstChild;
    for (let place = first; place < end; place++) {
      const row = this.rows.get(place) || this.root.insertBefore(this.make(place), next);
      row.style.top = place * this.height + "px";
      next = row.nextSibling;
    }
    if (!this.rows.has(this.active) && first < end) this.activate(Math.min(first + 3, end - 1));
  }

  make(place) {
    const row = element("article", {
      class: "row",
      tabindex: place === this.active ? 0 : -1,
      "aria-posinset": place + 1,
      "aria-setsize": this.order.length,
      "data-place": place,
      "data-video": this.order[place],
    });
    row.append(...this.render(this.order[place]));
    this.rows.set(place, row);
    return row;
  }

  activate(place) { // the row that Tab comes to
    this.rows.get(this.active)?.setAttribute("tabindex", -1);
    this.active = place;
    this.rows.get(place)?.setAttribute("tabindex", 0);
  }

  key(event) {
    const page = Math.max(1, Math.floor(innerHeight / this.height) - 1);
    const last = this.order.length - 1;
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -last, End: last }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const place = Math.min(last, Math.max(0, this.active + step));
    const top = this.root.getBoundingClientRect().top + place * this.height;
    if (top < 0) scrollBy(0, top - 8);
    else if (top + this.height > innerHeight) scrollBy(0, top + this.height - innerHeight + 8);
    this.update();
    this.rows.get(place).focus({ preventScroll: true });
  }
}

// Arrow keys among the cells of a table, one of which Tab comes to.
function arrows(cells, width) {
  cells.forEach((cell, i) => cell.setAttribute("tabindex", i ? -1 : 0));
  const go = (from, to) => {
    if (!cells[to]) return;
    cells.forEach((cell) => cell.setAttribute("tabindex", -1));
    cells[to].setAttribute("tabindex", 0);
    cells[to].focus();
  };
  cells.forEach((cell, i) => {
    const column = i % width;
    cell.addEventListener("keydown", (event) => {
      const to = {
        ArrowLeft: column > 0 ? i - 1 : i,
        ArrowRight: column < width - 1 ? i + 1 : i,
        ArrowUp: i - width,
        ArrowDown: i + width,
        Home: i - column,
        End: i - column + width - 1,
      }[event.key];
      if (event.key === "Enter" || event.key === " ") cell.click();
      else if (to !== undefined) go(i, to);
      else return;
      event.preventDefault();
    });
  });
}
