"use strict";
// Draws the photographs of the page's data with their boxes, filtered by class and score.
// Every text comes in through textContent: names of files and classes are never read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const select = document.getElementById("class");
const slider = document.getElementById("score");
const CHANGES = {
  gained: { color: "#1a9c45", ink: "#fff", sign: "+ " },
  lost: { color: "#d1242f", ink: "#fff", sign: "\u2212 " },
};

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function photo(image, boxes) {
  const holder = element("div", "photo");
  const picture = element("img");
  picture.src = image.src;
  picture.alt = `${image.id}, ${boxes.length} boxes`;
  holder.style.aspectRatio = `${image.width} / ${image.height}`;
  holder.append(picture);
  const tags = boxes.map(([label, score, left, top, width, height, change]) => {
    const { name, color, ink } = { ...data.classes[label], ...CHANGES[change] };
    const outline = element("div", `box ${change}`);
    Object.assign(outline.style, {
      left: `${left}%`, top: `${top}%`, width: `${width}%`, height: `${height}%`, borderColor: color,
    });
    holder.append(outline);
    const tag = element("div", "tag", `${CHANGES[change]?.sign ?? ""}${name} ${score.toFixed(2)}`);
    Object.assign(tag.style, { background: color, color: ink });
    tag.box = [left, top, width, height];
    return tag;
  });
  holder.append(...tags);
  return holder;
}

// Tags go above their box, inside it at the top, or below; one that would cover a better one is left out.
function placeTags(holder) {
  const { clientWidth: width, clientHeight: height } = holder;
  const taken = [];
  for (const tag of holder.querySelectorAll(".tag")) {
    const [left, top, boxWidth, boxHeight] = tag.box;
    const x = Math.max(0, Math.min((left / 100) * width, width - tag.offsetWidth));
    const above = (top / 100) * height - tag.offsetHeight;
    const inside = Math.min((top / 100) * height, height - tag.offsetHeight);
    const below = ((top + boxHeight) / 100) * height;
    const free = [above, inside, below].find((y) => {
      const fits = (y >= 0 && y + tag.offsetHeight <= height) || y === inside;
      return fits && !taken.some(([a, b, c, d]) =>
        x < c && a < x + tag.offsetWidth && y < d && b < y + tag.offsetHeight);
    });
    tag.style.visibility = free === undefined ? "hidden" : "visible";
    if (free === undefined) continue;
    tag.style.left = `${x}px`;
    tag.style.top = `${free}px`;
    taken.push([x, free, x + tag.offsetWidth, free + tag.offsetHeight]);
  }
}

// The largest size with the photograph's shape that fits.
function fit(holder, image, width, height) {
  const scale = Math.min(width / image.width, height / image.height);
  holder.style.width = `${Math.max(1, image.width * scale)}px`;
  holder.style.height = `${Math.max(1, image.height * scale)}px`;
}

function card(image, boxes) {
  const figure = element("figure", "card");
  const stage = element("div", "stage");
  const holder = photo(image, boxes);
  figure.tabIndex = 0;
  stage.append(holder);
  figure.append(stage, element("figcaption", "", image.id));
  figure.layout = () => {
    fit(holder, image, stage.clientWidth, stage.clientHeight);
    placeTags(holder);
  };
  figure.addEventListener("click", () => enlarge(image, boxes));
  figure.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(image, boxes); });
  return figure;
}

function enlarge(image, boxes) {
  const dialog = document.getElementById("large");
  const holder = photo(image, boxes);
  const figure = element("figure");
  figure.append(holder, element("figcaption", "", image.id));
  dialog.replaceChildren(figure);
  fit(holder, image, window.innerWidth * 0.96, window.innerHeight * 0.86);
  dialog.onclick = () => dialog.close();
  dialog.showModal();
  placeTags(holder);
}

function show(gallery, cards) {
  gallery.replaceChildren(...cards);
  for (const each of cards) each.layout();
}

function update() {
  const wanted = select.value;
  const least = Number(slider.value);
  document.getElementById("value").textContent = least.toFixed(2);
  const cards = [];
  let count = 0;
  for (const image of data.images) {
    const boxes = image.boxes.filter(([label, score]) =>
      score >= least && (wanted === "" || label === Number(wanted)));
    if (!boxes.length && (wanted !== "" || image.boxes.length)) continue;
    count += boxes.length;
    cards.push(card(image, boxes));
  }
  document.getElementById("count").textContent =
    `${cards.length} of ${data.images.length} images, ${count} boxes`;
  show(document.getElementById("gallery"), cards);
  const name = wanted === "" ? "" : data.classes[wanted].name;
  history.replaceState(null, "", `#${new URLSearchParams({ class: name, score: slider.value })}`);
}

// A link to the page can name a class and a score: #class=dog&score=0.6
function restore() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const label = data.classes.findIndex(({ name }) => name === wanted.get("class"));
  if (shown.has(label)) select.value = label;
  if (wanted.get("score")) slider.value = wanted.get("score");
}

const shown = new Set(data.images.flatMap((image) => image.boxes.map(([label]) => label)));
select.append(new Option("all", ""));
data.classes.forEach(({ name }, label) => { if (shown.has(label)) select.append(new Option(name, label)); });
select.addEventListener("change", update);
slider.addEventListener("input", update);
const changes = document.getElementById("changes");
restore();
if (changes) show(changes, data.changes.map((image) => card(image, image.boxes)));
update();
window.addEventListener("resize", () => {
  for (const figure of document.querySelectorAll("figure.card")) figure.layout();
});
