package example;

import aep.ingestion.v1.BatchServiceGrpc;
import com.google.gson.Gson;
import com.google.gson.JsonParser;
import com.google.protobuf.ByteString;
import com.google.protobuf.DescriptorProtos.FileDescriptorProto;
import com.google.protobuf.Message;
import com.google.protobuf.MessageOrBuilder;
import com.google.protobuf.TypeRegistry;
import com.google.protobuf.util.JsonFormat;
import com.google.rpc.ErrorDetailsProto;
import io.grpc.CallOptions;
import io.grpc.ClientInterceptors;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.MethodDescriptor.PrototypeMarshaller;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Function;

/** Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out. */
public final class Interop {
  private static final Gson GSON = new Gson();
  private static final JsonFormat.Printer PRINTER =
      JsonFormat.printer()
          .usingTypeRegistry(
              TypeRegistry.newBuilder()
                  .add(ErrorDetailsProto.getDescriptor().getMessageTypes())
                  .build());
  private static final Map<String, ManagedChannel> channels = new HashMap<>();

  /** What the suite orders. */
  private record Order(
      String address,
      String method,
      String path,
      String service,
      String version,
      String compression,
      Object request,
      String[][] metadata,
      double seconds,
      double cancelAfter,
      long keepalive) {}

  public static void main(String[] args) throws Exception {
    var lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    var out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    for (String line; (line = lines.readLine()) != null; ) {
      String verb = JsonParser.parseString(line).getAsJsonObject().get("do").getAsString();
      Order order = GSON.fromJson(line, Order.class);
      Map<String, Object> told;
      try {
        told =
            switch (verb) {
              case "call" -> call(order);
              case "check" -> check(order);
              case "watch" -> watch(order);
              case "reflect" -> reflect(order);
              default -> throw new IllegalArgumentException(verb);
            };
      } catch (StatusRuntimeException e) {
        told = ended(e.getStatus());
      }
      out.println(GSON.toJson(told));
    }
    channels.values().forEach(ManagedChannel::shutdownNow);
  }

  private static ManagedChannel channel(Order order) throws Exception {
    String key = order.address + " " + order.keepalive;
    if (!channels.containsKey(key)) {
      var builder = Grpc.newChannelBuilder(order.address, InsecureChannelCredentials.create());
      builder.defaultServiceConfig(CreateBatch.serviceConfig());
      if (order.keepalive > 0) {
        builder.keepAliveTime(order.keepalive, TimeUnit.SECONDS).keepAliveWithoutCalls(true);
      }
      channels.put(key, builder.build());
    }
    return channels.get(key);
  }

  @SuppressWarnings("unchecked")
  private static Map<String, Object> call(Order order) throws Exception {
    var service = BatchServiceGrpc.getServiceDescriptor();
    var method =
        (MethodDescriptor<Message, Message>)
            service.getMethods().stream()
                .filter(one -> one.getBareMethodName().equals(order.method))
                .findFirst()
                .orElseThrow();
    if (order.path != null) {
      method = method.toBuilder().setFullMethodName(order.path.substring(1)).build();
    }
    var marshaller = (PrototypeMarshaller<Message>) method.getRequestMarshaller();
    var request = marshaller.getMessagePrototype().newBuilderForType();
    JsonFormat.parser().merge(GSON.toJson(order.request), request);
    Metadata metadata = new Metadata();
    for (String[] pair : order.metadata) {
      metadata.put(Metadata.Key.of(pair[0], Metadata.ASCII_STRING_MARSHALLER), pair[1]);
    }
    var headers = new AtomicReference<Metadata>();
    var trailers = new AtomicReference<Metadata>();
    var channel =
        ClientInterceptors.intercept(
            channel(order),
            MetadataUtils.newAttachHeadersInterceptor(metadata),
            MetadataUtils.newCaptureMetadataInterceptor(headers, trailers));
    long milliseconds = (long) (order.seconds * 1000);
    var options =
        CallOptions.DEFAULT
            .withDeadlineAfter(milliseconds, TimeUnit.MILLISECONDS)
            .withCompression(order.compression == null ? "identity" : order.compression);
    var call = ClientCalls.futureUnaryCall(channel.newCall(method, options), request.build());
    if (order.cancelAfter > 0) {
      try {
        call.get((long) (order.cancelAfter * 1000), TimeUnit.MILLISECONDS);
      } catch (TimeoutException e) {
        call.cancel(true);
      }
    }
    Map<String, Object> told;
    try {
      var answer = call.get();
      told = ended(Status.OK);
      told.put("answer", json(answer));
    } catch (CancellationException e) {
      told = ended(Status.CANCELLED);
    } catch (ExecutionException e) {
      told = ended(Status.fromThrowable(e.getCause()));
      var status = StatusProto.fromThrowable(e.getCause());
      if (status.getDetailsCount() > 0) {
        told.put("status", json(status));
      }
    }
    told.put("headers", text(headers.get()));
    told.put("trailers", text(trailers.get()));
    return told;
  }

