// Makes calls with grpc-go for a program in another language: client TARGET
// After a first line, which says that it has a connection, one call is a line of JSON on standard
// input, and its end one on standard output. The messages are bytes, so that no code need be
// generated.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds"
)

type call struct {
	ID       int
	Method   string
	Request  []byte
	Seconds  float64
	Metadata [][2]string
}

type end struct {
	ID                int
	Code              int
	Message           string
	Response          []byte
	Headers, Trailers [][2][]byte
}

// asIs sends and receives messages as bytes.
type asIs struct{}

func (asIs) Name() string                  { return "proto" }
func (asIs) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (asIs) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}

func main() {
	connection, err := grpc.NewClient(os.Args[1],
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(asIs{})))
	if err != nil {
		log.Fatal(err)
	}
	connection.Connect()
	for state := connection.GetState(); state != connectivity.Ready; state = connection.GetState() {
		connection.WaitForStateChange(context.Background(), state)
	}

	fmt.Println("connected")
	var output sync.Mutex
	encoder := json.NewEncoder(os.Stdout)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var asked call
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			log.Fatal(err)
		}
		go func() {
			ended := invoke(connection, asked)
			output.Lock()
			defer output.Unlock()
			if err := encoder.Encode(ended); err != nil {
				log.Fatal(err)
			}
		}()
	}
}

func invoke(connection *grpc.ClientConn, asked call) end {
	seconds := time.Duration(asked.Seconds * float64(time.Second))
	within, cancel := context.WithTimeout(context.Background(), seconds)
	defer cancel()
	for _, pair := range asked.Metadata {
		within = metadata.AppendToOutgoingContext(within, pair[0], pair[1])
	}
	var headers, trailers metadata.MD
	ended := end{ID: asked.ID}
	err := connection.Invoke(within, asked.Method, &asked.Request, &ended.Response,
		grpc.Header(&headers), grpc.Trailer(&trailers))
	ended.Code, ended.Message = int(status.Code(err)), status.Convert(err).Message()
	ended.Headers, ended.Trailers = pairs(headers), pairs(trailers)
	return ended
}

func pairs(all metadata.MD) (found [][2][]byte) {
	for name, values := range all {
		for _, value := range values {
			found = append(found, [2][]byte{[]byte(name), []byte(value)})
		}
	}
	return found
}
