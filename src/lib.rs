//! A gRPC gateway for the batch ingestion REST API of Adobe Experience
//! Platform. `ARCHITECTURE.md` has the map. The modules stand here from the top
//! down, and use only modules below them.

pub mod cli;

pub mod server;

pub mod config;
pub mod service;

pub mod create_batch;
pub mod operations;

pub mod execution;
pub mod retry;

pub mod upstream;

pub mod http_client;
pub mod status;

pub mod call;
pub mod telemetry;

pub mod certificates;
pub mod credentials;
pub mod mapping;
pub mod proxies;
pub mod redact;

pub mod failure;
pub mod headers;

pub mod api;
pub mod proto;
