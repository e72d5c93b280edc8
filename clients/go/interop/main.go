// Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // Details are known by name.
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	pb "example.com/create-batch/gen/aep/ingestion/v1"
)

type order struct {
	Do, Address, Method, Path, Service, Version, Compression string
	Set                                                      string
	Names                                                    []string
	Request                                                  json.RawMessage
	Metadata                                                 [][2]string
	Seconds, CancelAfter, Keepalive                          float64
}

type told map[string]any

var channels = map[string]*grpc.ClientConn{}

func channel(o order) *grpc.ClientConn {
	key := fmt.Sprint(o.Address, o.Keepalive)
	if channels[key] == nil {
		options := []grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(serviceConfig),
		}
		if o.Keepalive > 0 {
			options = append(options, grpc.WithKeepaliveParams(keepalive.ClientParameters{
				Time: seconds(o.Keepalive), PermitWithoutStream: true}))
		}
		conn, err := grpc.NewClient(o.Address, options...)
		if err != nil {
			log.Fatal(err)
		}
		channels[key] = conn
	}
	return channels[key]
}

func call(ctx context.Context, o order) (told, error) {
	for _, pair := range o.Metadata {
		ctx = metadata.AppendToOutgoingContext(ctx, pair[0], pair[1])
	}
	request, answer := message(o.Method+"Request"), message(o.Method+"Response")
	if err := protojson.Unmarshal(o.Request, request); err != nil {
		log.Fatal(err)
	}
	var headers, trailers metadata.MD
	options := []grpc.CallOption{grpc.Header(&headers), grpc.Trailer(&trailers)}
	if o.Compression == "gzip" {
		options = append(options, grpc.UseCompressor(gzip.Name))
	}
	if o.CancelAfter > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		time.AfterFunc(seconds(o.CancelAfter), cancel)
	}
	path := o.Path
	if path == "" {
		path = "/aep.ingestion.v1.BatchService/" + o.Method
	}
	err := channel(o).Invoke(ctx, path, request, answer, options...)
	ended := status.Convert(err)
	result := told{
		"code": code.Code(ended.Code()).String(), "message": ended.Message(),
		"headers": text(headers), "trailers": text(trailers),
	}
	if err == nil {
		result["answer"] = toJSON(answer)
	} else if len(ended.Details()) > 0 {
		result["status"] = toJSON(ended.Proto())
	}
	return result, nil
}

func message(name string) proto.Message {
	messages := pb.File_aep_ingestion_v1_batch_service_proto.Messages()
	return dynamicpb.NewMessage(messages.ByName(protoreflect.Name(name)))
}

func check(ctx context.Context, o order) (told, error) {
	request := &grpc_health_v1.HealthCheckRequest{Service: o.Service}
	answer, err := grpc_health_v1.NewHealthClient(channel(o)).Check(ctx, request)
	return told{"status": answer.GetStatus().String()}, err
}

func watch(ctx context.Context, o order) (told, error) {
	request := &grpc_health_v1.HealthCheckRequest{Service: o.Service}
	answers, err := grpc_health_v1.NewHealthClient(channel(o)).Watch(ctx, request)
	if err != nil {
		return nil, err
	}
	answer, err := answers.Recv()
	return told{"status": answer.GetStatus().String()}, err
}

func reflect(ctx context.Context, o order) (told, error) {
	list := &reflectionv1.ServerReflectionRequest{
		MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{ListServices: "*"}}
	symbol := &reflectionv1.ServerReflectionRequest{
		MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: o.Service}}
	result := told{}
	for _, request := range []*reflectionv1.ServerReflectionRequest{list, symbol} {
		answer, err := askReflection(ctx, o, request)
		if err != nil {
			return nil, err
		}
		var services, methods []string
		for _, service := range answer.GetListServicesResponse().GetService() {
			services = append(services, service.Name)
			result["services"] = services
		}
		for _, bytes := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
			file := &descriptorpb.FileDescriptorProto{}
			if err := proto.Unmarshal(bytes, file); err != nil {
				return nil, err
			}
			for _, service := range file.Service {
				for _, method := range service.Method {
					methods = append(methods, method.GetName())
					result["methods"] = methods
				}
			}
		}
	}
	return result, nil
}

// load adds a descriptor set's files to those of the generated code, if they are not there.
func load(_ context.Context, o order) (told, error) {
	bytes, err := os.ReadFile(o.Set)
	if err != nil {
		return nil, err
	}
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(bytes, set); err != nil {
		return nil, err
	}
	files := protoregistry.GlobalFiles
	for _, file := range set.File {
		if _, err := files.FindFileByPath(file.GetName()); err == nil {
			continue
		}
		built, err := protodesc.NewFile(file, files)
		if err != nil {
			return nil, err
		}
		if err := files.RegisterFile(built); err != nil {
			return nil, err
		}
	}
	result := told{}
	for _, name := range o.Names {
		found, err := files.FindDescriptorByName(protoreflect.FullName(name))
		if err != nil {
			return nil, err
		}
		result[name] = found.ParentFile().Path()
	}
	return result, nil
}

// askReflection asks in the version that is wanted. The messages of both have the same form.
func askReflection(ctx context.Context, o order, request *reflectionv1.ServerReflectionRequest) (*reflectionv1.ServerReflectionResponse, error) {
	if o.Version == "v1" {
		stream, err := reflectionv1.NewServerReflectionClient(channel(o)).ServerReflectionInfo(ctx)
		if err != nil {
			return nil, err
		}
		if err := stream.Send(request); err != nil {
			return nil, err
		}
		return stream.Recv()
	}
	stream, err := reflectionv1alpha.NewServerReflectionClient(channel(o)).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	old := &reflectionv1alpha.ServerReflectionRequest{}
	if err := convert(request, old); err != nil {
		return nil, err
	}
	if err := stream.Send(old); err != nil {
		return nil, err
	}
	answer, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	result := &reflectionv1.ServerReflectionResponse{}
	return result, convert(answer, result)
}

func convert(from, to proto.Message) error {
	bytes, err := proto.Marshal(from)
	if err != nil {
		return err
	}
	return proto.Unmarshal(bytes, to)
}

func toJSON(message proto.Message) json.RawMessage {
	bytes, err := protojson.Marshal(message)
	if err != nil {
		log.Fatal(err)
	}
	return bytes
}

func text(metadata metadata.MD) map[string]string {
	result := map[string]string{}
	for name, values := range metadata {
		if !strings.HasSuffix(name, "-bin") {
			result[name] = strings.Join(values, ", ")
		}
	}
	return result
}

func seconds(amount float64) time.Duration {
	return time.Duration(amount * float64(time.Second))
}

var serviceConfig = readServiceConfig()

func readServiceConfig() string {
	text, err := os.ReadFile("service-config.json")
	if err != nil {
		log.Fatal(err)
	}
	return string(text)
}

func main() {
	do := map[string]func(context.Context, order) (told, error){
		"call": call, "check": check, "watch": watch, "reflect": reflect, "load": load,
	}
	lines := bufio.NewReader(os.Stdin)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var o order
		if err := json.Unmarshal(line, &o); err != nil {
			log.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), seconds(o.Seconds))
		result, err := do[o.Do](ctx, o)
		cancel()
		if err != nil {
			ended := status.Convert(err)
			result = told{"code": code.Code(ended.Code()).String(), "message": ended.Message()}
		}
		if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
			log.Fatal(err)
		}
	}
}
