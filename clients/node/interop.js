// Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import health from 'grpc-health-check';
import descriptors from 'protobufjs/ext/descriptor/index.js';

const file = (path) => new URL(path, import.meta.url).pathname;
const reflectionProto = (version) =>
  createRequire(import.meta.url).resolve(`@grpc/reflection/build/proto/grpc/reflection/${version}/reflection.proto`);
const types = protoLoader.loadSync(
  [
    'aep/ingestion/v1/batch_service.proto',
    'google/rpc/status.proto',
    'google/rpc/error_details.proto',
    health.protoPath,
    reflectionProto('v1'),
    reflectionProto('v1alpha'),
  ],
  { includeDirs: [file('../../proto')], enums: String, longs: String, json: true },
);
const packages = grpc.loadPackageDefinition(types);
const SERVICE_CONFIG = readFileSync(file('service-config.json'), 'utf8');

const clients = new Map();
function client(Service, { address, keepalive, compression }) {
  const [{ path }] = Object.values(Service.service);
  const key = [path, address, keepalive, compression].join();
  if (!clients.has(key)) {
    const options = { 'grpc.service_config': SERVICE_CONFIG };
    if (keepalive) {
      options['grpc.keepalive_time_ms'] = keepalive * 1000;
      options['grpc.keepalive_permit_without_calls'] = 1;
    }
    if (compression) {
      options['grpc.default_compression_algorithm'] = grpc.compressionAlgorithms[compression];
    }
    clients.set(key, new Service(address, grpc.credentials.createInsecure(), options));
  }
  return clients.get(key);
}

const deadline = ({ seconds }) => ({ deadline: Date.now() + seconds * 1000 });

const text = (metadata) =>
  Object.fromEntries(Object.entries(metadata.getMap()).filter(([, value]) => typeof value === 'string'));

// protobuf's own JSON, which proto-loader does not make of these types.
const TIMESTAMPS = ['created', 'updated', 'started', 'completed', 'startDate', 'endDate', 'createdAfter', 'createdBefore'];
const STRUCTS = ['metrics', 'extra'];
function json(value, name) {
  if (Array.isArray(value)) return value.map((one) => json(one, name));
  if (typeof value !== 'object' || value === null) return value;
  if (STRUCTS.includes(name)) return struct(value);
  const milliseconds = Number(value.seconds ?? 0) * 1000 + (value.nanos ?? 0) / 1e6;
  if (TIMESTAMPS.includes(name)) return new Date(milliseconds).toISOString().replace('.000Z', 'Z');
  if (name === 'retryDelay') return `${milliseconds / 1000}s`;
  return Object.fromEntries(Object.entries(value).map(([name, value]) => [name, json(value, name)]));
}
function struct({ fields = {} }) {
  return Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, plain(value)]));
}
function plain(value) {
  const [[kind, of]] = Object.entries(value);
  if (kind === 'nullValue') return null;
  if (kind === 'structValue') return struct(of);
  return kind === 'listValue' ? (of.values ?? []).map(plain) : of;
}

const batchService = packages.aep.ingestion.v1.BatchService;
const fromJson = (value, name) => {
  const time = TIMESTAMPS.includes(name) && Date.parse(value);
  return time ? { seconds: Math.floor(time / 1000), nanos: (time % 1000) * 1e6 } : value;
};

function call(order) {
  const batches = client(batchService, order);
  const metadata = new grpc.Metadata();
  for (const [name, value] of order.metadata) metadata.add(name, value);
  const { path, requestSerialize, responseDeserialize } = batchService.service[order.method];
  const request = Object.fromEntries(Object.entries(order.request).map(([name, value]) => [name, fromJson(value, name)]));
  return new Promise((resolve) => {
    const told = { headers: {} };
    const call = batches.makeUnaryRequest(
      order.path ?? path,
      requestSerialize,
      responseDeserialize,
      request,
      metadata,
      deadline(order),
      (error, answer) => {
        if (answer) told.answer = json(answer);
        const [packed] = error?.metadata.get('grpc-status-details-bin') ?? [];
        if (packed) told.status = json(types['google.rpc.Status'].deserialize(packed));
      },
    );
    call.on('metadata', (metadata) => (told.headers = text(metadata)));
    call.on('status', ({ code, details, metadata }) =>
      setImmediate(() =>
        resolve({ ...told, code: grpc.status[code], message: details, trailers: text(metadata) }),
      ),
    );
    if (order.cancelAfter) setTimeout(() => call.cancel(), order.cancelAfter * 1000);
  });
}

const unary = (client, method, request, order) =>
  new Promise((resolve, reject) => {
    client[method](request, deadline(order), (error, answer) => (error ? reject(error) : resolve(answer)));
  });

// The first answers of a stream, one for each request.
function stream(call, requests) {
  return new Promise((resolve, reject) => {
    const answers = [];
    call.on('error', (error) => error.code !== grpc.status.CANCELLED && reject(error));
    call.on('data', (answer) => {
      answers.push(answer);
      if (answers.length === requests.length) {
        call.cancel();
        resolve(answers);
      }
    });
    if (call.write) requests.forEach((request) => call.write(request));
  });
}

const check = (order) => unary(client(packages.grpc.health.v1.Health, order), 'check', { service: order.service }, order);

async function watch(order) {
  const request = { service: order.service };
  const call = client(packages.grpc.health.v1.Health, order).watch(request, deadline(order));
  return (await stream(call, [request]))[0];
}

async function reflect(order) {
  const { ServerReflection } = packages.grpc.reflection[order.version];
  const call = client(ServerReflection, order).serverReflectionInfo(deadline(order));
  const [list, files] = await stream(call, [{ listServices: '*' }, { fileContainingSymbol: order.service }]);
  const methods = files.fileDescriptorResponse.fileDescriptorProto
    .flatMap((one) => descriptors.FileDescriptorProto.decode(one).service)
    .flatMap((service) => service.method.map((method) => method.name));
  return { services: list.listServicesResponse.service.map((service) => service.name), methods };
}

const DO = { call, check, watch, reflect };
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  const told = await DO[order.do](order).catch((error) => ({ code: grpc.status[error.code], message: error.details }));
  console.log(JSON.stringify(told));
}
process.exit();
