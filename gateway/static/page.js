// Everything that a page does by itself: it follows the log, draws curves, shows local times and sends its forms.
import { draw } from "./curves.js";
import { follow, refresh } from "./live.js";
import { send } from "./forms.js";

function dress(root) {
  for (const figure of root.querySelectorAll("figure.curve")) draw(figure);
  for (const time of root.querySelectorAll("time")) {
    time.title = time.textContent;
    time.textContent = new Date(time.dateTime).toLocaleString();
  }
}

document.addEventListener("submit", async (event) => {
  const form = event.target.closest("form.action");
  if (!form) return;
  event.preventDefault();
  const position = await send(form);
  if (position !== null) await refresh(position);
});

dress(document);
for (const log of document.querySelectorAll("pre")) log.scrollTop = log.scrollHeight; // the end of a log says why
const live = document.querySelector("[data-live]");
if (live) follow(live, dress);
