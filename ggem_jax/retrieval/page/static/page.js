// The page: a query (an image of the index, a file, a part of either, words) -> results as cards.

const $ = (id) => document.getElementById(id);
const LEAST_BOX = 8; // pixels of the screen that a drag must cover

// {id}, {file}, {words}, or null while images are browsed; box: x1, y1, x2, y2 in pixels of the image
let query = null;
let size = { width: 0, height: 0 };
let running = null;

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function ask(url, options = {}) {
  running?.abort();
  const mine = (running = new AbortController());
  document.body.classList.add("busy");
  try {
    const response = await fetch(url, { ...options, signal: mine.signal });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  } catch (error) {
    if (error.name !== "AbortError") {
      say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
    }
    return null;
  } finally {
    if (running === mine) document.body.classList.remove("busy");
  }
}

// Results

function moveOf(hit) {
  if (hit.rank_before === null) return element("span", "move up", "new");
  const up = hit.rank_before - hit.rank;
  if (up === 0) return element("span", "move", "=");
  return element("span", up > 0 ? "move up" : "move down", `${up > 0 ? "▲" : "▼"} ${Math.abs(up)}`);
}

function cardOf(entry, reranked) {
  const card = element("button", "card");
  card.type = "button";
  card.title = entry.name;
  card.dataset.id = entry.id;
  const frame = element("span", "frame");
  const image = element("img");
  image.loading = "lazy";
  image.alt = entry.name;
  image.src = `/thumbnail/${entry.id}`;
  image.addEventListener("error", () => frame.replaceChildren("this image cannot be shown"));
  frame.append(image);
  card.append(frame);
  if (entry.rank !== undefined) {
    const ranks = element("span", "ranks");
    ranks.append(element("b", "", `${entry.rank}.`), element("span", "", entry.score.toFixed(4)));
    if (reranked) ranks.append(moveOf(entry));
    card.append(ranks);
    if (reranked) {
      const before = entry.score_before;
      const told = before === null
        ? "not among the candidates"
        : `before: ${entry.rank_before}. at ${before.toFixed(4)}`;
      card.append(element("span", "before", told));
    }
    card.dataset.score = entry.score_before ?? -1;
  }
  card.append(element("span", "name", entry.name));
  if (entry.width) card.append(element("span", "size", `${entry.width} × ${entry.height}`));
  card.addEventListener("click", () => {
    if (location.hash === `#${entry.id}`) openEntry(entry.id);
    else location.hash = entry.id;
    scrollTo({ top: 0 });
  });
  const item = element("li");
  item.append(card);
  return item;
}

function show(entries, reranked = false) {
  $("results").replaceChildren(...entries.map((entry) => cardOf(entry, reranked)));
  applyLeast();
}

function applyLeast() {
  const least = Number($("least").value);
  $("least-value").textContent = least ? `${least.toFixed(2)}, before reranking` : "off";
  for (const card of document.querySelectorAll(".card[data-score]")) {
    card.parentElement.hidden = least > 0 && Number(card.dataset.score) < least;
  }
}

// Queries

function settings() {
  const values = { k: $("k").value, rerank: $("rerank").value };
  if ($("neighbors").value && values.rerank !== "none") values.neighbors = $("neighbors").value;
  if (query?.box) values.box = query.box.join(",");
  return values;
}

async function search() {
  if (query === null) return;
  const asked = query;
  showBox();
  let answer;
  if (asked.file) {
    const form = new FormData();
    for (const [name, value] of Object.entries(settings())) form.append(name, value);
    if (!asked.previewed) form.append("preview", "1");
    form.append("image", asked.file);
    answer = await ask("/search", { method: "POST", body: form });
  } else if (asked.words) {
    const values = { ...settings(), text: asked.words };
    answer = await ask(`/words?${new URLSearchParams(values)}`);
  } else {
    answer = await ask(`/similar/${asked.id}?${new URLSearchParams(settings())}`);
  }
  if (answer === null || asked !== query) return;
  if (answer.preview) {
    asked.previewed = true;
    showPreview(answer.preview, asked.file.name);
  }
  size = answer.query;
  if (asked.words) hidePreview();
  else if (!asked.file) showPreview(`/image/${asked.id}`, answer.query.name);
  show(answer.results, answer.rerank.method !== "none");
  const { network, search: searched } = answer.seconds;
  const changed = answer.index_changed ? " The index has changed since: restart the server." : "";
  const described = network ? `, network ${Math.round(network * 1000)} ms` : "";
  say(
    `${answer.results.length} results, search ${Math.round(searched * 1000)} ms${described}.${changed}`,
  );
}

