// Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out.

#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <fstream>
#include <future>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "aep/ingestion/v1/batch_service.grpc.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"

namespace health = grpc::health::v1;
using google::protobuf::Message;
using google::protobuf::Struct;
using google::protobuf::Value;
using google::protobuf::util::JsonStringToMessage;
using google::protobuf::util::MessageToJsonString;

const google::rpc::ErrorInfo kDetailsAreKnownByName;

struct Order {
  Struct json;

  const Value* Find(const std::string& name) const {
    const auto found = json.fields().find(name);
    return found == json.fields().end() ? nullptr : &found->second;
  }
  std::string Text(const std::string& name) const {
    const Value* value = Find(name);
    return value ? value->string_value() : "";
  }
  double Number(const std::string& name) const {
    const Value* value = Find(name);
    return value ? value->number_value() : 0;
  }
};

std::chrono::milliseconds Seconds(double amount) {
  return std::chrono::milliseconds(static_cast<int64_t>(amount * 1000));
}

std::string Json(const Message& message) {
  std::string json;
  (void)MessageToJsonString(message, &json);
  return json;
}

Value TextValue(const std::string& text) {
  Value value;
  value.set_string_value(text);
  return value;
}

// Code, message and metadata; the caller adds the rest.
Struct Ended(const grpc::Status& status) {
  // gRPC for C++ has no names for its codes.
  static const char* const kNames[] = {
      "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
      "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
      "UNAUTHENTICATED"};
  Struct told;
  (*told.mutable_fields())["code"] = TextValue(kNames[status.error_code()]);
  (*told.mutable_fields())["message"] = TextValue(status.error_message());
  return told;
}

Value Text(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata) {
  Value text;
  auto& fields = *text.mutable_struct_value()->mutable_fields();
  for (const auto& [name, value] : metadata) {
    if (name.ends_with("-bin")) continue;
    std::string& known = *fields[std::string(name.data(), name.size())].mutable_string_value();
    known += (known.empty() ? "" : ", ") + std::string(value.data(), value.size());
  }
  return text;
}

std::shared_ptr<grpc::Channel> Channel(const Order& order) {
  static std::map<std::string, std::shared_ptr<grpc::Channel>> channels;
  const int keepalive = static_cast<int>(order.Number("keepalive") * 1000);
  auto& channel = channels[order.Text("address") + " " + std::to_string(keepalive)];
  if (!channel) {
    std::ifstream file("service-config.json");
    grpc::ChannelArguments arguments;
    arguments.SetServiceConfigJSON({std::istreambuf_iterator<char>(file), {}});
    if (keepalive > 0) {
      arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive);
      arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
      arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    }
    channel = grpc::CreateCustomChannel(order.Text("address"), grpc::InsecureChannelCredentials(),
                                        arguments);
  }
  return channel;
}

void SetDeadline(const Order& order, grpc::ClientContext& context) {
  context.set_deadline(std::chrono::system_clock::now() + Seconds(order.Number("seconds")));
}

std::unique_ptr<Message> NewMessage(const std::string& name) {
  const auto* type = google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(
      "aep.ingestion.v1." + name);
  auto* factory = google::protobuf::MessageFactory::generated_factory();
  return std::unique_ptr<Message>(factory->GetPrototype(type)->New());
}

std::string Call(const Order& order) {
  const auto request = NewMessage(order.Text("method") + "Request");
  const auto answer = NewMessage(order.Text("method") + "Response");
  const auto read = JsonStringToMessage(Json(*order.Find("request")), request.get());
  if (!read.ok()) throw std::runtime_error(read.ToString());
  grpc::ClientContext context;
  SetDeadline(order, context);
  for (const auto& pair : order.Find("metadata")->list_value().values()) {
    const auto& values = pair.list_value().values();
    context.AddMetadata(values[0].string_value(), values[1].string_value());
  }
  if (order.Text("compression") == "gzip") context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  const std::string path =
      order.Find("path") ? order.Text("path")
                         : "/aep.ingestion.v1.BatchService/" + order.Text("method");

  grpc::TemplatedGenericStub<Message, Message> stub(Channel(order));
  std::promise<grpc::Status> promise;
  stub.UnaryCall(&context, path, grpc::StubOptions(), request.get(), answer.get(),
                 [&](grpc::Status status) { promise.set_value(std::move(status)); });
  auto ending = promise.get_future();
  if (order.Find("cancelAfter")) {
    ending.wait_for(Seconds(order.Number("cancelAfter")));
    context.TryCancel();
  }
  const grpc::Status status = ending.get();

  Struct told = Ended(status);
  (*told.mutable_fields())["headers"] = Text(context.GetServerInitialMetadata());
  (*told.mutable_fields())["trailers"] = Text(context.GetServerTrailingMetadata());
  std::string json = Json(told);
  json.pop_back();
  if (status.ok()) return json + ",\"answer\":" + Json(*answer) + "}";
  google::rpc::Status details;
  details.ParseFromString(status.error_details());
  return json + (details.details().empty() ? "" : ",\"status\":" + Json(details)) + "}";
}

