// Creates a batch through the gateway: create-batch [ADDRESS [DATASET_ID [EXTERNAL_ID]]]

#include <google/protobuf/util/json_util.h>
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <string>

#include "aep/ingestion/v1/batch_service.grpc.pb.h"

namespace v1 = aep::ingestion::v1;

const std::map<std::string, std::string> kAdvice = {
    {"NOT_APPLIED", "Nothing was created: the call may be repeated."},
    {"UNKNOWN", "A batch may exist: look for it before you repeat the call."},
    {"APPLIED", "The batch exists: do not create it again."},
};

// As `aep-batch-gateway descriptor --service-config` prints it: UNAVAILABLE is retried, and
// only that. The gateway says it only if nothing was created. It may look the same, and is
// repeated too, if the connection to the gateway itself breaks in the middle of a call.
std::string ServiceConfig() {
  std::ifstream file("service-config.json");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The error's detail of a type, or an empty one.
template <typename Detail>
Detail DetailOf(const grpc::Status& error) {
  google::rpc::Status status;
  status.ParseFromString(error.error_details());
  Detail detail;
  for (const auto& packed : status.details()) {
    if (packed.UnpackTo(&detail)) break;
  }
  return detail;
}

// Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an error without
// the gateway's ErrorInfo comes from the library or from somebody in between, and whatever its
// code is, it proves nothing.
std::string Outcome(const grpc::Status& error) {
  const auto info = DetailOf<google::rpc::ErrorInfo>(error);
  return info.domain() == "aep-batch-gateway" ? info.metadata().at("outcome") : "UNKNOWN";
}

// gRPC for C++ has no names for its codes.
std::string CodeName(grpc::StatusCode code) {
  static const char* const kNames[] = {
      "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
      "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
      "UNAUTHENTICATED"};
  return kNames[code];
}

// Says what failed, whether a batch exists, and what to do.
void Explain(const grpc::Status& error) {
  const std::string outcome = Outcome(error);
  std::cerr << CodeName(error.error_code()) << ' '
            << DetailOf<google::rpc::ErrorInfo>(error).reason() << ' ' << outcome << ": "
            << error.error_message() << '\n';
  const auto bad = DetailOf<google::rpc::BadRequest>(error);
  for (const auto& violation : bad.field_violations()) {
    std::cerr << "  " << violation.field() << ": " << violation.description() << '\n';
  }
  const auto retry = DetailOf<google::rpc::RetryInfo>(error);
  if (retry.has_retry_delay()) {
    std::string delay;  // "1.5s", with quotes
    (void)google::protobuf::util::MessageToJsonString(retry.retry_delay(), &delay);
    std::cerr << "  try again in " << delay.substr(1, delay.size() - 2) << '\n';
  }
  std::cerr << kAdvice.at(outcome) << '\n';
}

std::string Environment(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value ? value : fallback;
}

int main(int argc, char** argv) {
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(ServiceConfig());
  const auto channel = grpc::CreateCustomChannel(
      argc > 1 ? argv[1] : "127.0.0.1:50051", grpc::InsecureChannelCredentials(), arguments);

  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer " + Environment("AEP_TOKEN", "demo"));
  context.AddMetadata("x-api-key", Environment("AEP_API_KEY", "demo"));
  context.AddMetadata("x-gw-ims-org-id", Environment("AEP_ORG_ID", "demo@AdobeOrg"));
  context.AddMetadata("x-sandbox-name", Environment("AEP_SANDBOX", "prod"));
  // Waits longer than the gateway does, which then can say what happened.
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(40));

  v1::CreateBatchRequest request;
  request.set_dataset_id(argc > 2 ? argv[2] : "5c8c3c555033b814b69f947f");
  if (argc > 3) request.set_external_id(argv[3]);
  v1::CreateBatchResponse answer;
  const auto status = v1::BatchService::NewStub(channel)->CreateBatch(&context, request, &answer);
  if (!status.ok()) {
    Explain(status);
    return 1;
  }
  std::cout << answer.batch().id() << ' ' << v1::BatchStatus_Name(answer.batch().status()) << '\n';
}
