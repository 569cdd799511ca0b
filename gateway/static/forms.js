// Sends a form to the API as JSON and says what came of it. Returns the log position that it reached, or null.
import { ask, token } from "./api.js";
import { upload } from "./files.js";

export async function send(form) {
  const output = form.querySelector("output");
  const button = form.querySelector("button");
  const say = (words, wrong = false) => {
    output.className = wrong ? "wrong" : "";
    output.textContent = words;
  };
  button.disabled = true;
  say("…");
  try {
    const position = await ("upload" in form.dataset ? upload(form, say) : submit(form));
    say("");
    form.reset();
    return position;
  } catch (error) {
    say(error instanceof TypeError ? "Fedota does not answer. Try again in a moment." : error.message, true);
    return null;
  } finally {
    button.disabled = false;
  }
}

async function submit(form) {
  const body = values(form);
  // a form that is sent again because no answer came asks for the same thing, by the same key
  const text = JSON.stringify(body);
  if (form.dataset.body !== text) Object.assign(form.dataset, { body: text, key: token() });
  try {
    const reply = await ask(form.dataset.method, form.getAttribute("action"), body, form.dataset.key);
    delete form.dataset.body;
    if (reply.body.problem_id) location.assign(`/problems/${reply.body.problem_id}?at_least=${reply.position}`);
    else if (reply.body.url) location.assign(reply.body.url);
    return reply.position;
  } catch (error) {
    if (error.status < 500) delete form.dataset.body;
    throw error;
  }
}

function values(form) {
  const found = {};
  for (const field of form.querySelectorAll("[name]")) {
    if ("number" in field.dataset && field.value === "") continue; // an empty text is one, an empty number is none
    const path = field.name.split(".");
    const name = path.pop();
    const holder = path.reduce((object, step) => (object[step] ??= {}), found);
    holder[name] = "number" in field.dataset ? Number(field.value) : field.value;
  }
  return found;
}
