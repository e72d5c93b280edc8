//! The promises, one file each. Every test starts the real binary.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

mod answer_form;
mod answers;
mod bounds;
mod commands;
mod connections;
mod deadlines;
mod documentation;
mod documented_example;
mod drain;
mod early_headers;
mod exactly_once;
mod fault_suite;
mod get_batch;
mod grpc_web;
mod inbound_tls;
mod layers;
mod list_batches;
mod logs;
mod metadata;
mod odd_answers;
mod proof;
mod retries;
mod secrets;
mod server;
mod simulated_api;
mod statuses;
mod telemetry;
mod upstream;
mod wire_faults;
