// Sends a form to the API as JSON and says what came of it. Returns the log position that it reached, or null.

export async function send(form) {
  const output = form.querySelector("output");
  const button = form.querySelector("button");
  button.disabled = true;
  output.className = "";
  output.textContent = "…";
  try {
    const reply = await fetch(form.getAttribute("action"), request(form));
    const body = await reply.json();
    if (!reply.ok) throw new Error(body.detail || body.title);
    output.textContent = "";
    if (body.problem_id) location.assign(`/problems/${body.problem_id}?at_least=${reply.headers.get("Fedota-Position") ?? 0}`);
    else if (body.url) location.assign(body.url);
    form.reset();
    return Number(reply.headers.get("Fedota-Position") ?? 0);
  } catch (error) {
    output.className = "wrong";
    output.textContent = error instanceof TypeError ? "Fedota does not answer. Try again in a moment." : error.message;
    return null;
  } finally {
    button.disabled = false;
  }
}

function request(form) {
  const method = form.dataset.method;
  if (method === "GET") return { method };
  // a form that is sent twice asks for the same thing: its key stays until it has succeeded
  const body = JSON.stringify(values(form));
  if (form.dataset.body !== body) Object.assign(form.dataset, { body, key: token() });
  return { method, headers: { "Content-Type": "application/json", "Idempotency-Key": form.dataset.key }, body };
}

function token() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function values(form) {
  const found = {};
  for (const field of form.querySelectorAll("[name]")) {
    const path = field.name.split(".");
    const name = path.pop();
    const holder = path.reduce((object, step) => (object[step] ??= {}), found);
    holder[name] = "number" in field.dataset ? Number(field.value) : field.value;
  }
  return found;
}
