# Creates a batch through the gateway: ruby create_batch.rb [ADDRESS [DATASET_ID [EXTERNAL_ID]]]

$LOAD_PATH.unshift File.join(__dir__, 'lib')
require 'aep/ingestion/v1/batch_service_services_pb'
require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'grpc'

V1 = Aep::Ingestion::V1
# As `aep-batch-gateway descriptor --service-config` prints it: UNAVAILABLE is retried, and
# only that. The gateway says it only if nothing was created. It may look the same, and is
# repeated too, if the connection to the gateway itself breaks in the middle of a call.
SERVICE_CONFIG = File.read(File.join(__dir__, 'service-config.json'))
ADVICE = {
  'NOT_APPLIED' => 'Nothing was created: the call may be repeated.',
  'UNKNOWN' => 'A batch may exist: look for it before you repeat the call.',
  'APPLIED' => 'The batch exists: do not create it again.'
}.freeze

# The error's detail of a type, if it has one.
def detail(error, type)
  details = error.to_rpc_status&.details || []
  details.find { |one| one.is(type) }&.unpack(type)
end

# Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an error without
# the gateway's ErrorInfo comes from the library or from somebody in between, and whatever its
# code is, it proves nothing.
def outcome(error)
  info = detail(error, Google::Rpc::ErrorInfo)
  info&.domain == 'aep-batch-gateway' ? info.metadata['outcome'] : 'UNKNOWN'
end

# What failed, whether a batch exists, and what to do.
def explain(error)
  code = GRPC::Core::StatusCodes.constants.find { |name| GRPC::Core::StatusCodes.const_get(name) == error.code }
  reason = detail(error, Google::Rpc::ErrorInfo)&.reason
  lines = ["#{code} #{reason} #{outcome(error)}: #{error.details}"]
  detail(error, Google::Rpc::BadRequest)&.field_violations&.each do |violation|
    lines << "  #{violation.field}: #{violation.description}"
  end
  delay = detail(error, Google::Rpc::RetryInfo)&.retry_delay
  lines << "  try again in #{delay.to_f.to_s.delete_suffix('.0')}s" if delay
  [*lines, ADVICE[outcome(error)]].join("\n")
end

address, dataset_id, external_id = ARGV
metadata = {
  'authorization' => "Bearer #{ENV.fetch('AEP_TOKEN', 'demo')}",
  'x-api-key' => ENV.fetch('AEP_API_KEY', 'demo'),
  'x-gw-ims-org-id' => ENV.fetch('AEP_ORG_ID', 'demo@AdobeOrg'),
  'x-sandbox-name' => ENV.fetch('AEP_SANDBOX', 'prod')
}
batches = V1::BatchService::Stub.new(
  address || '127.0.0.1:50051', :this_channel_is_insecure,
  channel_args: { 'grpc.service_config' => SERVICE_CONFIG }
)
request = V1::CreateBatchRequest.new(
  dataset_id: dataset_id || '5c8c3c555033b814b69f947f', external_id: external_id
)
begin
  # Waits longer than the gateway does, which then can say what happened.
  batch = batches.create_batch(request, metadata: metadata, deadline: Time.now + 40).batch
  puts "#{batch.id} #{batch.status}"
rescue GRPC::BadStatus => e
  abort explain(e)
end
