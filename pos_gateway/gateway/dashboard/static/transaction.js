// Void and refund, with a manager's approval where one is needed.
"use strict";

const place = at("corrections");
if (place && at("correct")) {
  let what = "", id = "";
  const open = (kind, title) => {
    what = kind; id = uuid7();
    at("correct-title").textContent = title;
    at("correct-go").textContent = title;
    at("refund-amount").hidden = kind !== "refunds";
    at("correct-problem").textContent = "";
    at("correct").showModal();
  };
  at("ask-refund").addEventListener("click", () => open("refunds", say("Refund")));
  if (at("ask-void")) at("ask-void").addEventListener("click", () => open("reversal", say("Void")));
  at("correct-close").addEventListener("click", () => at("correct").close());
  at("correct-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const payment = place.dataset.payment, body = { id, reason: at("why").value }, headers = {};
    at("correct-go").disabled = true;
    try {
      if (what === "refunds") {
        body.amount_minor = minorUnits(at("refund").value);
        if (!body.amount_minor) throw new Error(say("Write the amount like 19.30."));
      }
      if (place.dataset.needsApproval === "yes") {
        const told = await post("/v1/approvals", { member: at("approver").value, pin: at("approver-pin").value, route: what, payment });
        headers["X-Approval"] = told.approval;
      }
      await post(`/v1/payments/${payment}/${what}`, body, headers);
      location.reload();
    } catch (error) { at("correct-problem").textContent = error.message; }
    if (at("approver-pin")) at("approver-pin").value = "";
    at("correct-go").disabled = false;
  });
}
