// A bridge made of vanguard-go: gRPC in, REST out, as its documentation shows it.
//
//	vanguard LISTEN UPSTREAM http1|h2c|tls
package main

import (
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"

	"connectrpc.com/vanguard"
	"example.com/bench/gen"
)

func main() {
	upstream, err := url.Parse(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	// The default of 2 would open a connection for nearly every call.
	transport.MaxIdleConns = 0
	transport.MaxIdleConnsPerHost = 10000
	if os.Args[3] == "h2c" {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(upstream) },
		Transport: transport,
	}
	service := gen.File_transcoded_proto.Services().ByName("BatchService")
	handler, err := vanguard.NewTranscoder([]*vanguard.Service{
		vanguard.NewServiceWithSchema(service, proxy,
			vanguard.WithTargetProtocols(vanguard.ProtocolREST)),
	})
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: handler, Protocols: new(http.Protocols)}
	server.Protocols.SetUnencryptedHTTP2(true)
	log.Fatal(server.Serve(listener))
}