std::string HealthStatus(const grpc::Status& status, const health::HealthCheckResponse& answer) {
  if (!status.ok()) return Json(Ended(status));
  Struct told;
  (*told.mutable_fields())["status"] =
      TextValue(health::HealthCheckResponse::ServingStatus_Name(answer.status()));
  return Json(told);
}

std::string Check(const Order& order) {
  grpc::ClientContext context;
  SetDeadline(order, context);
  health::HealthCheckRequest request;
  request.set_service(order.Text("service"));
  health::HealthCheckResponse answer;
  const auto status = health::Health::NewStub(Channel(order))->Check(&context, request, &answer);
  return HealthStatus(status, answer);
}

std::string Watch(const Order& order) {
  grpc::ClientContext context;
  SetDeadline(order, context);
  health::HealthCheckRequest request;
  request.set_service(order.Text("service"));
  health::HealthCheckResponse answer;
  const auto answers = health::Health::NewStub(Channel(order))->Watch(&context, request);
  if (!answers->Read(&answer)) return HealthStatus(answers->Finish(), answer);
  context.TryCancel();
  (void)answers->Finish();
  return HealthStatus(grpc::Status::OK, answer);
}

// Both versions have the same messages, but types of their own.
template <typename Service, typename Request, typename Response>
std::string Reflect(const Order& order) {
  grpc::ClientContext context;
  SetDeadline(order, context);
  const auto stub = Service::NewStub(Channel(order));
  const auto stream = stub->ServerReflectionInfo(&context);
  Request list, symbol;
  list.set_list_services("*");
  symbol.set_file_containing_symbol(order.Text("service"));
  Struct told;
  auto& services = *(*told.mutable_fields())["services"].mutable_list_value();
  auto& methods = *(*told.mutable_fields())["methods"].mutable_list_value();
  Response answer;
  for (const auto& request : {list, symbol}) {
    if (!stream->Write(request) || !stream->Read(&answer)) break;
    for (const auto& service : answer.list_services_response().service()) {
      *services.add_values() = TextValue(service.name());
    }
    for (const auto& bytes : answer.file_descriptor_response().file_descriptor_proto()) {
      google::protobuf::FileDescriptorProto file;
      file.ParseFromString(bytes);
      for (const auto& service : file.service()) {
        for (const auto& method : service.method()) *methods.add_values() = TextValue(method.name());
      }
    }
  }
  stream->WritesDone();
  const auto status = stream->Finish();
  return Json(status.ok() ? told : Ended(status));
}

std::string Do(const Order& order) {
  const std::string what = order.Text("do");
  if (what == "call") return Call(order);
  if (what == "check") return Check(order);
  if (what == "watch") return Watch(order);
  namespace reflection = grpc::reflection;
  if (order.Text("version") == "v1") {
    return Reflect<reflection::v1::ServerReflection, reflection::v1::ServerReflectionRequest,
                   reflection::v1::ServerReflectionResponse>(order);
  }
  return Reflect<reflection::v1alpha::ServerReflection,
                 reflection::v1alpha::ServerReflectionRequest,
                 reflection::v1alpha::ServerReflectionResponse>(order);
}

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    Order order;
    const auto read = JsonStringToMessage(line, &order.json);
    if (!read.ok()) throw std::runtime_error(read.ToString());
    std::cout << Do(order) << std::endl;
  }
}
