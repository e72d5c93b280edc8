package example;

import aep.ingestion.v1.BatchServiceGrpc;
import aep.ingestion.v1.Batch;
import aep.ingestion.v1.CreateBatchRequest;
import com.google.gson.Gson;
import com.google.protobuf.util.Durations;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.InputStreamReader;
import java.io.Reader;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** Creates a batch through the gateway: CreateBatch [ADDRESS [DATASET_ID [EXTERNAL_ID]]]. */
public final class CreateBatch {
  private static final Map<String, String> ADVICE =
      Map.of(
          "NOT_APPLIED", "Nothing was created: the call may be repeated.",
          "UNKNOWN", "A batch may exist: look for it before you repeat the call.",
          "APPLIED", "The batch exists: do not create it again.");

  public static void main(String[] args) throws Exception {
    String address = args.length > 0 ? args[0] : "127.0.0.1:50051";
    String datasetId = args.length > 1 ? args[1] : "5c8c3c555033b814b69f947f";
    CreateBatchRequest.Builder request = CreateBatchRequest.newBuilder().setDatasetId(datasetId);
    if (args.length > 2) {
      request.setExternalId(args[2]);
    }
    ManagedChannel channel =
        Grpc.newChannelBuilder(address, InsecureChannelCredentials.create())
            .defaultServiceConfig(serviceConfig())
            .build();
    try {
      Batch batch =
          BatchServiceGrpc.newBlockingStub(channel)
              .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(credentials()))
              // Waits longer than the gateway does, which then can say what happened.
              .withDeadlineAfter(40, TimeUnit.SECONDS)
              .createBatch(request.build())
              .getBatch();
      System.out.println(batch.getId() + " " + batch.getStatus());
    } catch (StatusRuntimeException failure) {
      System.err.println(explain(failure));
      System.exit(1);
    } finally {
      channel.shutdownNow();
    }
  }

  /**
   * As `aep-batch-gateway descriptor --service-config` prints it: UNAVAILABLE is retried, and only
   * that. The gateway says it only if nothing was created. It may look the same, and is repeated
   * too, if the connection to the gateway itself breaks in the middle of a call.
   */
  @SuppressWarnings("unchecked")
  static Map<String, ?> serviceConfig() throws Exception {
    var file = CreateBatch.class.getResourceAsStream("/service-config.json");
    try (Reader reader = new InputStreamReader(file, StandardCharsets.UTF_8)) {
      return new Gson().fromJson(reader, Map.class);
    }
  }

  private static Metadata credentials() {
    Metadata metadata = new Metadata();
    put(metadata, "authorization", "Bearer " + environment("AEP_TOKEN", "demo"));
    put(metadata, "x-api-key", environment("AEP_API_KEY", "demo"));
    put(metadata, "x-gw-ims-org-id", environment("AEP_ORG_ID", "demo@AdobeOrg"));
    put(metadata, "x-sandbox-name", environment("AEP_SANDBOX", "prod"));
    return metadata;
  }

  private static void put(Metadata metadata, String name, String value) {
    metadata.put(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER), value);
  }

  /**
   * Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an
   * error without the gateway's ErrorInfo comes from the library or from somebody in between, and
   * whatever its code is, it proves nothing.
   */
  private static String outcome(StatusRuntimeException failure) throws Exception {
    for (var detail : StatusProto.fromThrowable(failure).getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        ErrorInfo info = detail.unpack(ErrorInfo.class);
        if (info.getDomain().equals("aep-batch-gateway")) {
          return info.getMetadataOrThrow("outcome");
        }
      }
    }
    return "UNKNOWN";
  }

  /** What failed, whether a batch exists, and what to do. */
  private static String explain(StatusRuntimeException failure) throws Exception {
    String reason = "";
    StringBuilder more = new StringBuilder();
    for (var detail : StatusProto.fromThrowable(failure).getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        reason = detail.unpack(ErrorInfo.class).getReason();
      } else if (detail.is(RetryInfo.class)) {
        String delay = Durations.toString(detail.unpack(RetryInfo.class).getRetryDelay());
        more.append("  try again in ").append(delay).append('\n');
      } else if (detail.is(BadRequest.class)) {
        for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          more.append("  %s: %s\n".formatted(violation.getField(), violation.getDescription()));
        }
      }
    }
    var status = failure.getStatus();
    String outcome = outcome(failure);
    return "%s %s %s: %s\n%s%s"
        .formatted(
            status.getCode(), reason, outcome, status.getDescription(), more, ADVICE.get(outcome));
  }

  private static String environment(String name, String fallback) {
    return System.getenv().getOrDefault(name, fallback);
  }

  private CreateBatch() {}
}
