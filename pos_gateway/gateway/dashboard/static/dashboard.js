// What every page has: words, posting, the live line, the idle lock. Everything is set as text, never as markup.
"use strict";

const at = (id) => document.getElementById(id);
const DATA = JSON.parse(at("page-data").textContent);
const say = (english, values = {}) =>
  (DATA.words[english] || english).replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));

function uuid7() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  let now = Date.now();
  for (let i = 5; i >= 0; i--) { bytes[i] = now % 256; now = Math.floor(now / 256); }
  bytes[6] = 0x70 | (bytes[6] & 0x0f);
  bytes[8] = 0x80 | (bytes[8] & 0x3f);
  const hex = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`;
}

function goSignIn() {
  location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
}

async function post(path, body = {}, headers = {}) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": document.querySelector("meta[name=csrf]").content, ...headers },
      body: JSON.stringify(body),
    });
  } catch { throw new Error(say("The gateway does not answer.")); }
  const answer = await response.json();
  if (response.status === 401 && !document.body.classList.contains("door") && !path.endsWith("/approvals")) goSignIn();
  if (!response.ok) {
    const { reason, advice } = answer.error;
    throw new Error(advice ? `${say(reason)} – ${say(advice)}` : say(reason));
  }
  return answer;
}

function toast(text) {
  at("toast").textContent = text;
  at("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { at("toast").hidden = true; }, 6000);
}

function minorUnits(text) {
  const match = /^(\d{1,10})(?:\.(\d*))?$/.exec(text.trim().replace(",", "."));
  const decimals = match && (match[2] || "");
  if (!match || decimals.length > DATA.exponent) return null;
  return Number(match[1] + decimals.padEnd(DATA.exponent, "0"));
}

function money(minor) {
  const sign = minor < 0 ? "-" : "", digits = String(Math.abs(minor)).padStart(DATA.exponent + 1, "0");
  const cut = digits.length - DATA.exponent;
  return sign + digits.slice(0, cut) + (DATA.exponent ? `.${digits.slice(cut)}` : "");
}

function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 90) return say("{n} s", { n: s });
  if (s < 5400) return say("{n} min", { n: Math.round(s / 60) });
  if (s < 172800) return say("{n} h", { n: Math.round(s / 3600) });
  return say("{n} days", { n: Math.round(s / 86400) });
}

// Live: one stream for the page; however fast events come, the page is drawn once a frame.
const live = { watchers: [], status: null, payments: new Map(), due: false };
function watch(draw) { live.watchers.push(draw); }
function drawSoon() {
  if (live.due) return;
  live.due = true;
  const drawNow = () => {
    if (!live.due) return;
    live.due = false;
    const payments = [...live.payments.values()];
    live.payments.clear();
    if (live.status) drawLine(live.status);
    for (const draw of live.watchers) draw(payments, live.status);
  };
  requestAnimationFrame(drawNow);
  setTimeout(drawNow, 250); // a window that is covered is given no frames
}
function drawLine(status) {
  const chip = at("line-chip"), up = status.line.up;
  if (!chip) return;
  chip.className = `chip ${up ? "up" : up === false ? "down" : "unknown"}`;
  chip.textContent = up ? say("Connected") : up === false ? say("Off the network – taps still work") : say("Line not tried yet");
}
if (DATA.events) {
  const events = new EventSource(DATA.events);
  events.addEventListener("payment", (event) => {
    const payment = JSON.parse(event.data);
    live.payments.set(payment.lane || "", payment);
    drawSoon();
  });
  events.addEventListener("status", (event) => { live.status = JSON.parse(event.data); drawSoon(); });
  events.addEventListener("locked", () => { events.close(); goSignIn(); });
  let lost = 0;
  events.addEventListener("open", () => { lost = 0; });
  events.addEventListener("error", () => {
    const chip = at("line-chip");
    if (chip) { chip.className = "chip lost"; chip.textContent = say("This page lost its gateway – retrying"); }
    if (events.readyState === EventSource.CLOSED && ++lost > 0) setTimeout(() => location.reload(), 3000);
  });
}

// Pages that are drawn by the server draw themselves anew when something changed, at most every 3 s.
const liveRegion = at("live");
if (liveRegion) {
  let busy = false, last = 0, timer = 0;
  const redraw = async () => {
    timer = 0;
    if (busy) return;
    busy = true; last = Date.now();
    try {
      const response = await fetch(location.href, { headers: { Accept: "text/html" } });
      const page = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("live");
      if (page && !liveRegion.contains(document.activeElement)) { liveRegion.replaceChildren(...page.childNodes); countDown(); }
    } catch { /* the line chip tells */ }
    busy = false;
  };
  watch(() => { if (!timer) timer = setTimeout(redraw, Math.max(200, 3000 - (Date.now() - last))); });
}
function countDown() {
  for (const place of document.querySelectorAll("[data-until]")) place.textContent = span(Number(place.dataset.until) - Date.now());
}
countDown();
setInterval(countDown, 10000);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.print) window.print();
  if (button.dataset.post) {
    button.disabled = true;
    try { await post(button.dataset.post, JSON.parse(button.dataset.body || "{}")); toast(button.dataset.done); }
    catch (error) { toast(error.message); }
    button.disabled = false;
  }
});

// The idle lock: the server forgets who did nothing; this says that somebody does.
if (DATA.idle_s) {
  let touched = Date.now(), told = Date.now();
  for (const kind of ["pointerdown", "keydown"]) {
    document.addEventListener(kind, () => {
      touched = Date.now();
      if (touched - told > DATA.idle_s * 100) { told = touched; post("/v1/session/used").catch(() => {}); }
    }, { passive: true });
  }
  setInterval(() => { if (Date.now() - touched > DATA.idle_s * 1000) goSignIn(); }, 1000);
  at("lock").addEventListener("click", async () => { try { await post("/v1/session/end"); } finally { goSignIn(); } });
}