function showPreview(source, name) {
  if ($("preview").getAttribute("src") !== source) $("preview").src = source;
  $("query-name").textContent = name;
  $("stage").hidden = $("crop").hidden = false;
  $("query").classList.add("filled");
  const touch = matchMedia("(pointer: coarse)").matches;
  $("hint").textContent = `${touch ? "Crop, then drag" : "Drag"} a box to search for a part`;
  showBox();
}

function hidePreview() {
  $("stage").hidden = $("crop").hidden = $("whole").hidden = true;
  $("query").classList.remove("filled");
  $("query-name").textContent = "";
  $("hint").textContent = "Drop or paste an image here";
}

function openFile(file) {
  if (!file) return;
  history.replaceState(null, "", location.pathname);
  query = { file, box: null };
  search();
}

function openEntry(id) {
  query = { id, box: null };
  search();
}

async function browse(seed) {
  query = null;
  const answer = await ask(`/images?k=60&seed=${seed}`);
  if (answer === null) return;
  hidePreview();
  show(answer.images);
  say("Choose an image, or click one to find more like it.");
}

function openHash() {
  const id = location.hash.slice(1);
  if (/^\d+$/.test(id)) openEntry(Number(id));
  else if (!query?.file && !query?.words) browse(0);
}

addEventListener("hashchange", openHash);
$("browse").addEventListener("click", () => {
  history.pushState(null, "", location.pathname);
  browse(Math.floor(Math.random() * 1e9));
});
for (const id of ["rerank", "k", "neighbors"]) $(id).addEventListener("change", search);
$("rerank").addEventListener("change", () => {
  $("neighbors-label").hidden = $("rerank").value === "none";
});
$("least").addEventListener("input", applyLeast);

$("words")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const words = $("text").value.trim();
  if (!words) return;
  history.replaceState(null, "", location.pathname);
  query = { words, box: null };
  search();
});

// Files: picked, pasted or dropped

$("file").addEventListener("change", () => {
  openFile($("file").files[0]);
  $("file").value = "";
});
addEventListener("paste", (event) => openFile(event.clipboardData.files[0]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  openFile(event.dataTransfer.files[0]);
});

// The box

function showBox() {
  const box = query?.box;
  $("whole").hidden = !box;
  $("box").hidden = !box;
  if (!box || !size.width) return;
  const [x1, y1, x2, y2] = box;
  place(x1 / size.width, y1 / size.height, x2 / size.width, y2 / size.height);
}

function place(left, top, right, bottom) {
  const style = $("box").style;
  style.left = `${100 * left}%`;
  style.top = `${100 * top}%`;
  style.width = `${100 * (right - left)}%`;
  style.height = `${100 * (bottom - top)}%`;
}

const stage = $("stage");
let from = null;

function pointOf(event) {
  const frame = $("preview").getBoundingClientRect();
  const inside = (value) => Math.min(Math.max(value, 0), 1);
  return [
    inside((event.clientX - frame.left) / frame.width),
    inside((event.clientY - frame.top) / frame.height),
  ];
}

function cornersTo(event) {
  const [x, y] = pointOf(event);
  const [left, right] = [from.x, x].sort((a, b) => a - b);
  const [top, bottom] = [from.y, y].sort((a, b) => a - b);
  return [left, top, right, bottom];
}

stage.addEventListener("pointerdown", (event) => {
  const byTouch = event.pointerType !== "mouse";
  if (event.button || query === null || (byTouch && !stage.classList.contains("cropping"))) return;
  event.preventDefault();
  const [x, y] = pointOf(event);
  from = { x, y, clientX: event.clientX, clientY: event.clientY };
  stage.setPointerCapture(event.pointerId);
});
stage.addEventListener("pointermove", (event) => {
  if (from === null) return;
  place(...cornersTo(event));
  $("box").hidden = false;
});
stage.addEventListener("pointerup", (event) => {
  if (from === null) return;
  const [left, top, right, bottom] = cornersTo(event);
  const dragged = [event.clientX - from.clientX, event.clientY - from.clientY].map(Math.abs);
  from = null;
  if (Math.min(...dragged) < LEAST_BOX || right <= left || bottom <= top) {
    showBox();
    return;
  }
  const { width, height } = size;
  const box = [left * width, top * height, right * width, bottom * height].map(Math.round);
  setCropping(false);
  query = { ...query, box };
  search();
});
stage.addEventListener("pointercancel", () => {
  from = null;
  showBox();
});

function setCropping(on) {
  stage.classList.toggle("cropping", on);
  $("crop").setAttribute("aria-pressed", on);
}

$("crop").addEventListener("click", () => setCropping(!stage.classList.contains("cropping")));
$("whole").addEventListener("click", () => {
  query = { ...query, box: null };
  search();
});

openHash();
