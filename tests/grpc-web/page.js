// The page: makes the calls that its address orders, and hands the results in.

import { check, clients, load } from "./checks.js";

const orders = new URLSearchParams(location.search);
const results = {};
try {
  const descriptor = await (await fetch("/descriptor")).arrayBuffer();
  const registry = await load(new Uint8Array(descriptor));
  for (const [name, client] of Object.entries(clients(registry, orders.get("gateway")))) {
    results[name] = await check(client, "/_simulator", orders.get("may") === "call");
  }
} catch (error) {
  results.page = [{ name: "runs", ok: false, told: String(error?.stack ?? error) }];
}
await fetch("/results", { method: "POST", body: JSON.stringify(results) });
