// The page of several scorings: the videos on which their best classes differ, where one alone is right on top.

const { runs, paths, labels, said } = data;
const NAME = 0, SCORE = 1, RIGHT = 2, FAILURE = 3; // of said[run][video]
const videos = paths.map((_, video) => video);

const group = (video) => {
  const right = runs.filter((_, run) => said[run][video][RIGHT]);
  return right.length ? `right: ${right.join(", ")}` : "none right";
};
const groups = videos.map(group);
const texts = videos.map((video) =>
  [paths[video], labels[video], ...said.map((run) => run[video][NAME])].join("\n").toLowerCase());
const surest = (video) => Math.max(...said.map((run) => (run[video][RIGHT] ? 0 : run[video][SCORE])));

document.getElementById("list").style.setProperty("--guesses", runs.length);
const list = new VideoList(document.getElementById("list"), (video) => {
  const label = element("p", { class: "labels", title: labels[video] }, element("small", {}, "label "), labels[video]);
  const status = element("p", { class: "is unlabelled" }, groups[video]);
  const what = element("div", { class: "what" }, pathLine(video), label, status);
  const right = element("div", { class: "guesses" });
  runs.forEach((name, run) => {
    const [best, score, hit, failure] = said[run][video];
    const line = guess(failure ? `unreadable: ${failure}` : best, score, hit ? "true named" : "wrong named");
    line.prepend(element("span", { class: "run", title: name }, name));
    right.append(line);
  });
  return previews.length ? [preview(video), what, right] : [what, right];
});

const chosen = { text: "", show: "all" };

function update() {
  const order = videos.filter((video) =>
    (chosen.show === "all" || groups[video] === chosen.show) &&
    chosen.text.split(/\s+/).every((word) => texts[video].includes(word)));
  order.sort((a, b) => (groups[a] === "none right") - (groups[b] === "none right") || surest(b) - surest(a) || a - b);
  document.getElementById("count").textContent =
    order.length === videos.length ? `${order.length}` : `${order.length} of ${videos.length}`;
  list.show(order);
}

for (const show of ["all", ...new Set(groups)]) {
  const count = show === "all" ? videos.length : groups.filter((group) => group === show).length;
  document.getElementById("show").append(element("option", { value: show }, `${show} (${count})`));
}
document.getElementById("search").addEventListener("input", (event) => {
  chosen.text = event.target.value.trim().toLowerCase();
  update();
});
document.getElementById("show").addEventListener("change", (event) => {
  chosen.show = event.target.value;
  update();
});
update();
