//! What the gateway offers and what it calls: the gRPC methods, as the proto
//! declares them, and the documented REST calls. Metric labels, statuses, the
//! service config and documentation are read from here.

use std::sync::LazyLock;

use prost::Message;
use prost_types::{FileDescriptorSet, MethodDescriptorProto, method_options::IdempotencyLevel};
use serde_json::{Value, json};

use crate::proto::{DESCRIPTOR_SET, v1::batch_service_server::SERVICE_NAME};

/// What repeating a call may do (RFC 9110, section 9.2). Declared in the proto
/// by `idempotency_level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Safety {
    /// It changes nothing.
    Safe,
    /// Repeating it changes nothing more.
    Idempotent,
    /// Repeating it may do it twice.
    NotIdempotent,
}

/// A gRPC method of `BatchService`.
#[derive(Debug, PartialEq, Eq)]
pub struct Method {
    /// Its name, such as `CreateBatch`. `other` for every method that there is
    /// not: callers choose paths, and must not choose labels.
    pub name: String,
    /// What repeating a call may do.
    pub safety: Safety,
    /// Whether the caller sends a stream of messages.
    pub client_streaming: bool,
    /// Whether the response is a stream of messages.
    pub server_streaming: bool,
    /// Its place in [`methods`].
    pub index: usize,
}

impl Method {
    /// The method with this name.
    pub fn named(name: &str) -> &'static Method {
        let known = methods().iter().find(|method| method.name == name);
        known.unwrap_or(&methods()[0])
    }

    /// Whether the proto declares it.
    pub fn is_known(&self) -> bool {
        self.index > 0
    }

    /// `grpc_type` of go-grpc-middleware's metrics.
    pub fn grpc_type(&self) -> &'static str {
        match (self.client_streaming, self.server_streaming) {
            (false, false) => "unary",
            (true, false) => "client_stream",
            (false, true) => "server_stream",
            (true, true) => "bidi_stream",
        }
    }
}

/// All methods. The first stands for those that there are not.
pub fn methods() -> &'static [Method] {
    static METHODS: LazyLock<Vec<Method>> = LazyLock::new(|| {
        // A descriptor set that cannot be read has no methods; a test reads it.
        let set = FileDescriptorSet::decode(DESCRIPTOR_SET).unwrap_or_default();
        let services = set.file.iter().flat_map(|file| {
            let services = file.service.iter();
            services
                .filter(|service| format!("{}.{}", file.package(), service.name()) == SERVICE_NAME)
        });
        let other = MethodDescriptorProto {
            name: Some("other".to_owned()),
            ..Default::default()
        };
        let declared = services.flat_map(|service| &service.method);
        let all = std::iter::once(&other).chain(declared).enumerate();
        all.map(|(index, method)| of_descriptor(index, method))
            .collect()
    });
    &METHODS
}

fn of_descriptor(index: usize, method: &MethodDescriptorProto) -> Method {
    let options = method.options.clone().unwrap_or_default();
    Method {
        name: method.name().to_owned(),
        safety: match options.idempotency_level() {
            IdempotencyLevel::NoSideEffects => Safety::Safe,
            IdempotencyLevel::Idempotent => Safety::Idempotent,
            IdempotencyLevel::IdempotencyUnknown => Safety::NotIdempotent,
        },
        client_streaming: method.client_streaming(),
        server_streaming: method.server_streaming(),
        index,
    }
}

/// A documented REST call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The HTTP method.
    pub method: &'static str,
    /// The path below the base URL, as OpenTelemetry's `url.template`.
    pub template: &'static str,
    /// How spans are named: both.
    pub span: &'static str,
}

macro_rules! routes {
    ($($(#[$doc:meta])* $name:ident: $method:literal $template:literal;)*) => {
        $($(#[$doc])*
        pub const $name: Route = Route {
            method: $method,
            template: $template,
            span: concat!($method, " ", $template),
        };)*
        /// All REST calls.
        pub const ROUTES: &[Route] = &[$($name),*];
    };
}

routes! {
    /// Batch Ingestion API reference, "Create a new batch".
    POST_BATCHES: "POST" "/batches";
    /// Catalog Service API reference, "List batches".
    GET_CATALOG_BATCHES: "GET" "/catalog/batches";
    /// Catalog Service API reference, "Get a batch".
    GET_CATALOG_BATCH: "GET" "/catalog/batches/{id}";
}

/// The gRPC service config for clients: retries that our statuses make safe, a
/// deadline for calls without one, and no retry storm in an outage (gRFC A6).
pub fn service_config() -> Value {
    let config = |method: &Method| {
        let mut config = json!({
            "name": [{ "service": SERVICE_NAME, "method": method.name }],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.5s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        });
        if !method.client_streaming && !method.server_streaming {
            config["timeout"] = json!("60s");
        }
        config
    };
    let methods = methods().iter().filter(|method| method.is_known());
    json!({
        "methodConfig": methods.map(config).collect::<Vec<_>>(),
        "retryThrottling": { "maxTokens": 100, "tokenRatio": 0.1 },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_read_from_the_proto() {
        for (name, safety) in [
            ("CreateBatch", Safety::NotIdempotent),
            ("GetBatch", Safety::Safe),
            ("ListBatches", Safety::Safe),
        ] {
            let method = Method::named(name);
            assert!(method.is_known() && method.name == name);
            assert_eq!((method.safety, method.grpc_type()), (safety, "unary"));
            assert_eq!(methods()[method.index], *method);
        }
        let other = Method::named("DropBatch");
        assert!(!other.is_known() && other.name == "other");
    }
}
