// One request to the API. Gives { body, position }, or throws an error whose message is the API's own words.

export async function ask(method, path, body, key) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key ?? token() };
  const reply = await fetch(path, method === "GET" ? {} : { method, headers, body: JSON.stringify(body) });
  if (reply.status === 401) location.reload(); // the session has ended: sign in again, and come back here
  const answer = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(answer.detail || answer.title), { status: reply.status });
  return { body: answer, position: Number(reply.headers.get("Fedota-Position") ?? 0) };
}

export function token() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
