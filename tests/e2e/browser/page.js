// The page, which Node runs too: makes the calls that its address names, and hands the results in.

import { check, clients, load } from "./checks.js";

const { origin, searchParams: orders } = new URL(globalThis.location?.href ?? process.argv[2]);
const results = {};
try {
  const descriptor = await (await fetch(`${origin}/descriptor`)).arrayBuffer();
  const registry = await load(new Uint8Array(descriptor));
  for (const [name, client] of Object.entries(clients(registry, orders.get("gateway")))) {
    results[name] = await check(client, `${origin}/_simulator`, orders.get("may") === "call");
  }
} catch (error) {
  results.page = [{ name: "runs", ok: false, told: String(error?.stack ?? error) }];
}
await fetch(`${origin}/results`, { method: "POST", body: JSON.stringify(results) });