  private static Map<String, Object> check(Order order) throws Exception {
    var answer =
        HealthGrpc.newBlockingStub(channel(order))
            .withDeadlineAfter((long) order.seconds, TimeUnit.SECONDS)
            .check(HealthCheckRequest.newBuilder().setService(order.service).build());
    return Map.of("status", answer.getStatus());
  }

  private static Map<String, Object> watch(Order order) throws Exception {
    var answers =
        HealthGrpc.newBlockingStub(channel(order))
            .withDeadlineAfter((long) order.seconds, TimeUnit.SECONDS)
            .watch(HealthCheckRequest.newBuilder().setService(order.service).build());
    return Map.of("status", answers.next().getStatus());
  }

  /** Both versions have the same messages, but types of their own. */
  private static Map<String, Object> reflect(Order order) throws Exception {
    List<String> services = new ArrayList<>();
    List<ByteString> files;
    if (order.version.equals("v1")) {
      var stub = io.grpc.reflection.v1.ServerReflectionGrpc.newStub(channel(order));
      var ask = io.grpc.reflection.v1.ServerReflectionRequest.newBuilder();
      first(stub::serverReflectionInfo, ask.setListServices("*").build())
          .getListServicesResponse()
          .getServiceList()
          .forEach(service -> services.add(service.getName()));
      files =
          first(stub::serverReflectionInfo, ask.setFileContainingSymbol(order.service).build())
              .getFileDescriptorResponse()
              .getFileDescriptorProtoList();
    } else {
      var stub = io.grpc.reflection.v1alpha.ServerReflectionGrpc.newStub(channel(order));
      var ask = io.grpc.reflection.v1alpha.ServerReflectionRequest.newBuilder();
      first(stub::serverReflectionInfo, ask.setListServices("*").build())
          .getListServicesResponse()
          .getServiceList()
          .forEach(service -> services.add(service.getName()));
      files =
          first(stub::serverReflectionInfo, ask.setFileContainingSymbol(order.service).build())
              .getFileDescriptorResponse()
              .getFileDescriptorProtoList();
    }
    List<String> methods = new ArrayList<>();
    for (ByteString file : files) {
      for (var service : FileDescriptorProto.parseFrom(file).getServiceList()) {
        service.getMethodList().forEach(method -> methods.add(method.getName()));
      }
    }
    return Map.of("services", services, "methods", methods);
  }

  /** The first answer to one request on a stream. */
  private static <Q, A> A first(Function<StreamObserver<A>, StreamObserver<Q>> start, Q request)
      throws Exception {
    var answer = new CompletableFuture<A>();
    var requests =
        start.apply(
            new StreamObserver<>() {
              @Override
              public void onNext(A value) {
                answer.complete(value);
              }

              @Override
              public void onError(Throwable cause) {
                answer.completeExceptionally(cause);
              }

              @Override
              public void onCompleted() {
                answer.completeExceptionally(new IllegalStateException("no answer"));
              }
            });
    requests.onNext(request);
    requests.onCompleted();
    return answer.get(10, TimeUnit.SECONDS);
  }

  private static Map<String, Object> ended(Status status) {
    Map<String, Object> told = new HashMap<>();
    told.put("code", status.getCode());
    told.put("message", status.getDescription() == null ? "" : status.getDescription());
    return told;
  }

  private static Object json(MessageOrBuilder message) throws Exception {
    return JsonParser.parseString(PRINTER.print(message));
  }

  private static Map<String, String> text(Metadata metadata) {
    Map<String, String> text = new HashMap<>();
    for (String name : metadata == null ? List.<String>of() : metadata.keys()) {
      if (!name.endsWith(Metadata.BINARY_HEADER_SUFFIX)) {
        text.put(name, metadata.get(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER)));
      }
    }
    return text;
  }

  private Interop() {}
}
