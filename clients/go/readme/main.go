package main

import (
	"context"
	"fmt"
	"log"

	pb "example.com/create-batch/gen/aep/ingestion/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

func main() {
	conn, err := grpc.NewClient("127.0.0.1:39575", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer demo",
		"x-api-key", "demo", "x-gw-ims-org-id", "demo@AdobeOrg", "x-sandbox-name", "prod")
	request := &pb.CreateBatchRequest{DatasetId: "5c8c3c555033b814b69f947f"}
	answer, err := pb.NewBatchServiceClient(conn).CreateBatch(ctx, request)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Batch.Id)
}
