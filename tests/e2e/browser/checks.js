// What real gRPC-Web clients are told. Runs in a browser and in Node.

import { create, createFileRegistry, fromBinary, toBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import grpcWeb from "grpc-web";

const SERVICE = "aep.ingestion.v1.BatchService";
const DATASET = "5c8c3c555033b814b69f947f";
const CREDENTIALS = {
  authorization: "Bearer s3cret",
  "x-api-key": "s3cret",
  "x-gw-ims-org-id": "web@AdobeOrg",
  "x-sandbox-name": "prod",
};

// Each client makes a call and tells: { id } or { code, reason, outcome }.

// @connectrpc/connect-web: fetch, binary.
function connectWeb(registry, gateway) {
  const transport = createGrpcWebTransport({ baseUrl: gateway });
  const client = createClient(registry.getService(SERVICE), transport);
  const errorInfo = registry.getMessage("google.rpc.ErrorInfo");
  return async (message, metadata, timeoutMs) => {
    try {
      const headers = { ...CREDENTIALS, ...metadata };
      const answer = await client.createBatch(message, { headers, timeoutMs });
      return { id: answer.batch.id };
    } catch (thrown) {
      const error = ConnectError.from(thrown);
      const [info] = error.findDetails(errorInfo);
      const outcome = error.metadata.get("aep-batch-outcome");
      return { code: error.code, reason: info?.reason, outcome };
    }
  };
}

// grpc-web, Google's own: XMLHttpRequest, binary or text.
function googleWeb(registry, gateway, format) {
  const client = new grpcWeb.GrpcWebClientBase({ format });
  const { input, output } = registry.getService(SERVICE).method.createBatch;
  const method = new grpcWeb.MethodDescriptor(
    `/${SERVICE}/CreateBatch`, grpcWeb.MethodType.UNARY, Object, Object,
    (message) => toBinary(input, create(input, message)),
    (bytes) => fromBinary(output, bytes),
  );
  const [status, errorInfo] = ["Status", "ErrorInfo"].map((name) =>
    registry.getMessage(`google.rpc.${name}`));
  return async (message, metadata, timeoutMs) => {
    const headers = { ...CREDENTIALS, ...metadata };
    if (timeoutMs) headers.deadline = String(Date.now() + timeoutMs);
    try {
      const url = `${gateway}/${SERVICE}/CreateBatch`;
      const answer = await client.unaryCall(url, message, headers, method);
      return { id: answer.batch.id };
    } catch (error) {
      const details = error.metadata?.["grpc-status-details-bin"];
      const bytes = details && Uint8Array.from(atob(details), (c) => c.charCodeAt(0));
      const any = bytes && fromBinary(status, bytes).details.find((any) =>
        any.typeUrl.endsWith("/google.rpc.ErrorInfo"));
      const reason = any && fromBinary(errorInfo, any.value).reason;
      return { code: error.code, reason, outcome: error.metadata?.["aep-batch-outcome"] };
    }
  };
}

export async function load(descriptor) {
  return createFileRegistry(fromBinary(FileDescriptorSetSchema, descriptor));
}

export function clients(registry, gateway) {
  const all = { "connect-web": connectWeb(registry, gateway) };
  if (globalThis.XMLHttpRequest) {
    all["grpc-web binary"] = googleWeb(registry, gateway, "binary");
    all["grpc-web text"] = googleWeb(registry, gateway, "text");
  }
  return all;
}

// `simulator` is where the simulated API is ordered about and asked.
export async function check(client, simulator, mayCall) {
  const order = (faults) => fetch(`${simulator}/faults`, { method: "POST", body: faults });
  const ledger = async () => (await fetch(`${simulator}/batches`)).json();
  const results = [];
  const expect = async (name, faults, expected, batches, call) => {
    if (faults) await order(faults);
    const before = (await ledger()).length;
    const told = await call();
    let made;
    for (let waits = 0; waits < 50; waits++) {
      made = (await ledger()).slice(before);
      if (made.length >= batches) break;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    const good = (key) => expected[key] === told[key];
    let ok = made.length === batches && Object.keys(expected).every(good);
    if (batches && !expected.code) ok &&= told.id === made[0].id;
    results.push({ name, ok, told: `${JSON.stringify(told)}, ${made.length} new batches` });
  };
  const message = { datasetId: DATASET };

  if (!mayCall) {
    await expect("may not call, and nothing is created", "", { id: undefined, reason: undefined }, 0,
      () => client(message));
    return results;
  }
  await expect("a batch", "", { code: undefined }, 1, () => client(message));
  await expect("a slow batch", "delay-700", { code: undefined }, 1, () => client(message));
  await expect("names that are not ASCII", "", { code: undefined }, 1,
    () => client({ ...message, tags: { ключ: { values: ["größe", "大きさ"] } } }));
  await expect("a refusal", "status-404",
    { code: Code.NotFound, reason: "API_NOT_FOUND", outcome: "NOT_APPLIED" }, 0, () => client(message));
  await expect("bad metadata", "",
    { code: Code.InvalidArgument, reason: "INVALID_REQUEST", outcome: "NOT_APPLIED" }, 0,
    () => client(message, { "x-sandbox-name": "Not A Sandbox" }));
  await expect("a lost answer, told and not repeated", "reset-after-create",
    { code: Code.Unknown, reason: "CONNECTION_LOST", outcome: "UNKNOWN" }, 1, () => client(message));
  await expect("a message that is too large", "",
    { code: Code.ResourceExhausted, reason: "MESSAGE_TOO_LARGE", outcome: "NOT_APPLIED" }, 0,
    () => client({ datasetId: "d".repeat(300 * 1024) }));
  await expect("a deadline; the batch is made all the same", "delay-1000",
    { code: Code.DeadlineExceeded }, 1,
    () => client(message, {}, 500));
  return results;
}
