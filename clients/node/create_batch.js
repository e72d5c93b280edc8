// Creates a batch through the gateway: node create_batch.js [ADDRESS [DATASET_ID [EXTERNAL_ID]]]

import { readFileSync } from 'node:fs';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const file = (path) => new URL(path, import.meta.url).pathname;
// As `aep-batch-gateway descriptor --service-config` prints it: UNAVAILABLE is retried, and
// only that. The gateway says it only if nothing was created. It may look the same, and is
// repeated too, if the connection to the gateway itself breaks in the middle of a call.
const SERVICE_CONFIG = readFileSync(file('service-config.json'), 'utf8');
const ADVICE = {
  NOT_APPLIED: 'Nothing was created: the call may be repeated.',
  UNKNOWN: 'A batch may exist: look for it before you repeat the call.',
  APPLIED: 'The batch exists: do not create it again.',
};

const types = protoLoader.loadSync(
  ['aep/ingestion/v1/batch_service.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'],
  // `json` unpacks the details of errors.
  { includeDirs: [file('../../proto')], enums: String, longs: String, json: true },
);
const { BatchService } = grpc.loadPackageDefinition(types).aep.ingestion.v1;

// The error's detail of a type of google.rpc, if it has one.
function detail(error, name) {
  const [packed] = error.metadata.get('grpc-status-details-bin');
  const details = packed ? types['google.rpc.Status'].deserialize(packed).details : [];
  return details.find((one) => one['@type'].endsWith(`/google.rpc.${name}`)) ?? {};
}

// Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an error without
// the gateway's ErrorInfo comes from the library or from somebody in between, and whatever its
// code is, it proves nothing.
function outcome(error) {
  const { domain, metadata } = detail(error, 'ErrorInfo');
  return domain === 'aep-batch-gateway' ? metadata.outcome : 'UNKNOWN';
}

// What failed, whether a batch exists, and what to do.
function explain(error) {
  const { reason = '' } = detail(error, 'ErrorInfo');
  const lines = [`${grpc.status[error.code]} ${reason} ${outcome(error)}: ${error.details}`];
  for (const { field, description } of detail(error, 'BadRequest').fieldViolations ?? []) {
    lines.push(`  ${field}: ${description}`);
  }
  const delay = detail(error, 'RetryInfo').retryDelay;
  if (delay) lines.push(`  try again in ${Number(delay.seconds ?? 0) + (delay.nanos ?? 0) / 1e9}s`);
  return [...lines, ADVICE[outcome(error)]].join('\n');
}

const [address = '127.0.0.1:50051', datasetId = '5c8c3c555033b814b69f947f', externalId] = process.argv.slice(2);
const metadata = new grpc.Metadata();
metadata.set('authorization', `Bearer ${process.env.AEP_TOKEN ?? 'demo'}`);
metadata.set('x-api-key', process.env.AEP_API_KEY ?? 'demo');
metadata.set('x-gw-ims-org-id', process.env.AEP_ORG_ID ?? 'demo@AdobeOrg');
metadata.set('x-sandbox-name', process.env.AEP_SANDBOX ?? 'prod');

const batches = new BatchService(address, grpc.credentials.createInsecure(), {
  'grpc.service_config': SERVICE_CONFIG,
});
// Waits longer than the gateway does, which then can say what happened.
const deadline = Date.now() + 40_000;
batches.createBatch({ datasetId, externalId }, metadata, { deadline }, (error, answer) => {
  if (error) {
    console.error(explain(error));
    process.exitCode = 1;
  } else {
    console.log(answer.batch.id, answer.batch.status);
  }
  batches.close();
});
