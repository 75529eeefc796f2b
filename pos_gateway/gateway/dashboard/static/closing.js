// Shifts, the blind count, the day.
"use strict";

function on(id, event, work) {
  const place = at(id);
  if (place) place.addEventListener(event, async (happened) => {
    happened.preventDefault();
    at("problem").textContent = "";
    try { await work(happened); } catch (error) { at("problem").textContent = error.message; at("problem").scrollIntoView(); }
  });
}
function amount(id) {
  const minor = minorUnits(at(id).value);
  if (minor === null) throw new Error(say("Write the amount like 19.30."));
  return minor;
}
function told(counted) {
  const rows = [[say("Counted"), counted.counted_minor], [say("Expected"), counted.expected_minor], [say("Difference"), counted.variance_minor]];
  at("variance").replaceChildren(...rows.flatMap(([name, minor]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name; text.textContent = `${money(minor)} ${DATA.currency}`;
    return [term, text];
  }));
  at("variance-why").hidden = counted.variance_minor === 0;
  at("count").hidden = counted.counts_left === 0;
  at("close").hidden = false;
}
const shiftId = uuid7(), cashId = { now: uuid7() }, dayId = uuid7();
on("open-shift", "submit", async () => { await post("/v1/shifts", { id: shiftId, float_minor: amount("float") }); location.reload(); });
on("cash", "submit", async (event) => {
  const sign = event.submitter && event.submitter.value === "out" ? -1 : 1;
  await post("/v1/shifts/current/cash", { id: cashId.now, amount_minor: sign * amount("cash-amount"), reason: at("cash-reason").value });
  cashId.now = uuid7(); at("cash").reset(); toast(say("Recorded."));
});
on("count", "submit", async () => told(await post("/v1/shifts/current/count", { counted_minor: amount("counted") })));
on("close", "submit", async () => {
  const why = at("variance-why").hidden ? "" : at("reason").value;
  await post("/v1/shifts/current/close", { reason: why, note: at("note").value });
  location.reload();
});
on("close-day", "click", async () => {
  if (!window.confirm(say("Close the day now? It cannot be taken back."))) return;
  await post("/v1/reports/z", { id: dayId });
  location.assign(`/reports/${dayId}`);
});
