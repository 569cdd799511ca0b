// Follows the log by server-sent events and asks for the page anew when it has moved. The server renders; nothing is
// worked out twice. An event at or below the last position is dropped, so nothing is shown twice after a broken stream.

const PAUSE = 400; // ms between two looks at the page, however fast events come
const RETRY = 3000;

let source = null;
let page = null;
let dress = null;
let last = 0;
let shown = 0;
let working = false;

export function follow(element, dressing) {
  page = element.dataset;
  dress = dressing;
  last = shown = Number(page.position);
  // a browser opens six connections to a host: tabs that nobody looks at give theirs back
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  if (!document.hidden) open();
}

function open() {
  if (source) return;
  const url = new URL(page.stream, location.origin);
  url.searchParams.set("after", last);
  source = new EventSource(url);
  source.onopen = () => tell("live", "Live");
  source.onerror = lost;
  for (const type of page.types.split(" ")) source.addEventListener(type, take);
}

function close() {
  source?.close();
  source = null;
}

function lost() {
  const time = new Date().toLocaleTimeString();
  tell("lost", `Disconnected at ${time} — what you see may be old. Trying again…`);
  // the browser tries again by itself after a broken stream, but never after a refused one
  if (source?.readyState === EventSource.CLOSED) {
    close();
    setTimeout(reopen, RETRY);
  }
}

async function reopen() {
  if (document.hidden || source) return;
  const reply = await fetch(page.live, { redirect: "manual" }).catch(() => null);
  if (reply?.type === "opaqueredirect") location.reload(); // the session has ended: sign in again
  open();
}

function take(event) {
  const position = Number(event.lastEventId);
  if (position <= last) return;
  last = position;
  refresh(last);
}

export async function refresh(position = last) {
  last = Math.max(last, position);
  if (working || !page) return;
  working = true;
  try {
    while (shown < last) {
      const wanted = last;
      await render(wanted);
      shown = wanted;
      await new Promise((done) => setTimeout(done, PAUSE));
    }
  } catch {
    tell("lost", "The page could not be brought up to date. Trying again…");
    setTimeout(refresh, RETRY);
  } finally {
    working = false;
  }
}

async function render(position) {
  const url = new URL(page.live, location.origin);
  url.searchParams.set("at_least", position);
  const reply = await fetch(url, { headers: { Accept: "text/html" }, redirect: "manual" });
  if (reply.type === "opaqueredirect") location.reload();
  if (!reply.ok) throw new Error(`status ${reply.status}`);
  const fresh = new DOMParser().parseFromString(await reply.text(), "text/html");
  for (const part of fresh.querySelectorAll("[data-part]")) replace(part);
  if (source?.readyState === EventSource.OPEN) tell("live", "Live");
}

const rendered = new Map(); // the last HTML of each part, as the server wrote it

function replace(part) {
  const name = part.dataset.part;
  const old = document.querySelector(`[data-part="${CSS.escape(name)}"]`);
  if (!old || rendered.get(name) === part.outerHTML || inUse(old)) return;
  rendered.set(name, part.outerHTML);
  for (const details of old.querySelectorAll("details[open][id]")) {
    part.querySelector(`#${CSS.escape(details.id)}`)?.setAttribute("open", "");
  }
  const focused = place(old, document.activeElement);
  const scrolled = [...old.querySelectorAll("pre, .scroll, .feed")].map((box) => [box.scrollLeft, box.scrollTop]);
  dress(part);
  old.replaceWith(part);
  part.querySelectorAll("pre, .scroll, .feed").forEach((box, index) => {
    if (scrolled[index]) [box.scrollLeft, box.scrollTop] = scrolled[index];
    else if (box.matches("pre")) box.scrollTop = box.scrollHeight; // the end of a log says why
  });
  if (focused >= 0) part.querySelectorAll("a, button, input, summary, [tabindex]")[focused]?.focus();
}

// somebody is typing there: their words are worth more than our news
function inUse(part) {
  return [...part.querySelectorAll("input, textarea")].some((field) => field.value !== field.defaultValue);
}

function place(part, element) {
  return [...part.querySelectorAll("a, button, input, summary, [tabindex]")].indexOf(element);
}

function tell(state, text) {
  const sign = document.querySelector(".connection");
  sign.hidden = false;
  if (sign.dataset.state === state && state === "lost") return;
  sign.dataset.state = state;
  sign.textContent = text;
  document.body.classList.toggle("lost", state === "lost");
}
