//! Tells when a connection has written what was queued on it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

/// The writes and flushes of a connection.
///
/// hyper writes everything that is queued on a connection, then flushes it. So what was queued at
/// some moment has been written once a later flush has completed with no write after it: hyper had
/// nothing more to write. A connection and its calls share a thread (see `workers`), so a waiter is never
/// polled in the middle of such a pass.
#[derive(Debug, Default)]
pub(super) struct Writes {
    flushes: AtomicU64,
    /// Whether anything was written since the last flush.
    is_dirty: AtomicBool,
    flushed: Notify,
}

impl Writes {
    /// Bytes are about to be written.
    pub(super) fn wrote(&self) {
        self.is_dirty.store(true, Ordering::Release);
    }

    /// A flush has completed.
    pub(super) fn flushed(&self) {
        self.is_dirty.store(false, Ordering::Release);
        self.flushes.fetch_add(1, Ordering::AcqRel);
        self.flushed.notify_waiters();
    }

    /// Waits until everything is written that was queued when this was first polled.
    pub(super) async fn all_written(&self) {
        let before = self.flushes.load(Ordering::Acquire);
        loop {
            let flushed = self.flushed.notified();
            let has_flushed = self.flushes.load(Ordering::Acquire) > before;
            if has_flushed && !self.is_dirty.load(Ordering::Acquire) {
                return;
            }
            flushed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    #[test]
    fn queued_bytes_are_written_after_the_last_flush() {
        let writes = Writes::default();
        let mut context = Context::from_waker(Waker::noop());
        writes.wrote();
        writes.flushed();

        let mut all = pin!(writes.all_written());
        assert_eq!(all.as_mut().poll(&mut context), Poll::Pending);
        writes.wrote();
        assert_eq!(all.as_mut().poll(&mut context), Poll::Pending);
        writes.flushed(); // because the buffer was full: more follows
        writes.wrote();
        assert_eq!(all.as_mut().poll(&mut context), Poll::Pending);
        writes.flushed();
        assert_eq!(all.as_mut().poll(&mut context), Poll::Ready(()));
    }
}
