// suite.js GATEWAY CHROMIUM: the checks in Node and in a real browser, on pages
// of an origin that may call and of one that may not.

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, openSync, rmSync } from "node:fs";
import http from "node:http";
import { tmpdir } from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { buildSync } from "esbuild";
import { check, clients, load } from "./checks.js";

const [gatewayBinary, chromium] = process.argv.slice(2);
const here = import.meta.dirname;
const LONGEST = 120_000; // ms, for a browser or a start

const descriptor = execFileSync(gatewayBinary, ["descriptor"]);
const script = buildSync({
  entryPoints: [path.join(here, "page.js")], bundle: true, format: "esm", write: false,
}).outputFiles[0].contents;

// Each child has a process group of its own: Debian's chromium is a shell script.
const children = new Set();
function run(program, args, stdio) {
  const child = spawn(program, args, { stdio, detached: true });
  children.add(child);
  return child;
}
function end(child) {
  try {
    process.kill(-child.pid, "SIGKILL");
  } catch {
    // It has ended by itself.
  }
  children.delete(child);
}
process.on("exit", () => children.forEach(end));
process.on("SIGINT", () => process.exit(1));
process.on("SIGTERM", () => process.exit(1));

async function start(name, args) {
  const log = openSync(path.join(here, ".run", `${name}.log`), "w");
  const child = run(gatewayBinary, args, ["ignore", "pipe", log]);
  const line = once(createInterface(child.stdout), "line");
  const ended = once(child, "exit").then(() => { throw new Error(`${name} ended`); });
  const [first] = await Promise.race([line, ended]);
  ended.catch(() => {});
  return JSON.parse(first);
}

// A server of pages on an origin of its own. It hands on what is for the
// simulated API, so that pages need no other permission for it.
async function pages(simulator) {
  let results;
  const server = http.createServer((request, response) => {
    const { pathname } = new URL(request.url, "http://page");
    if (pathname === "/") {
      response.setHeader("content-type", "text/html");
      response.end('<!doctype html><meta charset="utf-8"><script type="module" src="/page.js"></script>');
    } else if (pathname === "/page.js") {
      response.setHeader("content-type", "text/javascript; charset=utf-8");
      response.end(script);
    } else if (pathname === "/descriptor") {
      response.end(descriptor);
    } else if (pathname.startsWith("/_simulator/")) {
      const { method } = request;
      const asked = http.request(`${simulator}${pathname}`, { method }, (answer) => {
        response.writeHead(answer.statusCode);
        answer.pipe(response);
      });
      request.pipe(asked);
    } else if (pathname === "/results") {
      let body = "";
      request.setEncoding("utf8").on("data", (part) => { body += part; });
      request.on("end", () => { response.end(); results(JSON.parse(body)); });
    } else {
      response.writeHead(404).end();
    }
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const visited = () => new Promise((resolve) => { results = resolve; });
  return { origin: `http://127.0.0.1:${server.address().port}`, visited, server };
}

// Opens a page in a browser, and waits for what it hands in.
async function visit(site, gateway, may) {
  const profile = mkdtempSync(path.join(tmpdir(), "grpc-web-"));
  const url = `${site.origin}/?gateway=${encodeURIComponent(gateway)}&may=${may}`;
  const log = openSync(path.join(here, ".run", "chromium.log"), "a");
  const browser = run(chromium, [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server",
    "--ignore-certificate-errors", "--remote-debugging-port=0", `--user-data-dir=${profile}`, url,
  ], ["ignore", log, log]);
  const exit = once(browser, "exit");
  let timer;
  try {
    return await Promise.race([
      site.visited(),
      exit.then(() => { throw new Error("the browser ended"); }),
      new Promise((_, reject) => {
        timer = setTimeout(() => reject(new Error("the page handed nothing in")), LONGEST);
      }),
    ]);
  } finally {
    clearTimeout(timer);
    end(browser);
    await exit.catch(() => {});
    rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

let passed = 0, failed = 0;
function tell(where, results) {
  for (const { name, ok, told } of results) {
    ok ? passed++ : failed++;
    console.log(`${ok ? "ok     " : "FAILED "} ${where}: ${name}${ok ? "" : `\n  ${told}`}`);
  }
}

try {
  const api = await start("simulator", ["simulate", "--listen=127.0.0.1:0"]);
  const simulator = `http://${api.listen}`;
  const [ours, foreign] = [await pages(simulator), await pages(simulator)];
  const serve = (name, ...flags) => start(name, [
    "serve", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0",
    `--upstream-url=${api.upstream_url}`, `--catalog-url=${api.catalog_url}`, "--grpc-web", ...flags,
  ]);
  const open = `http://${(await serve("gateway", `--grpc-web-origins=${ours.origin}`)).listen}`;
  const certificate = ["cert", "key"].map((name) => path.join(here, ".run", `${name}.pem`));
  execFileSync("openssl", [
    "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2",
    "-subj", "/CN=gateway", "-addext", "subjectAltName=IP:127.0.0.1",
    "-out", certificate[0], "-keyout", certificate[1],
  ], { stdio: "ignore" });
  const tls = await serve(
    "gateway-tls", `--grpc-web-origins=${ours.origin}`,
    `--tls-cert-file=${certificate[0]}`, `--tls-key-file=${certificate[1]}`,
  );
  const inTls = `https://${tls.listen}`;
  const closed = `http://${(await serve("gateway-no-origins")).listen}`;

  const registry = await load(descriptor);
  for (const [name, client] of Object.entries(clients(registry, open))) {
    tell(`Node, ${name}`, await check(client, `${simulator}/_simulator`, true));
  }
  for (const [what, site, gateway, may] of [
    ["a page of a named origin", ours, open, "call"],
    ["TLS and HTTP/2", ours, inTls, "call"],
    ["a page of another origin", foreign, open, "not"],
    ["no origin is named", ours, closed, "not"],
  ]) {
    const results = await visit(site, gateway, may);
    for (const [name, result] of Object.entries(results)) tell(`Chromium, ${what}, ${name}`, result);
  }
  // Over HTTP/1.1 each call would have a connection of its own.
  const metrics = await (await fetch(`http://${tls.admin}/metrics`)).text();
  const connections = Number(/^aep_gateway_accepted_connections_total (.*)$/m.exec(metrics)?.[1]);
  tell("Chromium, TLS and HTTP/2", [
    { name: "many calls on a connection", ok: connections <= 4, told: `${connections} connections` },
  ]);
} catch (error) {
  tell("suite", [{ name: "runs", ok: false, told: error.stack }]);
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
