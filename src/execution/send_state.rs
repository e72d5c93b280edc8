//! What of a call may have been sent, over all of its attempts.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use crate::upstream::SendGuard;

/// What of a call may have been sent. Shared by the task that works on the call
/// and the caller that waits for it.
#[derive(Clone, Debug, Default)]
pub struct SendState(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    sent: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    is_cancelled: bool,
    previous_attempt_pending: bool,
    /// The last request and when it began, unless it certainly changed nothing.
    request: Option<(SendGuard, Instant)>,
}

impl SendState {
    /// Begins a request; `None` where the call has been cancelled.
    pub fn begin(&self) -> Option<SendGuard> {
        let mut state = self.state();
        if state.is_cancelled {
            return None;
        }
        let guard = SendGuard::notifying(self.0.sent.clone());
        let (guard, _) = state.request.insert((guard, Instant::now()));
        Some(guard.clone())
    }

    /// The last request certainly changed nothing.
    pub fn set_not_applied(&self) {
        self.state().request = None;
    }

    /// Waits until a request that may change something has been under way for
    /// this long.
    pub async fn sent_for(&self, longest: Duration) {
        loop {
            let sent = self.0.sent.notified();
            match self.elapsed() {
                Some(elapsed) if elapsed >= longest => return,
                Some(elapsed) => sleep(longest - elapsed).await,
                None => sent.await,
            }
        }
    }

    fn elapsed(&self) -> Option<Duration> {
        let state = self.state();
        let (guard, began) = state.request.as_ref()?;
        guard.is_sent().then(|| began.elapsed())
    }

    /// Whether an earlier attempt of the same call, made by its caller, may
    /// still create the batch.
    pub fn previous_attempt_pending(&self) -> bool {
        self.state().previous_attempt_pending
    }

    /// Says whether an earlier attempt may still create the batch.
    pub fn set_previous_attempt_pending(&self, is_pending: bool) {
        self.state().previous_attempt_pending = is_pending;
    }

    /// Cancels the call. True: nothing of it was sent that may have changed
    /// anything, and nothing will be.
    pub fn cancel(&self) -> bool {
        let mut state = self.state();
        let not_sent = match &state.request {
            Some((guard, _)) => guard.cancel(),
            None => true,
        };
        state.is_cancelled |= not_sent;
        not_sent
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.0.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_call_is_cancelled_or_may_have_been_sent() {
        let state = SendState::default();
        let first = state.begin().expect("not cancelled");
        let body = first.body(Vec::new(), None);
        body.collect().await.expect("the body");
        assert!(
            !state.cancel(),
            "the first request may have created something"
        );
        state.set_not_applied();
        let second = state.begin().expect("not cancelled");
        assert!(state.cancel(), "the second was not sent");
        assert!(second.body(Vec::new(), None).collect().await.is_err());
        assert!(state.begin().is_none());
    }
}
