# Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out.

$LOAD_PATH.unshift File.join(__dir__, 'lib')
require 'aep/ingestion/v1/batch_service_services_pb'
require 'google/protobuf/descriptor_pb'
require 'google/rpc/error_details_pb' # Details are known by name.
require 'google/rpc/status_pb'
require 'grpc'
require 'grpc/health/v1/health_services_pb'
require 'grpc/reflection/v1/reflection_services_pb'
require 'grpc/reflection/v1alpha/reflection_services_pb'
require 'json'

SERVICE_CONFIG = File.read(File.join(__dir__, 'service-config.json'))
CODES = GRPC::Core::StatusCodes.constants.to_h { |name| [GRPC::Core::StatusCodes.const_get(name), name] }
REFLECTION = { 'v1' => Grpc::Reflection::V1, 'v1alpha' => Grpc::Reflection::V1alpha }.freeze

def stub(service, order)
  arguments = { 'grpc.service_config' => SERVICE_CONFIG }
  if order['keepalive']
    arguments['grpc.keepalive_time_ms'] = order['keepalive'] * 1000
    arguments['grpc.keepalive_permit_without_calls'] = 1
    arguments['grpc.http2.max_pings_without_data'] = 0
  end
  if order['compression']
    algorithm = order['compression'].to_sym
    arguments.merge!(GRPC::Core::CompressionOptions.new(default_algorithm: algorithm).to_channel_arg_hash)
  end
  $stubs ||= {}
  $stubs[[service, order['address'], arguments]] ||=
    service::Stub.new(order['address'], :this_channel_is_insecure, channel_args: arguments)
end

def deadline(order)
  Time.now + order['seconds']
end

def text(metadata)
  (metadata || {}).reject { |name, _| name.end_with?('-bin') }.transform_values { |value| [*value].join(', ') }
end

def call(order)
  v1 = Aep::Ingestion::V1
  request, response = %w[Request Response].map { |kind| v1.const_get(order['method'] + kind) }
  metadata = order['metadata'].group_by(&:first).transform_values { |pairs| pairs.map(&:last) }
  call = stub(v1::BatchService, order).request_response(
    order['path'] || "/aep.ingestion.v1.BatchService/#{order['method']}",
    request.decode_json(JSON.generate(order['request'])), request.method(:encode), response.method(:decode),
    deadline: deadline(order), metadata: metadata, return_op: true
  )
  Thread.new { sleep(order['cancelAfter']) && call.cancel } if order['cancelAfter']
  begin
    told = { code: :OK, message: '', answer: JSON.parse(call.execute.to_json) }
  rescue GRPC::BadStatus => e
    told = { code: CODES[e.code], message: e.details }
    status = e.to_rpc_status
    told[:status] = JSON.parse(status.to_json) if status
  end
  told.merge(headers: text(call.metadata), trailers: text(call.trailing_metadata))
end

def health(order)
  [stub(Grpc::Health::V1::Health, order), Grpc::Health::V1::HealthCheckRequest.new(service: order['service'])]
end

def check(order)
  client, request = health(order)
  { status: client.check(request, deadline: deadline(order)).status }
end

def watch(order)
  client, request = health(order)
  { status: client.watch(request, deadline: deadline(order)).first.status }
end

def reflect(order)
  version = REFLECTION[order['version']]
  requests = [{ list_services: '*' }, { file_containing_symbol: order['service'] }]
  requests.map! { |request| version::ServerReflectionRequest.new(request) }
  client = stub(version::ServerReflection, order)
  list, files = client.server_reflection_info(requests.each, deadline: deadline(order)).to_a
  methods = files.file_descriptor_response.file_descriptor_proto
                 .flat_map { |file| Google::Protobuf::FileDescriptorProto.decode(file).service.to_a }
                 .flat_map { |service| service['method'].map(&:name) }
  { services: list.list_services_response.service.map(&:name), methods: methods }
end

$stdout.sync = true
$stdin.each_line do |line|
  order = JSON.parse(line)
  begin
    told = send(order['do'], order)
  rescue GRPC::BadStatus => e
    told = { code: CODES[e.code], message: e.details }
  end
  puts JSON.generate(told)
end
