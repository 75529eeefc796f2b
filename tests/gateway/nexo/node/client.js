// Speaks to a terminal through the public client, unchanged. Reads one JSON object a line on stdin:
//   {"id", "sealed", "request": TerminalApiRequest}
// and prints {"id", "answer"} or {"id", "error"} for each, whenever it is there. Started with one JSON
// argument: {"endpoint", "ca", "apiKey", "passphrase", "identifier", "version"}.
"use strict";
const readline = require("readline");
const { Client, TerminalLocalAPI } = require("@adyen/api-library");
const {
  default: TerminalLocalAPIUnencrypted,
} = require("@adyen/api-library/lib/src/services/terminalLocalAPIUnencrypted");

const place = JSON.parse(process.argv[2]);
const key = {
  AdyenCryptoVersion: 1,
  KeyIdentifier: place.identifier,
  KeyVersion: place.version,
  Passphrase: place.passphrase,
};

// A client each, as two tills are: their certificates are checked, in the library's own way.
const sealed = new TerminalLocalAPI(client());
const plain = new TerminalLocalAPIUnencrypted(client());

function client() {
  return new Client({
    apiKey: place.apiKey,
    environment: "TEST",
    terminalApiLocalEndpoint: place.endpoint,
    certificatePath: place.ca,
  });
}

readline.createInterface({ input: process.stdin }).on("line", async (line) => {
  const order = JSON.parse(line);
  try {
    const answer = order.sealed
      ? await sealed.request(order.request, { ...key, ...order.key })
      : await plain.request(order.request);
    process.stdout.write(JSON.stringify({ id: order.id, answer }) + "\n");
  } catch (error) {
    process.stdout.write(JSON.stringify({ id: order.id, error: String(error.message || error) }) + "\n");
  }
});
