//! A gRPC gateway for the batch ingestion REST API of Adobe Experience
//! Platform. `ARCHITECTURE.md` has the map. The modules stand here from the top
//! down, and use only modules below them.

pub mod cli;
pub mod simulator;

pub mod server;

pub mod config;
pub mod service;

pub mod create;
pub mod flights;

pub mod upstream;

pub mod recent;
pub mod telemetry;

pub mod status;

pub mod certificates;
pub mod quote;

pub mod attempts;
pub mod credentials;
pub mod deadline;
pub mod early_headers;
pub mod mapping;
pub mod proxies;

pub mod outcome;
pub mod proto;
