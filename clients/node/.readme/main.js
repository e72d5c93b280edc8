import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const proto = protoLoader.loadSync('aep/ingestion/v1/batch_service.proto', { includeDirs: ['proto'] });
const { BatchService } = grpc.loadPackageDefinition(proto).aep.ingestion.v1;

const credentials = new grpc.Metadata();
credentials.set('authorization', 'Bearer demo');
credentials.set('x-api-key', 'demo');
credentials.set('x-gw-ims-org-id', 'demo@AdobeOrg');
credentials.set('x-sandbox-name', 'prod');
const batches = new BatchService('127.0.0.1:36245', grpc.credentials.createInsecure());
const request = { datasetId: '5c8c3c555033b814b69f947f' };
batches.createBatch(request, credentials, { deadline: Date.now() + 30_000 }, (error, answer) => {
  console.log(error ?? answer.batch.id);
  batches.close();
});
