// Creates a batch through the gateway: create-batch [ADDRESS [DATASET_ID [EXTERNAL_ID]]]
package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "example.com/create-batch/gen/aep/ingestion/v1"
)

// As `aep-batch-gateway descriptor --service-config` prints it: UNAVAILABLE is retried, and
// only that. The gateway says it only if nothing was created. It may look the same, and is
// repeated too, if the connection to the gateway itself breaks in the middle of a call.
//
//go:embed service-config.json
var serviceConfig string

var advice = map[string]string{
	"NOT_APPLIED": "Nothing was created: the call may be repeated.",
	"UNKNOWN":     "A batch may exist: look for it before you repeat the call.",
	"APPLIED":     "The batch exists: do not create it again.",
}

func main() {
	conn, err := grpc.NewClient(argument(1, "127.0.0.1:50051"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(serviceConfig))
	if err != nil {
		fail(err)
	}
	// Waits longer than the gateway does, which then can say what happened.
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx,
		"authorization", "Bearer "+environment("AEP_TOKEN", "demo"),
		"x-api-key", environment("AEP_API_KEY", "demo"),
		"x-gw-ims-org-id", environment("AEP_ORG_ID", "demo@AdobeOrg"),
		"x-sandbox-name", environment("AEP_SANDBOX", "prod"))
	request := &pb.CreateBatchRequest{DatasetId: argument(2, "5c8c3c555033b814b69f947f")}
	if len(os.Args) > 3 {
		request.ExternalId = &os.Args[3]
	}
	answer, err := pb.NewBatchServiceClient(conn).CreateBatch(ctx, request)
	if err != nil {
		fail(err)
	}
	fmt.Println(answer.Batch.Id, answer.Batch.Status)
}

// outcome tells whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an
// error without the gateway's ErrorInfo comes from the library or from somebody in between, and
// whatever its code is, it proves nothing.
func outcome(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.Domain == "aep-batch-gateway" {
			return info.Metadata["outcome"]
		}
	}
	return "UNKNOWN"
}

// fail says what failed, whether a batch exists, and what to do.
func fail(err error) {
	failure := status.Convert(err)
	reason, more := "", ""
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = detail.Reason
		case *errdetails.RetryInfo:
			more += fmt.Sprintf("  try again in %v\n", detail.RetryDelay.AsDuration())
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				more += fmt.Sprintf("  %s: %s\n", violation.Field, violation.Description)
			}
		}
	}
	fmt.Fprintf(os.Stderr, "%s %s %s: %s\n%s%s\n", code.Code(failure.Code()), reason,
		outcome(err), failure.Message(), more, advice[outcome(err)])
	os.Exit(1)
}

func argument(i int, fallback string) string {
	if len(os.Args) > i {
		return os.Args[i]
	}
	return fallback
}

func environment(name, fallback string) string {
	if value, ok := os.LookupEnv(name); ok {
		return value
	}
	return fallback
}
