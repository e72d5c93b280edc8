// A control plane that tells proxyless gRPC clients of the gateways:
// control -retry-on CODES ADDRESS...
// Its first line of output says where it listens.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	managerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The node that clients say they are, and the name they call: xds:///gateways.
const (
	node = "client"
	name = "gateways"
)

func main() {
	retryOn := flag.String("retry-on", "", "what clients retry, as Envoy's retry_on says it")
	flag.Parse()

	snapshot, err := cache.NewSnapshot("1", map[resource.Type][]types.Resource{
		resource.ListenerType: {listener(*retryOn)},
		resource.ClusterType:  {cluster()},
		resource.EndpointType: {endpoints(flag.Args())},
	})
	must(err)
	snapshots := cache.NewSnapshotCache(true, cache.IDHash{}, nil)
	must(snapshots.SetSnapshot(context.Background(), node, snapshot))

	socket, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	serving := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(
		serving, server.NewServer(context.Background(), snapshots, nil))
	fmt.Printf("{\"listen\": %q}\n", socket.Addr())
	must(serving.Serve(socket))
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func packed(message proto.Message) *anypb.Any {
	inside, err := anypb.New(message)
	must(err)
	return inside
}

func listener(retryOn string) *listenerv3.Listener {
	action := &routev3.RouteAction{
		ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: name},
		RetryPolicy: &routev3.RetryPolicy{
			RetryOn:    retryOn,
			NumRetries: wrapperspb.UInt32(2),
			RetryBackOff: &routev3.RetryPolicy_RetryBackOff{
				BaseInterval: durationpb.New(25 * time.Millisecond),
			},
		},
	}
	routes := &routev3.RouteConfiguration{
		Name: name,
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    name,
			Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: ""}},
				Action: &routev3.Route_Route{Route: action},
			}},
		}},
	}
	return &listenerv3.Listener{
		Name: name,
		ApiListener: &listenerv3.ApiListener{ApiListener: packed(&managerv3.HttpConnectionManager{
			RouteSpecifier: &managerv3.HttpConnectionManager_RouteConfig{RouteConfig: routes},
			HttpFilters: []*managerv3.HttpFilter{{
				Name:       "router",
				ConfigType: &managerv3.HttpFilter_TypedConfig{TypedConfig: packed(&routerv3.Router{})},
			}},
		})},
	}
}

func cluster() *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: &corev3.ConfigSource{
			ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
			ResourceApiVersion:    corev3.ApiVersion_V3,
		}},
	}
}

func endpoints(addresses []string) *endpointv3.ClusterLoadAssignment {
	locality := &endpointv3.LocalityLbEndpoints{
		Locality:            &corev3.Locality{Region: "here"},
		LoadBalancingWeight: wrapperspb.UInt32(1),
	}
	for _, address := range addresses {
		host, port, err := net.SplitHostPort(address)
		must(err)
		number, err := strconv.ParseUint(port, 10, 16)
		must(err)
		socket := &corev3.SocketAddress{
			Address:       host,
			PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(number)},
		}
		locality.LbEndpoints = append(locality.LbEndpoints, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: socket}},
			}},
		})
	}
	return &endpointv3.ClusterLoadAssignment{
		ClusterName: name,
		Endpoints:   []*endpointv3.LocalityLbEndpoints{locality},
	}
}
