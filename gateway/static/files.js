// Uploads a problem's files: announced to the API, sent straight to the object store, then verified and kept.
import { ask, token } from "./api.js";

const MOST = 1e9; // bytes: a browser holds a whole file in memory to take its digest
const TRIES = 60; // each waits ten seconds for the verification of large files

export async function upload(form, say) {
  const path = form.getAttribute("action");
  const chosen = new Map();
  for (const input of form.querySelectorAll("input[type=file]")) {
    for (const file of input.files) chosen.set(file.name, { file, role: input.name });
  }
  const files = [];
  for (const { file, role } of chosen.values()) {
    say(`Reading ${file.name}…`);
    files.push({ name: file.name, size: file.size, sha256: await digest(file), role });
  }
  const { body } = await ask("POST", `${path}/uploads`, { files });
  for (const slot of body.slots) {
    await put(slot, chosen.get(slot.name).file, (percent) => say(`Sending ${slot.name}: ${percent} %`));
  }
  say("Verifying…");
  return verified(`${path}/files`, { files });
}

async function verified(path, body) {
  const key = token();
  for (let tries = 1; ; tries += 1) {
    try {
      return (await ask("POST", path, body, key)).position;
    } catch (error) {
      if (error.status !== 504 || tries === TRIES) throw error; // the work goes on; the same key asks for its outcome
    }
  }
}

async function digest(file) {
  if (!crypto.subtle) throw new Error("A browser uploads only over HTTPS, or on this machine. Use a script: docs/api.md.");
  if (file.size > MOST) throw new Error(`${file.name} is too large for a browser. Use a script: docs/api.md.`);
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function put(slot, file, progress) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest(); // fetch does not tell how far an upload is
    request.open("PUT", slot.url);
    for (const [name, value] of Object.entries(slot.headers)) {
      if (name.toLowerCase() !== "content-length") request.setRequestHeader(name, value); // the browser's own to say
    }
    request.upload.onprogress = (event) => progress(Math.floor((100 * event.loaded) / event.total || 0));
    // 412: the same bytes are there already
    request.onload = () => (request.status === 200 || request.status === 412 ? done() : failed(new Error(refused(slot, request))));
    request.onerror = () => failed(new Error(`The object store did not take ${slot.name}. It may not allow this page: docs/api.md.`));
    request.send(file);
  });
}

function refused(slot, request) {
  return `The object store refused ${slot.name} (${request.status}). Try again; the link may have expired.`;
}
