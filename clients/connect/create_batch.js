// Creates a batch through the gateway: node create_batch.js [ADDRESS [DATASET_ID [EXTERNAL_ID]]]

import { ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcTransport } from '@connectrpc/connect-node';

import { BatchService, BatchStatus } from './gen/aep/ingestion/v1/batch_service_pb.js';
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from './gen/google/rpc/error_details_pb.js';
import { codeName, outcome, retrying } from './retrying.js';

const ADVICE = {
  NOT_APPLIED: 'Nothing was created: the call may be repeated.',
  UNKNOWN: 'A batch may exist: look for it before you repeat the call.',
  APPLIED: 'The batch exists: do not create it again.',
};

// What failed, whether a batch exists, and what to do.
function explain(error) {
  const [info] = error.findDetails(ErrorInfoSchema);
  const lines = [`${codeName(error.code)} ${info?.reason ?? ''} ${outcome(error)}: ${error.rawMessage}`];
  const [bad] = error.findDetails(BadRequestSchema);
  for (const { field, description } of bad?.fieldViolations ?? []) lines.push(`  ${field}: ${description}`);
  const [retry] = error.findDetails(RetryInfoSchema);
  if (retry) lines.push(`  try again in ${Number(retry.retryDelay.seconds) + retry.retryDelay.nanos / 1e9}s`);
  return [...lines, ADVICE[outcome(error)]].join('\n');
}

const [address = '127.0.0.1:50051', datasetId = '5c8c3c555033b814b69f947f', externalId] = process.argv.slice(2);
const headers = {
  authorization: `Bearer ${process.env.AEP_TOKEN ?? 'demo'}`,
  'x-api-key': process.env.AEP_API_KEY ?? 'demo',
  'x-gw-ims-org-id': process.env.AEP_ORG_ID ?? 'demo@AdobeOrg',
  'x-sandbox-name': process.env.AEP_SANDBOX ?? 'prod',
};
// In a browser: createGrpcWebTransport of @connectrpc/connect-web.
const batches = createClient(BatchService, createGrpcTransport({ baseUrl: `http://${address}` }));
try {
  // Waits longer than the gateway does, which then can say what happened.
  const { batch } = await retrying(40_000, (timeoutMs) =>
    batches.createBatch({ datasetId, externalId }, { headers, timeoutMs }),
  );
  console.log(batch.id, `BATCH_STATUS_${BatchStatus[batch.status]}`);
} catch (thrown) {
  console.error(explain(ConnectError.from(thrown)));
  process.exitCode = 1;
}
