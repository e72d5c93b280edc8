//! A running gateway, and the upstreams to put behind it.

mod gateway;
mod scripted;
mod tls;

pub(crate) use gateway::{CREDENTIALS, Gateway, RawAnswer, frame, request};
pub(crate) use scripted::{Scripted, Step};
pub(crate) use tls::{TlsFront, certificate};

use aep_batch_gateway::simulator::{Simulator, SimulatorOptions};

/// A simulated upstream on a free port.
pub(crate) async fn simulator() -> Simulator {
    let address = ([127, 0, 0, 1], 0).into();
    Simulator::start(address, SimulatorOptions::default())
        .await
        .unwrap()
}
