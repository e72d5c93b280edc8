//! Response headers that leave before the end of a call is known.
//!
//! A gRPC library, or the sidecar beside it, says UNAVAILABLE by itself when a
//! connection breaks, and may send the call again. Once it has response headers
//! it never does. So a call whose repetition would do harm gets its headers
//! before anything can exist, and any other call that takes its time gets them
//! soon.

use std::{future::Future, sync::Arc};

use tokio::sync::SetOnce;

/// Whether a call's response headers are to leave now, and whether they have.
#[derive(Clone, Debug, Default)]
pub struct EarlyHeaders(Arc<State>);

#[derive(Debug, Default)]
struct State {
    requested: SetOnce<()>,
    written: SetOnce<()>,
}

impl EarlyHeaders {
    /// The headers are to leave now.
    pub fn request(&self) {
        let _ = self.0.requested.set(()); // fails only if they were requested before
    }

    /// Waits until the headers are to leave.
    pub async fn requested(&self) {
        self.0.requested.wait().await;
    }

    /// The headers have left: they are on the caller's connection.
    pub fn set_written(&self) {
        let _ = self.0.written.set(()); // fails only if that was said before
    }

    /// Makes the headers leave, and waits until they have.
    pub fn send(&self) -> impl Future<Output = ()> + Send + Sync + use<> {
        let state = self.0.clone();
        async move {
            let _ = state.requested.set(());
            state.written.wait().await;
        }
    }
}
