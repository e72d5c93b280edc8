// Makes the calls that tests/e2e/clients asks for, by gRPC or gRPC-Web: a line of JSON in, a line out.

import { createInterface } from 'node:readline';

import { create, createRegistry, fromBinary, fromJson, toJson } from '@bufbuild/protobuf';
import { AnySchema, FileDescriptorProtoSchema } from '@bufbuild/protobuf/wkt';
import { ConnectError, createClient } from '@connectrpc/connect';
import { compressionGzip, createGrpcTransport, createGrpcWebTransport } from '@connectrpc/connect-node';

import { BatchService } from './gen/aep/ingestion/v1/batch_service_pb.js';
import { file_google_rpc_error_details as details } from './gen/google/rpc/error_details_pb.js';
import { Health, HealthCheckResponse_ServingStatus as ServingStatus } from './gen/health/v1/health_pb.js';
import { ServerReflection as reflectionV1 } from './gen/grpc/reflection/v1/reflection_pb.js';
import { ServerReflection as reflectionV1alpha } from './gen/grpc/reflection/v1alpha/reflection_pb.js';
import { codeName, retrying } from './retrying.js';

const registry = createRegistry(details);
const [protocol] = process.argv.slice(2);

const transports = new Map();
function transport({ address, keepalive, compression }) {
  const key = [address, keepalive, compression].join();
  if (!transports.has(key)) {
    const options = { baseUrl: `http://${address}`, httpVersion: '2' };
    if (keepalive) Object.assign(options, { pingIntervalMs: keepalive * 1000, pingIdleConnection: true });
    if (compression === 'gzip') Object.assign(options, { sendCompression: compressionGzip, compressMinBytes: 0 });
    transports.set(key, protocol === 'grpc-web' ? createGrpcWebTransport(options) : createGrpcTransport(options));
  }
  return transports.get(key);
}

const text = (headers) => Object.fromEntries([...headers].filter(([name]) => !name.endsWith('-bin')));

function failed(error) {
  // Connect joins headers and trailers in an error's metadata.
  const told = { code: codeName(error.code), message: error.rawMessage, headers: null, trailers: text(error.metadata) };
  const unpacked = error.details.map(({ type, value }) =>
    toJson(AnySchema, create(AnySchema, { typeUrl: `type.googleapis.com/${type}`, value }), { registry }),
  );
  if (unpacked.length > 0) told.status = { code: error.code, message: error.rawMessage, details: unpacked };
  return told;
}

function methodOf({ method: called, path }) {
  const method = BatchService.methods.find(({ name }) => name === called);
  if (!path) return method;
  const [, typeName, name] = path.split('/');
  return { ...method, name, parent: { ...method.parent, typeName } };
}

async function call(order) {
  const headers = new Headers();
  for (const [name, value] of order.metadata) headers.append(name, value);
  const method = methodOf(order);
  const request = fromJson(method.input, order.request);
  const { signal } = order.cancelAfter ? { signal: AbortSignal.timeout(order.cancelAfter * 1000) } : {};
  const answer = await retrying(order.seconds * 1000, (timeoutMs) =>
    transport(order).unary(method, signal, timeoutMs, headers, request),
  );
  return {
    code: 'OK',
    message: '',
    answer: toJson(method.output, answer.message),
    headers: text(answer.header),
    trailers: text(answer.trailer),
  };
}

const timeout = ({ seconds }) => ({ timeoutMs: seconds * 1000 });

async function check(order) {
  const answer = await createClient(Health, transport(order)).check({ service: order.service }, timeout(order));
  return { status: ServingStatus[answer.status] };
}

async function watch(order) {
  const answers = createClient(Health, transport(order)).watch({ service: order.service }, timeout(order));
  for await (const answer of answers) return { status: ServingStatus[answer.status] };
}

async function reflect(order) {
  const client = createClient(order.version === 'v1' ? reflectionV1 : reflectionV1alpha, transport(order));
  const requests = [
    { messageRequest: { case: 'listServices', value: '*' } },
    { messageRequest: { case: 'fileContainingSymbol', value: order.service } },
  ];
  const told = {};
  for await (const { messageResponse } of client.serverReflectionInfo(stream(requests), timeout(order))) {
    const { service: services, fileDescriptorProto: files } = messageResponse.value;
    if (services) told.services = services.map((service) => service.name);
    if (files) {
      told.methods = files
        .flatMap((file) => fromBinary(FileDescriptorProtoSchema, file).service)
        .flatMap((service) => service.method.map((method) => method.name));
    }
  }
  return told;
}

async function* stream(requests) {
  yield* requests;
}

const DO = { call, check, watch, reflect };
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  const told = await DO[order.do](order).catch((error) => failed(ConnectError.from(error)));
  console.log(JSON.stringify(told));
}
process.exit();
