//! A running gateway, and the upstreams to put behind it.

mod collector;
mod gateway;
mod scripted;
mod tls;

pub(crate) use collector::{Collector, attribute};
pub(crate) use gateway::{
    CREATE, CREDENTIALS, Client, GET, Gateway, LIST, RawAnswer, frame, get_request, request,
    with_id,
};
pub(crate) use scripted::{Scripted, Step};
pub(crate) use tls::{Authority, Issued, TlsFolder, TlsFront, certificate, handshake};

use aep_simulator::{Simulator, SimulatorOptions};

/// A simulated upstream on a free port.
pub(crate) async fn simulator() -> Simulator {
    simulator_with(SimulatorOptions::default()).await
}

pub(crate) async fn simulator_with(options: SimulatorOptions) -> Simulator {
    let address = ([127, 0, 0, 1], 0).into();
    Simulator::start(address, options).await.unwrap()
}

/// A simulated upstream in which every request of the operation meets the fault.
pub(crate) async fn simulator_with_fault(fault: &str) -> Simulator {
    simulator_with(SimulatorOptions {
        faults: vec![fault.parse().unwrap()],
        share: 1.0,
        ..Default::default()
    })
    .await
}
